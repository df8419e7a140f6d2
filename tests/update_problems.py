"""Lists of parameter tensors to update, for the tests of inner_update's implementations on every device.

Axis legend: T tasks, K inner steps, ``*shape`` the shape of one parameter tensor of the model.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from metakern.ops.inner_update import reference

#: Sizes of one task's tensors: tails behind multiples of 4 and of 512, n = 1025 with n // 4 a multiple of 256, and no
#: elements at all.
SHAPES = ((3, 2), (5,), (), (1025,), (0,), (4, 128), (33, 16), (511,))

#: Layouts of α.
RATES = ("number", "shared", "per tensor", "per tensor and step", "per parameter", "per parameter and step")

#: Those of the public function, which takes the step's α out of one tensor [K] itself.
LAYOUTS = (*RATES, "shared and step")

STEPS = 3  # K where α has an axis of inner steps
STEP = 1  # the one that is taken


def draw(
    tasks: int | None,
    dtype: torch.dtype,
    seed: int | torch.Generator,
    shapes: Sequence[Sequence[int]] = SHAPES,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Normal numbers, one tensor for each of ``shapes``, with a leading axis of tasks unless that is None."""
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    leading = () if tasks is None else (tasks,)
    numbers = (torch.randn((*leading, *shape), generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.to(device, dtype) for x in numbers]


def step_of(rates: str) -> int | None:
    """The inner step that an α of this layout asks for."""
    return STEP if rates.endswith("step") else None


def make_rates(
    rates: str, dtype: torch.dtype, seed: int | torch.Generator, shapes: Sequence[Sequence[int]] = SHAPES
) -> list[Tensor]:
    """The tensors of α, none where it is a number."""
    leading = (STEPS,) if rates.endswith("step") else ()
    kind = rates.removesuffix(" and step")
    wanted: list[Sequence[int]] = {"number": [], "shared": [()], "per tensor": [()] * len(shapes)}.get(
        kind, list(shapes)
    )
    return draw(None, dtype, seed, [(*leading, *shape) for shape in wanted])


def make_lr(rates: str, dtype: torch.dtype, shapes: Sequence[Sequence[int]] = SHAPES) -> float | Tensor | list[Tensor]:
    """α as the public function takes it."""
    found = make_rates(rates, dtype, 99, shapes)
    return found[0] if rates.startswith("shared") else found or 0.3


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


@dataclass(frozen=True)
class Update:
    """The operator's arguments."""

    params: list[Tensor]
    grads: list[Tensor]
    lr: list[Tensor] = field(default_factory=list)
    rate: float = 0.3
    step: int = -1
    clip_norm: float | None = None
    active: Tensor | None = None

    def arguments(self) -> tuple[object, ...]:
        """In the operator's order."""
        return self.params, self.grads, self.lr, self.rate, self.step, self.clip_norm, self.active

    def to(self, device: torch.device | str) -> Update:
        """The same on a device."""
        params, grads, lr = ([x.to(device) for x in xs] for xs in (self.params, self.grads, self.lr))
        active = None if self.active is None else self.active.to(device)
        return replace(self, params=params, grads=grads, lr=lr, active=active)

    def run(self, backend: str) -> list[Tensor]:
        """Results of the operator that ``backend`` has, without the public function."""
        if backend == "triton":
            importlib.import_module("metakern.ops.inner_update.triton")
        name = "inner_update_triton" if backend == "triton" else "inner_update"
        results: list[Tensor] = getattr(torch.ops.metakern, name)(*self.arguments())
        return results

    def expected(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The reference's results in ``dtype``; without one, in the dtype that each tensor's arithmetic has."""

        def wide(x: Tensor) -> Tensor:
            arithmetic = torch.promote_types(x.dtype, torch.float32)
            return x.to(arithmetic if dtype is None else dtype)

        rates: list[float] | list[Tensor] = [self.rate] * len(self.params)
        if self.lr:
            tensors = [wide(x) if self.step < 0 else wide(x)[self.step] for x in self.lr]
            rates = tensors * len(self.params) if len(tensors) == 1 else tensors
        params, grads = ([wide(x) for x in xs] for xs in (self.params, self.grads))
        return reference.inner_update(params, grads, rates, clip_norm=self.clip_norm, active=self.active)


def make_update(
    tasks: int = 3,
    rates: str = "number",
    dtype: torch.dtype = torch.float32,
    *,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    clip_norm: float | None = None,
    resting: Sequence[int] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Update:
    """Random numbers; ``resting`` are the tasks that do not step, whose gradients are NaN."""
    generator = torch.Generator().manual_seed(seed)
    params, grads = (draw(tasks, dtype, generator, shapes, device) for _ in range(2))
    lr = [x.to(device) for x in make_rates(rates, dtype, generator, shapes)]
    active = None
    if resting is not None:
        active = torch.tensor([task not in resting for task in range(tasks)], dtype=torch.bool, device=device)
        for g in grads:
            g[~active] = torch.nan
    step = step_of(rates)
    return Update(params, grads, lr, 0.3, -1 if step is None else step, clip_norm, active)
