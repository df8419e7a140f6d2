"""Which axes of a tensor Adafactor's moving means of squared gradients run over, and their shapes.

Axis legend: ``*shape`` the shape of one parameter tensor of one task; rows and columns as in arXiv 1804.04235.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

#: Ranks of the tensors that the operator takes, without the task axis.
RANKS = range(1, 5)


class FactoredAxes(NamedTuple):
    """Axes of a tensor: the rows r are means over ``largest``, the columns c over ``second``."""

    largest: int
    second: int


def factored_axes(shape: Sequence[int]) -> FactoredAxes | None:
    """The two largest axes; None for a tensor of fewer than two axes, whose squared gradients are kept in full.

    Of axes of the same size, the later one counts as the larger: a stable sort by size, last two. The public code
    sorts with NumPy, whose order of equal sizes depends on the processor.
    """
    if len(shape) < 2:
        return None
    order = sorted(range(len(shape)), key=lambda axis: shape[axis])
    return FactoredAxes(order[-1], order[-2])


def factor_shapes(shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of r and c of a tensor. With one axis, r has the tensor's shape and c is empty."""
    axes = factored_axes(shape)
    if axes is None:
        return tuple(shape), (0,)
    without = [tuple(n for axis, n in enumerate(shape) if axis != gone) for gone in axes]
    return without[0], without[1]
