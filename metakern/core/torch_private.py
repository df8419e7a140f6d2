"""All private torch names that this package uses: the place to look when a new torch version breaks it.

Other modules import them from here under public names; tests/test_rooms.py enforces that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._functorch import pyfunctorch
from torch._guards import TracingContext
from torch._subclasses import fake_tensor, functional_tensor
from torch.autograd import forward_ad
from torch.nn.modules import batchnorm, conv
from torch.nn.modules import module as _module
from torch.optim import optimizer
from torch.utils import _device, _python_dispatch
from torch.utils import _pytree as pytree

__all__ = ["pytree"]

Function = TypeVar("Function", bound=Callable[..., Any])

# ------------------------------------------------------------------------------------------------ around a call

#: Context manager: operators called within bypass autograd.
below_autograd = torch._C._AutoDispatchBelowAutograd

#: Whether a transform of torch.func is active.
func_is_active = torch._C._are_functorch_transforms_active

#: Whether torch.func wraps a tensor, whether torch.func.vmap does, and the wrapped tensor.
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
is_batched_wrapper = torch._C._functorch.is_batchedtensor
unwrapped = torch._C._functorch.get_unwrapped

#: The stack of torch.func's transforms, and their kinds; its depth, None if it is empty.
functorch = torch._C._functorch
func_level = torch._C._functorch.maybe_current_level

#: Active function and dispatch modes: their number, and the modes themselves.
count_function_modes = torch._C._len_torch_function_stack
count_dispatch_modes = torch._C._len_torch_dispatch_stack
function_mode = torch._C._get_function_stack_at
dispatch_modes = _python_dispatch._get_current_dispatch_mode_stack

#: Whether torch.jit is tracing.
is_jit_tracing = torch._C._is_tracing

#: Context managers that switch off function modes, dispatch modes and the transforms of torch.func.
without_function_modes = torch._C.DisableTorchFunction
without_dispatch_modes = _python_dispatch._disable_current_modes
without_transforms = pyfunctorch.temporarily_clear_interpreter_stack

#: Context manager that leaves the innermost transform of torch.func.
outside_transform = pyfunctorch.temporarily_pop_interpreter_stack

#: Decorator: torch.compile does not trace the function.
not_compiled: Any = torch._disable_dynamo  # type: ignore[attr-defined]


def forward_mode_is_active() -> bool:
    """Whether the call is within torch.autograd.forward_ad.dual_level, or torch.func.jvp."""
    return forward_ad._current_level >= 0


# -------------------------------------------------------------------------------------------- classes and modules

#: Dispatch modes used for tracing, and their tensor classes.
FakeTensor, FakeTensorMode = fake_tensor.FakeTensor, fake_tensor.FakeTensorMode
FunctionalTensor, FunctionalTensorMode = functional_tensor.FunctionalTensor, functional_tensor.FunctionalTensorMode

#: The mode of torch.set_default_device.
DeviceContext = _device.DeviceContext

#: Base classes of batch norms and convolutions.
NormBase: Any = batchnorm._NormBase
ConvNd: Any = conv._ConvNd

#: Global module hooks, one dict per kind: forward and backward.
GLOBAL_FORWARD_HOOKS = (_module._global_forward_hooks, _module._global_forward_pre_hooks)
GLOBAL_BACKWARD_HOOKS = (_module._global_backward_hooks, _module._global_backward_pre_hooks)

# -------------------------------------------------------------------------------------------------------- functions

#: The functions behind torch.nn.functional.
nn_functions = torch._C._nn

#: Parser of the arguments of Tensor.to and nn.Module.to: device, dtype, non_blocking, memory_format.
parse_to = torch._C._nn._parse_to

#: In-place and plain functions on lists of tensors.
foreach_copy_ = torch._foreach_copy_
foreach_lerp_ = torch._foreach_lerp_
foreach_mul = torch._foreach_mul
foreach_mul_ = torch._foreach_mul_
foreach_sub = torch._foreach_sub

#: Whether an optimizer may step these parameters by fused kernels or by functions on lists of tensors.
fused_or_foreach: Any = optimizer._default_to_fused_or_foreach

#: Getter and setter of the flag that enables each attention backend. Older releases have fewer backends.
ATTENTION = {
    name: (getattr(torch._C, f"_get_{name}_sdp_enabled"), getattr(torch._C, f"_set_sdp_use_{name}"))
    for name in ("math", "flash", "mem_efficient", "cudnn", "overrideable")
    if hasattr(torch._C, f"_set_sdp_use_{name}")
}

#: Parser of an operator schema, "namespace::name(Tensor x, int n) -> Tensor".
parse_schema = torch._C.parse_schema


def called_by_the_compiler(function: Function) -> Function:
    """Decorator: torch.compile calls the function while tracing and treats its result as a constant.

    Like torch.compiler.assume_constant_result, without importing the compiler, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def traced_lines() -> list[tuple[str, int]]:
    """File and line number of each frame that torch.compile is tracing, innermost last."""
    stack = TracingContext.extract_stack() if TracingContext.try_get() is not None else []
    return [(frame.filename, frame.lineno or 0) for frame in stack]
