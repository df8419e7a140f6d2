"""The private names of torch that this package needs, in one place: what to look at when a new version of torch fails.

Everything else asks the functions of :mod:`metakern.core.transforms` and :mod:`metakern.core.memo`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._guards import TracingContext
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])

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


def called_by_the_compiler(function: Function) -> Function:
    """Decorator: torch.compile calls the function while it traces, and takes what it returns as a constant.

    As torch.compiler.assume_constant_result, which imports the compiler and takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def traced_lines() -> list[tuple[str, int]]:
    """Files and numbers of the lines that torch.compile is tracing, the innermost last."""
    stack = TracingContext.extract_stack() if TracingContext.try_get() is not None else []
    return [(frame.filename, frame.lineno or 0) for frame in stack]
