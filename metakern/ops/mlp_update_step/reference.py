"""Definition of mlp_update_step in plain PyTorch, differentiable to any order; the oracle of every implementation.

Metz et al. 2022, arXiv 2203.11860 ("small_fc_lopt"); µLO (arXiv 2406.00153) and ELO share its features.

Axis legend: M tensors, T tasks, n coordinates of one tensor of one task (a *segment*), ``*shape`` its shape, W hidden
units, K = 3 decays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metakern.ops.mlp_update_step.factors import factored_axes

#: Features of a coordinate, and of a task's step count, in the order of the inputs of the first layer.
TENSOR_FEATURES, TIME_FEATURES = 28, 11

#: Time scales τ of the time features tanh(t/τ - 1).
TIME_SCALES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)

#: Number of decays of m, of v, and of the factors r and c, in the order of ``decays``.
DECAYS = (3, 1, 3)


class Moments(NamedTuple):
    """The state of M tensors.

    Attributes:
        m: moving means of the gradient, [T, 3, *shape] each
        v: moving mean of its square, [T, *shape] each
        r: rows: moving means of its square, averaged over the largest axis, [T, 3, *shape without it] each; with one
            axis [T, 3, n], not averaged
        c: columns: the same over the second largest axis; with one axis [T, 3, 0]
    """

    m: list[Tensor]
    v: list[Tensor]
    r: list[Tensor]
    c: list[Tensor]


def mlp_update_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Moments,
    weights: Sequence[Tensor],
    decays: Tensor,
    rates: Tensor,
    keep: Tensor,
    steps: Tensor,
    exp_mult: float,
) -> tuple[list[Tensor], Moments]:
    """New params and moments; arguments as for :func:`metakern.ops.mlp_update_step.mlp_update_step`."""
    time = time_features(steps, decays.dtype)
    new: list[list[Tensor]] = [[], [], [], [], []]
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        old = (moments.m[i], moments.v[i], moments.r[i], moments.c[i])
        results = _step_of_tensor(p, g, old, weights, decays, (rates[i], keep[i]), time, exp_mult)
        for xs, x in zip(new, results, strict=True):
            xs.append(x)
    return new[0], Moments(*new[1:])


def time_features(steps: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, 11] of the numbers of steps before this one, [T]."""
    scales = torch.tensor(TIME_SCALES, dtype=dtype, device=steps.device)
    return torch.tanh(steps.to(dtype).unsqueeze(-1) / scales - 1)


def _step_of_tensor(
    param: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, ...],
    weights: Sequence[Tensor],
    decays: Tensor,
    factors: tuple[Tensor, Tensor],
    time: Tensor,
    exp_mult: float,
) -> tuple[Tensor, ...]:
    """One tensor [T, *shape]; ``factors`` are those of the update and of the old params, [T] each."""
    p, g = param.to(decays.dtype), grad.to(decays.dtype)
    new = _new_moments(g, moments, decays)
    x = _features(p, g, *new)  # [T, 28, *shape]
    x = x.flatten(2)
    x = x * torch.rsqrt(1e-5 + x.square().mean(-1, keepdim=True))
    inputs = torch.cat([x, time.unsqueeze(-1).expand(-1, -1, x.shape[-1])], 1)
    direction, magnitude = _mlp(inputs, weights).unbind(1)
    rate, keep = (factor.unsqueeze(-1) for factor in factors)
    updated = keep * p.flatten(1) - rate * direction * torch.exp(exp_mult * magnitude)
    return updated.view(p.shape).to(param.dtype), *new


def _new_moments(g: Tensor, moments: tuple[Tensor, ...], decays: Tensor) -> tuple[Tensor, ...]:
    m, v, r, c = moments
    of_m, of_v, of_factors = decays.split(DECAYS)
    squares = g.square() + 1e-30
    axes = factored_axes(g.shape[1:])
    if g.numel() == 0:
        new_r, new_c = r.clone(), c.clone()
    elif axes is None:
        new_r, new_c = _averaged(r, squares, of_factors), c.clone()
    else:
        new_r, new_c = (
            _averaged(old, squares.mean(axis + 1), of_factors) for old, axis in zip((r, c), axes, strict=True)
        )
    return _averaged(m, g, of_m), of_v * v + (1 - of_v) * g.square(), new_r, new_c


def _averaged(old: Tensor, new: Tensor, decays: Tensor) -> Tensor:
    """Moving means [T, K, ...] of ``new`` [T, ...] with the decays [K]."""
    decays = decays.view(-1, *[1] * (new.dim() - 1))
    return decays * old + (1 - decays) * new.unsqueeze(1)


def _features(p: Tensor, g: Tensor, m: Tensor, v: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """The 28 features of every coordinate, [T, 28, *shape], from the new moments."""
    p, g, v = p.unsqueeze(1), g.unsqueeze(1), v.unsqueeze(1)
    axes = factored_axes(p.shape[2:])
    root = torch.rsqrt(v + 1e-6)
    if axes is None:
        rows = columns = r
        of_g, of_m = _safe_rsqrt(r + 1e-9), torch.rsqrt(r + 1e-6)
    else:
        rows, columns = r.unsqueeze(axes.largest + 2), c.unsqueeze(axes.second + 2)
        of_g = of_m = _safe_rsqrt(rows / (rows.mean(axes.second + 2, keepdim=True) + 1e-9)) * _safe_rsqrt(columns)
    lists = [g, p, m, v, m * root, root, g * of_g, rows, columns, torch.rsqrt(rows + 1e-8)]
    lists += [torch.rsqrt(columns + 1e-8), m * of_m]
    return torch.cat([x.expand(*x.shape[:2], *p.shape[2:]) for x in lists], 1)


def _safe_rsqrt(x: Tensor) -> Tensor:
    return torch.rsqrt(x.clamp(min=1e-9))


def _mlp(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """[T, 2, n] of the inputs [T, 39, n]."""
    layers = list(zip(weights[::2], weights[1::2], strict=True))
    for index, (weight, bias) in enumerate(layers):
        x = torch.baddbmm(bias.unsqueeze(-1), weight.expand(x.shape[0], -1, -1), x)
        if index + 1 < len(layers):
            x = torch.relu(x)
    return x
