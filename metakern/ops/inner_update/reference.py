"""inner_update in plain PyTorch: one gradient step for T tasks, each with its own parameters.

Finn et al. 2017, "Model-Agnostic Meta-Learning", arXiv 1703.03400, equation 1. Learned learning rates: per parameter
(Meta-SGD, Li et al. 2017, arXiv 1707.09835), or per tensor and step (LSLR, Antoniou et al. 2018, arXiv 1810.09502).

Axis legend: T tasks, K inner steps, ``*shape`` the shape of one parameter tensor of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def for_norms(x: Tensor) -> Tensor:
    """Cast to float64, which holds the squares of all smaller dtypes; to float32 on Apple's GPUs (no float64)."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def clip_coefficients(grads: Sequence[Tensor], clip_norm: float) -> Tensor:
    """Factors [T] that clip every task's gradient, over all its tensors, to a norm of at most ``clip_norm``.

    min(1, clip_norm / ‖g‖), in the dtype of :func:`for_norms`. For a zero gradient it is 1 with zero derivatives; for
    a NaN norm it is NaN, so that the whole task becomes NaN.
    """
    parts = [for_norms(torch.view_as_real(g) if g.is_complex() else g) for g in grads]
    squares = torch.stack([g.flatten(1).square().sum(1) if g.dim() > 1 else g.square() for g in parts]).sum(0)
    large = ~(squares <= clip_norm**2)  # true for NaN
    # The root is taken only where it is used: its derivative at zero is infinite.
    norms = torch.where(large, squares, torch.ones_like(squares)).sqrt()
    return torch.where(large, clip_norm / norms, torch.ones_like(norms))


def inner_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    lr: float | Tensor | Sequence[Tensor],
    *,
    step: int | None = None,
    clip_norm: float | None = None,
    active: Tensor | None = None,
) -> list[Tensor]:
    """θ' = θ − α ⊙ g for a list of tensors, differentiable to any order in θ, g and α.

    Args:
        params: θ, each [T, *shape]. Without ``clip_norm`` and ``active`` the task axis is not needed: tensors of one
            task, [*shape], may be given.
        grads: g, of the same shapes
        lr: α, a number or a tensor [] for everything, or one tensor per parameter tensor, shared by the tasks: []
            or [*shape] (Meta-SGD); with ``step`` each has one more leading axis: [K] (LSLR) or [K, *shape]
        step: index of the inner step, 0 to K − 1, that selects from the leading axis of ``lr``
        clip_norm: largest norm of a task's gradient, over all its tensors; a longer one is scaled down to it
        active: bool [T], tasks that step; the others keep θ bit for bit, and their g has no effect

    Returns:
        θ', in the order and the shapes of ``params``
    """
    if active is not None:
        grads = [torch.where(_per_task(active, g), g, torch.zeros_like(g)) for g in grads]
    if clip_norm is not None:
        coefficients = clip_coefficients(grads, clip_norm)
        grads = [scaled(coefficients, g) for g in grads]
    rates: list[Any] = list(lr) if isinstance(lr, Sequence) else [lr] * len(params)
    if step is not None:
        rates = [rate[step] for rate in rates]
    updated = [p - rate * g for p, g, rate in zip(params, grads, rates, strict=True)]
    if active is None:
        return updated
    return [torch.where(_per_task(active, p), new, p) for p, new in zip(params, updated, strict=True)]


def scaled(values: Tensor, x: Tensor) -> Tensor:
    """``x`` [T, *shape] times values [T], in x's dtype; the factors are not rounded to float16 first."""
    arithmetic = torch.promote_types(x.dtype, torch.float32)
    return (x.to(arithmetic) * _per_task(values.to(arithmetic), x)).to(x.dtype)


def _per_task(values: Tensor, like: Tensor) -> Tensor:
    """Append axes to ``values`` [T], so that it broadcasts against ``like`` [T, ...]."""
    return values.view(-1, *[1] * (like.dim() - 1))
