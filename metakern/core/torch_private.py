"""The private names of torch that this package needs, in one place: what to look at when a new version of torch fails.

Everything else asks the functions of :mod:`metakern.core.transforms` and :mod:`metakern.core.memo`.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

#: Context manager: operators called within go straight to the kernels, past autograd.
below_autograd = torch._C._AutoDispatchBelowAutograd

#: Whether a transform of torch.func is at work around the call.
func_is_active = torch._C._are_functorch_transforms_active

#: Whether torch.func wraps a tensor, whether torch.func.vmap does, and what is inside.
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
is_batched_wrapper = torch._C._functorch.is_batchedtensor
unwrapped = torch._C._functorch.get_unwrapped


def forward_mode_is_active() -> bool:
    """Whether the call is within torch.autograd.forward_ad.dual_level, or torch.func.jvp."""
    return forward_ad._current_level >= 0


#: An operator's schema from its text, "namespace::name(Tensor x, int n) -> Tensor".
parse_schema = torch._C.parse_schema
