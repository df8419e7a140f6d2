"""RNNProp's and Meta-LSTM's steps on a GPU, the kernels of lstm_step with other stages, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.gpu_cells import Cell, Cells, Limits
from bench.gpu_device import Device
from bench.lstm_step.work import HIDDEN, LAYERS
from bench.timing import Calls
from metakern.ops import LSTMState, lstm_step_staged, pack_state, unpack_state
from metakern.ops.lstm_step import reference
from metakern.ops.lstm_step.state import pack_rows, unpack_rows

#: Features and head by the rule that they belong to.
STAGES = {"RNNProp": ("moments", "tanh"), "Meta-LSTM": ("log_sign_with_loss", "gates")}


@dataclass(frozen=True)
class StageCase:
    """One step of N coordinates by a rule."""

    rule: str
    n: int
    backward: bool = False

    @property
    def title(self) -> str:
        """The case in words."""
        return f"{self.rule}, {'forward + backward' if self.backward else 'forward'}, N = {self.n:,}"


class Step:
    """A step's inputs, and its calls by a backend."""

    def __init__(self, case: StageCase, device: torch.device) -> None:
        self.features, self.head = STAGES[case.rule]
        first, last = reference.FEATURES[self.features], reference.HEADS[self.head]
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) * 0.1).to(device)

        n = self.n = case.n
        shapes = [(4 * HIDDEN, HIDDEN), (4 * HIDDEN, HIDDEN), (4 * HIDDEN,), (4 * HIDDEN,)] * LAYERS
        shapes[0] = 4 * HIDDEN, first.inputs
        shapes += [(last.outputs, HIDDEN), (last.outputs,), *((s.weights,) for s in (first, last) if s.weights)]
        self.weights = [draw(*shape) for shape in shapes]
        self.params, self.grads = draw(n), draw(n)
        self.state = pack_state(draw(LAYERS, n, HIDDEN), draw(LAYERS, n, HIDDEN))
        self.rows = pack_rows(draw(first.states + last.states, n).abs())
        self.inputs = draw(first.coordinate_inputs + last.coordinate_inputs, n).abs()
        self.leaves = [self.params, self.grads, *self.weights] if case.backward else []
        for x in self.leaves:
            x.requires_grad_()

    def results(self, backend: str) -> list[Tensor]:
        """New params, state and stage state; with leaves, the gradients of the first."""
        new_params, state, rows = lstm_step_staged(
            *(self.params, self.grads, self.state, self.weights),
            features=self.features,
            head=self.head,
            stage_state=self.rows,
            coordinate_inputs=self.inputs,
            backend=backend,
        )
        if self.leaves:
            return list(torch.autograd.grad(new_params.sum(), self.leaves))
        return [new_params, state.data, rows]

    def visible(self, results: list[Tensor]) -> list[Tensor]:
        """The results without the lanes after the last coordinate."""
        if self.leaves:
            return results
        params, state, rows = results
        return [params, *unpack_state(LSTMState(state, self.n)), unpack_rows(rows, self.n)]


def stage_cell(case: StageCase, device: Device, limits: Limits, *, compiled: bool) -> Cell:
    """The cell of a step with its contenders."""
    cell, step = Cell(case.title, device, limits), Step(case, device.torch_device)

    def make(call: Callable[[], list[Tensor]]) -> tuple[Calls, Callable[[], list[Tensor]]]:
        return [call], lambda: [x.detach().clone() for x in step.visible(call())]

    eager = partial(step.results, "reference")
    cell.admit("eager", partial(make, eager), ours=False)
    for backend in device.backends:
        if backend != "reference":
            cell.admit(backend, partial(make, partial(step.results, backend)), ours=True)
    if compiled and not case.backward:  # torch.compile does not trace autograd.grad
        cell.admit("compiled", partial(make, torch.compile(eager, **device.graph_options)), ours=False)
    return cell


CELLS = Cells(
    (
        *(StageCase(rule, 10**6) for rule in STAGES),
        *(StageCase(rule, 10**6, backward=True) for rule in STAGES),
    ),
    (StageCase("RNNProp", 40), StageCase("Meta-LSTM", 33, backward=True)),
    stage_cell,
)
