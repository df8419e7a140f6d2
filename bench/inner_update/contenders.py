"""Contenders for one update of a list of tensors: inner_update and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metakern.ops import inner_update
from metakern.ops.inner_update import reference

#: Inner learning rate α.
LR = 0.01

#: Maps params, grads and the largest gradient norm of a task, or None, to new params.
Update = Callable[[list[Tensor], list[Tensor], float | None], list[Tensor]]


def fused(backend: str) -> Update:
    """metakern.ops.inner_update by one backend."""
    return lambda params, grads, clip_norm: inner_update(params, grads, LR, clip_norm=clip_norm, backend=backend)


def loop(params: list[Tensor], grads: list[Tensor], clip_norm: float | None) -> list[Tensor]:
    """A Python loop over the tensors, as learn2learn writes it."""
    return reference.inner_update(params, grads, LR, clip_norm=clip_norm)


def foreach(params: list[Tensor], grads: list[Tensor], clip_norm: float | None) -> list[Tensor]:
    """Two of PyTorch's list operators (torch._foreach); none exists for clipping by task."""
    if clip_norm is not None:
        factors = reference.clip_coefficients(grads, clip_norm)
        grads = list(torch._foreach_mul(grads, [factors.view(-1, *[1] * (g.dim() - 1)) for g in grads]))
    return list(torch._foreach_sub(params, torch._foreach_mul(grads, LR)))


def make_tensors(tasks: int, hidden: int, layers: int, seed: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Weights and biases of an MLP for each of T tasks, [T, *shape] each."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = [shape for _ in range(layers) for shape in ((hidden, hidden), (hidden,))]
    return [torch.randn(tasks, *shape, generator=generator, device=device) for shape in shapes]
