"""The factors R and C of a tensor on a GPU: places, tables and their gradients, by PyTorch.

These have one entry a row or column of a tensor. What has one a coordinate is left to the Triton kernels, but for means
of squared gradients and sums over an axis, which PyTorch's reductions take at the speed of memory; none of them uses
atomic additions.

Axis legend: T tasks, K = 3 decays; r is [T, K, *shape without its largest axis], c without the second largest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metakern.ops.mlp_update_step.factors import FactoredAxes, factored_axes

#: Kinds of segments, as in triton_features.py.
FULL, LARGEST_LAST, LARGEST_FIRST = range(3)


class Geometry(NamedTuple):
    """Where the coordinates of a segment lie in r and c; see ``triton_features.places``."""

    kind: int
    n: int
    rows: int
    columns: int
    span: int
    inner: int
    middle: int
    joint: int

    @classmethod
    def of(cls, shape: Sequence[int]) -> Geometry:
        """That of one tensor of one task."""
        n, axes = math.prod(shape), factored_axes(shape)
        if axes is None:
            return cls(FULL, n, n, n, n, 1, 1, 1)
        first, second = sorted(axes)
        inner, middle = math.prod(shape[second + 1 :]), math.prod(shape[first + 1 : second])
        kind = LARGEST_LAST if axes.largest == second else LARGEST_FIRST
        rows, columns = (n // shape[axis] for axis in axes)
        return cls(kind, n, rows, columns, shape[second] * inner, inner, middle, shape[first] * middle)

    @property
    def wide(self) -> bool:
        """Whether coordinates take 64-bit divisions."""
        return self.n >= 2**31


class Factors(NamedTuple):
    """The factors R and C, of the shapes of r and c."""

    rows: Tensor
    columns: Tensor


def mean_squares(grad: Tensor, axes: FactoredAxes, dtype: torch.dtype) -> list[Tensor]:
    """Means of g² + 1e-30 over the largest and the second largest axis of [T, *shape], without these axes."""
    squares = grad.to(dtype).square()
    return [squares.mean(axis + 1) + 1e-30 for axis in axes]


def _per_decay(decays: Tensor, like: Tensor) -> Tensor:
    """The factors' decays along axis 1."""
    return decays[4:].view(1, 3, *[1] * (like.dim() - 2))


def averaged(old: Tensor, new: Tensor, decays: Tensor) -> Tensor:
    """Moving means [T, K, ...] of ``new`` [T, ...]."""
    decay = _per_decay(decays, old)
    return decay * old + (1 - decay) * new.unsqueeze(1)


def _ratio(r: Tensor, axes: FactoredAxes) -> tuple[Tensor, Tensor]:
    """Rows as [T, K, *shape] with a largest axis of 1, and their mean over the second largest axis + 1e-9."""
    rows = r.unsqueeze(axes.largest + 2)
    return rows, rows.mean(axes.second + 2, keepdim=True) + 1e-9


def factors(r: Tensor, c: Tensor, axes: FactoredAxes) -> Factors:
    """R and C from the new r and c."""
    rows, mean = _ratio(r, axes)
    found = (rows / mean).clamp(min=1e-9).rsqrt()
    return Factors(found.squeeze(axes.largest + 2).contiguous(), c.clamp(min=1e-9).rsqrt())


class FactorGradients(NamedTuple):
    """Gradients of the old r and c; per coordinate the factor of 2g in that of g; those of the decays."""

    r: Tensor
    c: Tensor
    slope: Tensor
    decays: Tensor


def factors_backward(
    by_factors: Tensor,
    above: tuple[Tensor, Tensor],
    old: tuple[Tensor, Tensor],
    new_r: Tensor,
    grad: Tensor,
    decays: Tensor,
) -> FactorGradients:
    """Gradients of r and c of one tensor, in float64 but for what has an entry a coordinate.

    ``by_factors`` [T, 9, *shape]: what a coordinate adds to the gradients of R, of r but through R, and of c.
    ``above``: those of the new r and c, which come from elsewhere.
    """
    axes = factored_axes(grad.shape[1:])
    assert axes is not None
    by_factor, by_row = by_factors[:, :6].sum(axes.largest + 2, keepdim=True, dtype=torch.float64).split(3, 1)
    by_column = by_factors[:, 6:].sum(axes.second + 2, dtype=torch.float64)
    rows, mean = _ratio(new_r.double(), axes)
    ratio = rows / mean
    by_ratio = torch.where(ratio < 1e-9, 0.0, -0.5 * by_factor * ratio.clamp(min=1e-9).pow(-1.5))
    by_mean = -(by_ratio * rows).sum(axes.second + 2, keepdim=True) / mean.square()
    by_row = by_row + by_ratio / mean + by_mean / rows.shape[axes.second + 2]
    found, sums, slope = [], decays.new_zeros(3, dtype=torch.float64), grad.new_zeros((), dtype=decays.dtype)
    squares = mean_squares(grad, axes, decays.dtype)
    for axis, by, upstream, x, square in zip(
        axes, (by_row.squeeze(axes.largest + 2), by_column), above, old, squares, strict=True
    ):
        total = by + upstream
        decay = _per_decay(decays, x).double()
        found.append((total * decay).to(x.dtype))
        sums += (total * (x.double() - square.double().unsqueeze(1))).transpose(0, 1).flatten(1).sum(1)
        of_square = (total * (1 - decay)).sum(1) / grad.shape[axis + 1]
        slope = slope + of_square.to(decays.dtype).unsqueeze(axis + 1)
    return FactorGradients(found[0], found[1], slope, sums)
