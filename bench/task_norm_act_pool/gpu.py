"""Batch norm, activation and pooling of many tasks on a GPU, against PyTorch's operators by task and by channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from bench.gpu_cells import Cell, Cells, Limits
from bench.gpu_device import Device
from bench.task_norm_act_pool.contenders import PASSES, Block, Problem, by_channels, by_kernels, by_loop, prepared
from bench.timing import Calls


@dataclass(frozen=True)
class Case:
    """One of the three passes of a block."""

    block: Block
    which: str

    @property
    def title(self) -> str:
        """The case in words."""
        return f"{self.block.name}, {self.which}"


def pool_cell(case: Case, device: Device, limits: Limits, **_: Any) -> Cell:
    """The cell of a pass with its contenders; nothing is compiled."""
    cell = Cell(case.title, device, limits)
    problem = Problem.make(case.block, seed=0).to(device.torch_device)

    def make(run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Calls, Callable[[], list[Tensor]]]:
        call = prepared(problem, run, case.which)
        return [call], lambda: [x.clone() for x in call()]

    for name, run in {"loop": by_loop, "channels": by_channels}.items():
        cell.admit(name, partial(make, run), ours=False)
    for backend in device.backends:
        if backend != "reference":
            cell.admit(backend, partial(make, partial(by_kernels, backend=backend)), ours=True)
    return cell


#: The first block of conv4 on 28 x 28 images.
BLOCK = Block("conv4 28, 32 tasks", 32, 25, 64, 28)
SMALL = Block("small", 2, 2, 3, 6)

CELLS = Cells(
    tuple(Case(BLOCK, which) for which in PASSES),
    tuple(Case(SMALL, which) for which in PASSES[1:]),
    pool_cell,
)
