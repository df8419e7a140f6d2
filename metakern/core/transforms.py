"""Detection of torch.compile, torch.func transforms and forward-mode differentiation, and of the tensors they wrap."""

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
    """Whether torch.compile or a transform of torch.func is active."""
    return torch.compiler.is_compiling() or func_is_active()


def is_transformed_or_dual() -> bool:
    """Whether torch.compile, a torch.func transform or forward-mode AD, which needs formulas of its own, is active."""
    return is_transformed() or forward_mode_is_active()


def wants_gradient(x: Tensor) -> bool:
    """Whether ``x`` requires a gradient, itself or as a tensor wrapped by torch.func."""
    if x.requires_grad:
        return True
    if torch.compiler.is_compiling() or not func_is_active():
        return False
    return any(inner.requires_grad for inner in levels(x))


def is_batched(x: Tensor) -> bool:
    """Whether ``x`` has a batch dimension of torch.func.vmap."""
    return is_batched_wrapper(x) or any(map(is_batched_wrapper, levels(x)))


def levels(x: Tensor) -> Iterator[Tensor]:
    """The tensors that torch.func has wrapped in ``x``, outermost first."""
    while is_wrapped(x):
        x = unwrapped(x)
        yield x
