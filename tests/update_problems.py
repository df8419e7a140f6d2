"""Lists of parameter tensors to update, for the tests of inner_update's implementations on every device.

Axis legend: T tasks, K inner steps, ``*shape`` the shape of one parameter tensor of the model.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from metakern.ops.inner_update import reference

#: Sizes of one task's tensors: tails behind multiples of 4 and of 512, n = 1025 with n // 4 a multiple of 256, and no
#: elements at all.
SHAPES = ((3, 2), (5,), (), (1025,), (0,), (4, 128), (33, 16), (511,))

#: Layouts of α.
RATES = ("number", "shared", "per tensor", "per tensor and step", "per parameter", "per parameter and step")

STEPS = 3


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

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    params = [draw(tasks, *shape) for shape in shapes]
    grads = [draw(tasks, *shape) for shape in shapes]
    leading = (STEPS,) if rates.endswith("step") else ()
    lr = {
        "number": [],
        "shared": [draw(*leading)],
        "per tensor": [draw(*leading) for _ in shapes],
        "per parameter": [draw(*leading, *shape) for shape in shapes],
    }[rates.removesuffix(" and step")]
    active = None
    if resting is not None:
        active = torch.tensor([task not in resting for task in range(tasks)], dtype=torch.bool, device=device)
        for g in grads:
            g[~active] = torch.nan
    return Update(params, grads, lr, 0.3, 1 if leading else -1, clip_norm, active)
