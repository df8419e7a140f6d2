"""Convolutions with weights of every task's own on a GPU, against a loop of cuDNN's and one grouped convolution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from bench.gpu_cells import Cell, Cells, Limits
from bench.gpu_device import Device
from bench.task_conv2d.contenders import MAPS, Layer, Problem, by_groups, by_kernels, by_loop
from bench.timing import Calls


@dataclass(frozen=True)
class Case:
    """One of the three maps of a layer."""

    layer: Layer
    which: str

    @property
    def title(self) -> str:
        """The case in words."""
        return f"{self.layer.name}, {self.which}"


def conv_cell(case: Case, device: Device, limits: Limits, **_: Any) -> Cell:
    """The cell of a map with its contenders; nothing is compiled."""
    cell = Cell(case.title, device, limits)
    problem = Problem.make(case.layer, seed=0).to(device.torch_device)

    def make(run: Callable[[Problem, str], list[Tensor]]) -> tuple[Calls, Callable[[], list[Tensor]]]:
        call = partial(run, problem, case.which)
        return [call], lambda: [x.clone() for x in call()]

    for name, run in {"loop": by_loop, "grouped": by_groups}.items():
        cell.admit(name, partial(make, run), ours=False)
    for backend in device.backends:
        if backend != "reference":
            cell.admit(backend, partial(make, partial(by_kernels, backend=backend)), ours=True)
    return cell


#: The second layer of conv4 on 28 x 28 images.
LAYER = Layer("conv4 28, 32 tasks", 32, 25, 64, 64, 14)
SMALL = Layer("small", 2, 2, 3, 8, 6)

CELLS = Cells(
    tuple(Case(LAYER, which) for which in MAPS),
    (Case(SMALL, "y"), Case(SMALL, "gradient by weight")),
    conv_cell,
)
