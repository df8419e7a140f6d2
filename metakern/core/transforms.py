"""Whether torch.compile, torch.func or forward-mode differentiation is at work around a call, and on which tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from metakern.core.torch_private import (
    forward_mode_is_active,
    func_is_active,
    is_batched_wrapper,
    is_wrapped,
    unwrapped,
)


def is_transformed() -> bool:
    """Whether torch.compile or a transform of torch.func is at work around the call."""
    return torch.compiler.is_compiling() or func_is_active()


def is_transformed_or_dual() -> bool:
    """The same, or whether forward-mode differentiation is: what asks every function for a formula of its own."""
    return is_transformed() or forward_mode_is_active()


def wants_gradient(x: Tensor) -> bool:
    """Whether it requires a gradient, also where only the tensor inside a torch.func.vmap says so."""
    if x.requires_grad:
        return True
    if torch.compiler.is_compiling() or not func_is_active():
        return False
    return any(inner.requires_grad for inner in levels(x))


def is_batched(x: Tensor) -> bool:
    """Whether it differs between the elements of a torch.func.vmap."""
    return is_batched_wrapper(x) or any(map(is_batched_wrapper, levels(x)))


def levels(x: Tensor) -> Iterator[Tensor]:
    """The tensors that the transforms of torch.func have wrapped, from the outside in."""
    while is_wrapped(x):
        x = unwrapped(x)
        yield x
