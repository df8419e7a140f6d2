"""Results and gradients of a problem by the Triton operators, under the names that tests/problems.py uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metakern.ops import LSTMState, pack_state, unpack_state
from metakern.ops.lstm_step import reference
from tests.conftest import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close
from tests.problems import Problem, evaluate_reference, weight_names


def options(problem: Problem, precision: int = 0) -> tuple[Any, ...]:
    """The last arguments of the operators."""
    o = problem.options
    return reference.PREPROCESS.index(o["preprocess"]), o["preprocess_scale"], o["output_scale"], precision


def forward(problem: Problem, precision: int = 0, state: Tensor | None = None) -> dict[str, Tensor]:
    """Named results, and the new state as it is stored."""
    state = problem.state.data if state is None else state
    new_params, new_state = torch.ops.metakern.lstm_step_triton(
        problem.params, problem.grads, state, problem.weights, *options(problem, precision)
    )
    h, c = unpack_state(LSTMState(new_state, problem.params.numel()))
    return {"new params": new_params, "new h": h, "new c": c, "new state": new_state}


def backward(problem: Problem, state: Tensor | None = None, grad_new_state: Tensor | None = None) -> dict[str, Tensor]:
    """Named gradients, and that of the state as it is stored."""
    state = problem.state.data if state is None else state
    if grad_new_state is None:
        grad_new_state = pack_state(*problem.cotangents[1:]).data.to(state.dtype)
    grad_grads, grad_state, grad_weights = torch.ops.metakern.lstm_step_triton_backward(
        problem.cotangents[0], grad_new_state, problem.grads, state, problem.weights, *options(problem)
    )
    h, c = unpack_state(LSTMState(grad_state, problem.params.numel()))
    named = dict(zip(weight_names(problem.h.shape[0]), grad_weights, strict=True))
    gradients = {"grads": grad_grads, "h": h, "c": c, **named}
    return {f"gradient of {name}": x for name, x in gradients.items()} | {"gradient of state": grad_state}


def assert_matches_reference(problem: Problem) -> None:
    """Hold results and every gradient to the float64 reference, by the table in tests/conftest.py."""
    results, gradients = forward(problem), backward(problem)
    expected, expected_gradients = evaluate_reference(problem)
    for name, want in expected.items():
        assert_close(name, results[name].cpu(), want.cpu(), FORWARD_TOLERANCE[results[name].dtype])
    for name, want in expected_gradients.items():
        if name != "gradient of params":  # the operator leaves it to the formula: it is that of the new params
            assert_close(name, gradients[name].cpu(), want.cpu(), GRADIENT_TOLERANCE[gradients[name].dtype])
