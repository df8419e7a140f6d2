"""inner_update on a GPU, against PyTorch's operators for lists and a compiled loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu_cells import Cell, Cells, Limits
from bench.gpu_device import Device
from bench.inner_update.contenders import foreach, fused, loop, make_tensors
from bench.timing import Calls


@dataclass(frozen=True)
class UpdateCase:
    """A list of tensors: weights and biases of an MLP for T tasks."""

    tasks: int
    hidden: int
    layers: int
    clip_norm: float | None = None
    backward: bool = False

    @property
    def title(self) -> str:
        """The case in words."""
        what = "forward + backward" if self.backward else "forward"
        clipped = ", clipped" if self.clip_norm is not None else ""
        return f"{what}{clipped}, T = {self.tasks}, {self.layers} layers of {self.hidden}"


FULL = (
    UpdateCase(32, 256, 4),
    UpdateCase(32, 256, 4, backward=True),
    UpdateCase(32, 256, 4, clip_norm=1.0),
    UpdateCase(25, 40, 3),
    UpdateCase(25, 40, 3, backward=True),
    UpdateCase(25, 40, 3, clip_norm=1.0),
)
DRY = (UpdateCase(2, 4, 2), UpdateCase(3, 4, 1, clip_norm=1.0, backward=True))


def update_cell(case: UpdateCase, device: Device, limits: Limits, *, compiled: bool) -> Cell:
    """The cell of a list update, with its contenders."""
    cell = Cell(case.title, device, limits)
    size = case.tasks, case.hidden, case.layers
    params, grads, cotangents = (make_tensors(*size, seed, device.torch_device) for seed in range(3))
    leaves = [x.requires_grad_(case.backward) for x in (*params, *grads)]

    def make(update: Any) -> tuple[Calls, Callable[[], list[Tensor]]]:
        def call() -> Sequence[Tensor]:
            updated: list[Tensor] = update(params, grads, case.clip_norm)
            return torch.autograd.grad(updated, leaves, cotangents) if case.backward else updated

        return [call], lambda: [x.detach().clone() for x in call()]

    cell.admit("foreach", partial(make, foreach), ours=False)
    for backend in device.backends:
        cell.admit(backend, partial(make, fused(backend)), ours=True)
    if compiled:
        peer = torch.compile(loop, fullgraph=True, dynamic=False, **device.graph_options)
        cell.admit("compiled", partial(make, peer), ours=False)
    return cell


CELLS = Cells(FULL, DRY, update_cell)
