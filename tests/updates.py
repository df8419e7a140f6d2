"""Lists of tensors to update, every layout of α, and what the float64 reference makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metakern.ops.inner_update import reference

STEPS = 3  # K where α has an axis of inner steps
STEP = 1  # the one that is taken

#: Layouts of α.
LAYOUTS = (
    "number",
    "tensor",
    "tensor and step",
    "per tensor",
    "per tensor and step",
    "per parameter",
    "per parameter and step",
)

#: Of one task: sizes that fill no vector, a tensor of one number, an empty one, tails behind whole tiles.
SHAPES: tuple[tuple[int, ...], ...] = ((3, 2), (1,), (), (1023,), (1025,), (0,))


def draw(tasks: int | None, dtype: torch.dtype, seed: int, shapes: Sequence[Sequence[int]] = SHAPES) -> list[Tensor]:
    """Normal numbers, one tensor for each of ``shapes``, with a leading axis of tasks unless that is None."""
    generator = torch.Generator().manual_seed(seed)
    leading = () if tasks is None else (tasks,)
    return [torch.randn((*leading, *shape), generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def make_lr(layout: str, dtype: torch.dtype, shapes: Sequence[Sequence[int]] = SHAPES) -> Any:
    """α of a layout."""
    generator = torch.Generator().manual_seed(99)
    steps = (STEPS,) if layout.endswith("step") else ()

    def rate(*shape: int) -> Tensor:
        return torch.rand((*steps, *shape), generator=generator, dtype=torch.float64).to(dtype)

    if layout == "number":
        return 0.3
    if layout.startswith("tensor"):
        return rate()
    return [rate(*shape) if "parameter" in layout else rate() for shape in shapes]


def step_of(layout: str) -> int | None:
    """The inner step that an α of this layout asks for."""
    return STEP if layout.endswith("step") else None


def expected(params: Sequence[Tensor], grads: Sequence[Tensor], lr: Any, **options: Any) -> list[Tensor]:
    """The reference in float64."""
    wide = [x.double() for x in lr] if isinstance(lr, list) else lr.double() if isinstance(lr, Tensor) else lr
    return reference.inner_update([p.double() for p in params], [g.double() for g in grads], wide, **options)


def with_nan(tensors: Sequence[Tensor], task: int) -> list[Tensor]:
    """Copies whose first elements are NaN in one task."""
    copies = [x.clone() for x in tensors]
    for x in copies:
        x[task].flatten()[:1] = math.nan
    return copies
