"""Warnings of every operator point at the user's line, and come once per cause."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from metakern import FallbackWarning
from metakern.core import backend as _backend
from metakern.ops import (
    LSTMState,
    hrnn_step,
    inner_update,
    lstm_step,
    lstm_step_,
    lstm_step_staged,
    mlp_inner_loop,
    mlp_meta_loss,
    mlp_update_step,
    task_conv2d,
    task_conv2d_input,
    task_conv2d_weight,
    task_norm_act_pool,
)
from metakern.ops.core.registry import operators
from metakern.ops.hrnn_step.reference import weight_shapes
from metakern.ops.hrnn_step.stacked import hrnn_step_stacked
from metakern.ops.lstm_step.stacked import lstm_step_stacked
from metakern.ops.mlp_update_step import Moments
from metakern.ops.mlp_update_step.stacked import mlp_update_step_stacked

ONES = [torch.ones(3, 1, 2), torch.ones(3, 1)]
SET = torch.ones(3, 4, 2), torch.ones(3, 4, 1)
WEIGHTS = [w.detach() for w in (*torch.nn.LSTM(2, 4).parameters(), *torch.nn.Linear(4, 1).parameters())]
STATE = LSTMState.zeros(5, hidden_size=4, num_layers=1)

STAGES: dict[str, Any] = {"features": "log_sign", "head": "add"}

HRNN = [torch.ones(3, 21, 2), torch.ones(3, 21, 1)], torch.zeros(2, 3, 30), torch.zeros(3)
HRNN_WEIGHTS = [torch.ones(tuple(shape)) for shape in weight_shapes(10, attention=False)]

MOMENTS = Moments(
    m=[torch.ones(3, 3, 1, 2), torch.ones(3, 3, 1)],
    v=ONES,
    r=[torch.ones(3, 3, 1), torch.ones(3, 3, 1)],
    c=[torch.ones(3, 3, 2), torch.ones(3, 3, 0)],
)
MLP_WEIGHTS = [torch.ones(4, 39), torch.ones(4), torch.ones(2, 4), torch.ones(2)]
MLP_NUMBERS = torch.ones(7), torch.ones(2, 3), torch.ones(2, 3), torch.zeros(3, dtype=torch.int64)

#: Three copies of the weights, of 32 coordinates each for lstm_step.
TILES = torch.ones(96), torch.ones(96), LSTMState.zeros(96, hidden_size=4, num_layers=1)
ROWS = {"stage_state": torch.ones(3, 0, 32), "coordinate_inputs": torch.ones(0, 96)}

IMAGES, FILTERS = torch.ones(2, 3, 1, 4, 4), torch.ones(2, 5, 1, 3, 3)
SIZES = torch.ones(2, 3, 5, 2, 2)


def copies(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    return [w.expand(3, *w.shape) for w in weights]


#: One call of each public operator, which are those with a reference.
CALLS: dict[str, Callable[[], Any]] = {
    "hrnn_step": lambda: hrnn_step(ONES, ONES, *HRNN, HRNN_WEIGHTS),
    "inner_update": lambda: inner_update(ONES, ONES, 0.1),
    "lstm_step": lambda: lstm_step(torch.ones(5), torch.ones(5), STATE, WEIGHTS),
    "lstm_step_": lambda: lstm_step_(torch.ones(5), torch.ones(5), STATE.clone(), WEIGHTS),
    "lstm_step_staged": lambda: lstm_step_staged(torch.ones(5), torch.ones(5), STATE, WEIGHTS, **STAGES),
    "mlp_inner_loop": lambda: mlp_inner_loop(ONES, *SET, lr=0.1, steps=1),
    "mlp_meta_loss": lambda: mlp_meta_loss(ONES, SET, SET, lr=0.1, steps=1),
    "mlp_update_step": lambda: mlp_update_step(ONES, ONES, MOMENTS, MLP_WEIGHTS, *MLP_NUMBERS),
    "hrnn_step_stacked": lambda: hrnn_step_stacked(ONES, ONES, *HRNN, copies(HRNN_WEIGHTS)),
    "lstm_step_stacked": lambda: lstm_step_stacked(*TILES, copies(WEIGHTS), **STAGES, **ROWS),
    "mlp_update_step_stacked": lambda: mlp_update_step_stacked(
        *(ONES, ONES, MOMENTS, copies(MLP_WEIGHTS), torch.ones(3, 7), *MLP_NUMBERS[1:])
    ),
    "task_conv2d": lambda: task_conv2d(IMAGES, FILTERS),
    "task_conv2d_input": lambda: task_conv2d_input(SIZES, FILTERS, (4, 4)),
    "task_conv2d_weight": lambda: task_conv2d_weight(IMAGES, SIZES, (3, 3)),
    "task_norm_act_pool": lambda: task_norm_act_pool(IMAGES),
}


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_warned", set())
    monkeypatch.setattr(_backend, "missing", lambda name, device: f"{name} is missing in this test")


def caught(call: Callable[[], Any]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [warning for warning in found if warning.category is FallbackWarning]


def test_every_public_operator_is_called_here() -> None:
    public = {
        name for name, operator in operators().items() if operator.reference is not None and not name.startswith("toy")
    }
    assert public <= CALLS.keys()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("without_kernels")
def test_a_warning_points_at_the_line_of_the_call(name: str) -> None:
    line = inspect.getsourcelines(CALLS[name])[1]
    (warning,) = caught(CALLS[name])
    assert (warning.filename, warning.lineno) == (__file__, line)
    assert "cpp is missing in this test" in str(warning.message)
    assert not caught(CALLS[name])  # once per cause


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("without_kernels")
def test_a_warning_inside_torch_compile_points_at_the_line_that_is_traced(name: str) -> None:
    torch.compiler.reset()
    line = inspect.getsourcelines(CALLS[name])[1]
    (warning,) = caught(torch.compile(lambda: CALLS[name](), backend="eager", fullgraph=True))
    assert (warning.filename, warning.lineno) == (__file__, line)
