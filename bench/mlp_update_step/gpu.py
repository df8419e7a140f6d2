"""One step of a per-parameter MLP optimizer on a GPU, against its definition in PyTorch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bench.gpu_cells import Cell, Cells, Limits
from bench.gpu_device import Device
from bench.mlp_update_step.contenders import EXP_MULT, Case, Step, eager, leaves, make_arguments
from bench.timing import Calls
from metakern.ops import mlp_update_step

#: A million parameters: convolutions, matrices and biases.
SHAPES = ((64, 64, 3, 3), (128, 64, 3, 3), (1024, 512), (512, 700), (1024,), (512,))


def fused(backend: str, *arguments: Any) -> list[Tensor]:
    """metakern.ops.mlp_update_step by a backend."""
    new, moments = mlp_update_step(*arguments, exp_mult=EXP_MULT, backend=backend)
    return [*new, *(x for xs in moments for x in xs)]


def step_cell(case: Case, device: Device, limits: Limits, *, compiled: bool) -> Cell:
    """The cell of a step with its contenders."""
    cell = Cell(case.title, device, limits)
    arguments = pytree.tree_map(lambda x: x.to(device.torch_device), make_arguments(case, 0, torch.float32))
    inputs = [x.requires_grad_() for x in leaves(arguments)] if case.backward else []

    def make(step: Step) -> tuple[Calls, Callable[[], list[Tensor]]]:
        def call() -> Sequence[Tensor]:
            results = [x for x in step(*arguments) if x.numel()]
            return torch.autograd.grad(results, inputs, [x.detach() for x in results]) if inputs else results

        return [call], lambda: [x.detach().clone() for x in call()]

    cell.admit("eager", partial(make, eager), ours=False)
    for backend in device.backends:
        if backend != "reference":
            cell.admit(backend, partial(make, partial(fused, backend)), ours=True)
    if compiled:
        peer = torch.compile(eager, fullgraph=True, dynamic=False, **device.graph_options)
        cell.admit("compiled", partial(make, peer), ours=False)
    return cell


CELLS = Cells(
    (
        Case("1e6 parameters", SHAPES),
        Case("1e6 parameters", SHAPES, backward=True),
        Case("1e6 parameters", SHAPES, width=4),
    ),
    (Case("two tensors", ((3, 2), (4,)), width=4),),
    step_cell,
)
