"""One step of the hierarchical RNN on a GPU, against its definition in PyTorch, eager and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.gpu_cells import Cell, Cells, Limits
from bench.gpu_device import Device
from bench.hrnn_step.contenders import Contender, Problem
from bench.timing import Calls
from metakern.ops.hrnn_step import hrnn_step, reference


@dataclass(frozen=True)
class StepCase:
    """Tensors of T tasks, by the coordinates of one task."""

    sizes: tuple[int, ...]
    tasks: int = 1
    backward: bool = False

    @property
    def title(self) -> str:
        """The case in words."""
        tensors = f"{len(self.sizes)} tensors of {self.sizes[0]:,}"
        tasks = f", T = {self.tasks}" if self.tasks > 1 else ""
        return f"{'forward + backward' if self.backward else 'forward'}, {tensors}{tasks}"


def on_device(problem: Problem, device: torch.device) -> Problem:
    """The same problem there."""
    moved = copy.copy(problem)
    for name, value in vars(problem).items():
        setattr(moved, name, [x.to(device) for x in value] if isinstance(value, list) else value.to(device))
    return moved


def step_cell(case: StepCase, device: Device, limits: Limits, *, compiled: bool) -> Cell:
    """The cell of a step with its contenders."""
    cell = Cell(case.title, device, limits)
    problem = on_device(Problem.make(case.sizes, case.tasks, 0), device.torch_device)
    call = problem.forward_backward if case.backward else problem.forward

    def make(contender: Contender) -> tuple[Calls, Callable[[], list[Tensor]]]:
        return [partial(call, contender)], lambda: [x.detach().clone() for x in call(contender)]

    cell.admit("eager", partial(make, reference.hrnn_step), ours=False)
    for backend in device.backends:
        if backend != "reference":
            cell.admit(backend, partial(make, partial(hrnn_step, backend=backend)), ours=True)
    if compiled:
        peer = torch.compile(reference.hrnn_step, fullgraph=True, dynamic=False, **device.graph_options)
        cell.admit("compiled", partial(make, peer), ours=False)
    return cell


CELLS = Cells(
    (
        StepCase((250_000,) * 4),
        StepCase((250_000,) * 4, backward=True),
        StepCase((1000,) * 10),
    ),
    (StepCase((30, 30), tasks=2),),
    step_cell,
)
