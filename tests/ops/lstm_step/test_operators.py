"""lstm_step's operators called directly, past Python's checks: what they refuse, and that memory is guarded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from metakern.ops import lstm_step, lstm_step_, pack_state
from tests.conftest import assert_same_bits
from tests.problems import Problem, make_problem

N, H, L = 37, 5, 2


def operator_arguments() -> list[Any]:
    problem = make_problem(N, H, L)
    return [problem.params, problem.grads, problem.state.data, problem.weights, 1, 10.0, 0.1, 0]


STATE = "state.data must have shape [2, L, 2, H, 32] for N = 37, got "
SIZES = "state must have 1 to 3 layers and 1 to 64 hidden units, got "

# Position and change of an argument of a good call, the error, and what it says: the words of the public function.
BAD_DIRECT: dict[str, tuple[int, Callable[[Any], Any], type[Exception], str]] = {
    "params shape": (0, lambda x: x[:-1], ValueError, "grads must have the shape of params, [36], got [37]"),
    "params dtype": (
        0,
        Tensor.double,
        TypeError,
        "grads must have the dtype of params, torch.float64, got torch.float32",
    ),
    "state rank": (2, lambda x: x[0], ValueError, STATE + "[2, 2, 5, 32]"),
    "state tiles": (2, lambda x: x[:1], ValueError, STATE + "[1, 2, 2, 5, 32]"),
    "state lanes": (2, lambda x: x[..., :16], ValueError, STATE + "[2, 2, 2, 5, 16]"),
    "state of h alone": (2, lambda x: x[:, :, :1], ValueError, STATE + "[2, 2, 1, 5, 32]"),
    "state dtype": (2, Tensor.double, TypeError, "state must be torch.float32 for torch.float32 params, got torch.flo"),
    "state layers": (2, lambda x: x.repeat(1, 2, 1, 1, 1), ValueError, SIZES + "4 and 5"),
    "state without layers": (2, lambda x: x[:, :0], ValueError, SIZES + "0 and 5"),
    "state units": (2, lambda x: x.repeat(1, 1, 1, 13, 1), ValueError, SIZES + "2 and 65"),
    "state without units": (2, lambda x: x[:, :, :, :0], ValueError, SIZES + "2 and 0"),
    "bfloat16 state": (2, Tensor.bfloat16, RuntimeError, "state must be torch.float32 on the CPU"),
    "weights count": (
        3,
        lambda ws: ws[:9],
        ValueError,
        "weights must hold 4 tensors a layer and 2 of the head, 10 for the state's 2 layers, got 9",
    ),
    "weight_ih shape": (
        3,
        lambda ws: [ws[0][:, :1], *ws[1:]],
        ValueError,
        "weights[0] (weight_ih_l0) must have shape [20, 2], got [20, 1]",
    ),
    "weight_hh shape": (
        3,
        lambda ws: [ws[0], ws[1][:4], *ws[2:]],
        ValueError,
        "weights[1] (weight_hh_l0) must have shape [20, 5], got [4, 5]",
    ),
    "bias_ih shape": (
        3,
        lambda ws: [*ws[:2], ws[2][:4], *ws[3:]],
        ValueError,
        "weights[2] (bias_ih_l0) must have shape [20], got [4]",
    ),
    "bias_hh shape": (
        3,
        lambda ws: [*ws[:7], ws[7][:4], *ws[8:]],
        ValueError,
        "weights[7] (bias_hh_l1) must have shape [20], got [4]",
    ),
    "head weight shape": (
        3,
        lambda ws: [*ws[:8], ws[8][0], ws[9]],
        ValueError,
        "weights[8] (head.weight) must have shape [1, 5], got [5]",
    ),
    "head bias shape": (
        3,
        lambda ws: [*ws[:9], ws[9][:0]],
        ValueError,
        "weights[9] (head.bias) must have shape [1], got [0]",
    ),
    "weight dtype": (
        3,
        lambda ws: [*ws[:9], ws[9].double()],
        TypeError,
        "weights[9] (head.bias) must be torch.float32, got torch.float64",
    ),
    "preprocess": (4, lambda _: 3, ValueError, "preprocess must be 0, 1 or 2, got 3"),
    "negative preprocess": (4, lambda _: -1, ValueError, "preprocess must be 0, 1 or 2, got -1"),
    "scale": (5, lambda _: 0.0, ValueError, "preprocess_scale must be positive and finite, got 0"),
    "scale NaN": (5, lambda _: math.nan, ValueError, "preprocess_scale must be positive and finite, got nan"),
    "precision": (7, lambda _: 3, ValueError, "precision must be 0, 1 or 2, got 3"),
    "output scale": (6, lambda _: math.inf, ValueError, "output_scale must be finite, got inf"),
}


@pytest.mark.sanitize
@pytest.mark.parametrize("operator", ["lstm_step", "lstm_step_", "lstm_step_backward"])
@pytest.mark.parametrize("case", BAD_DIRECT)
def test_operators_called_directly_guard_memory(case: str, operator: str) -> None:
    index, change, error, message = BAD_DIRECT[case]
    call = operator_arguments()
    call[index] = change(call[index])
    if operator == "lstm_step_backward":  # whose gradients of the results take the place of params
        call[1:1] = [torch.zeros_like(operator_arguments()[2])]
        message = message.replace("float32 params", "float32 grads")
        if index == 0:
            message = re.sub(r"grads (must have the \w+ of) params, (\S+), got (\S+)", r"\1 grads, \3, got \2", message)
            message = f"grad_new_params {message}"
    with pytest.raises(error, match="^" + re.escape(message)):
        getattr(torch.ops.metakern, operator)(*call)


@pytest.mark.sanitize
@pytest.mark.parametrize("operator", ["lstm_step", "lstm_step_"])
def test_operators_called_directly_name_an_unknown_dtype(operator: str) -> None:
    params, grads, *rest = operator_arguments()
    with pytest.raises(TypeError, match=r"^params must be float32, bfloat16, float16 or float64, got torch\.int64"):
        getattr(torch.ops.metakern, operator)(params.long(), grads.long(), *rest)


@pytest.mark.sanitize
def test_backward_called_directly_checks_the_gradient_of_the_state() -> None:
    params, grads, state, *rest = operator_arguments()
    bad: list[tuple[Tensor, type[Exception], str]] = [
        (state[:1], ValueError, "shape of state, [2, 2, 2, 5, 32], got [1, 2, 2, 5, 32]"),
        (state.double(), TypeError, "dtype of state, torch.float32, got torch.float64"),
    ]
    for changed, error, message in bad:
        with pytest.raises(error, match=re.escape(f"grad_new_state must have the {message}")):
            torch.ops.metakern.lstm_step_backward(params, changed, grads, state, *rest)


@pytest.mark.sanitize
@pytest.mark.parametrize("index", [0, 2])
def test_in_place_called_directly_refuses_what_is_not_contiguous(index: int) -> None:
    call = operator_arguments()
    call[index] = torch.stack([call[index]] * 2, -1)[..., 0]
    name = "params" if index == 0 else "state.data"
    with pytest.raises(ValueError, match=f"{name} must be contiguous to be updated in place, got strides "):
        torch.ops.metakern.lstm_step_(*call)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_operators_called_directly_refuse_sparse_tensors(index: int) -> None:
    call = operator_arguments()
    call[index] = call[index].to_sparse()
    with pytest.raises(RuntimeError, match="Sparse"):
        torch.ops.metakern.lstm_step(*call)


def test_an_error_names_the_first_thing_wrong_and_later_calls_work() -> None:
    problem: Problem = make_problem(N, H, L)
    expected, _ = problem.run(backend="cpp")
    with pytest.raises(ValueError, match="grads must have the shape"):
        lstm_step(problem.params, problem.grads[1:], pack_state(problem.h, problem.c), problem.weights)
    assert_same_bits("new params", problem.run(backend="cpp")[0], expected)


@pytest.mark.parametrize("shift", [1, -1])
def test_in_place_refuses_memory_that_overlaps(shift: int) -> None:
    problem = make_problem(N, H, L)
    memory = torch.zeros(N + 1)
    params, grads = (memory[1:], memory[:-1]) if shift > 0 else (memory[:-1], memory[1:])
    with pytest.raises(RuntimeError, match="grads must not share a part of params' memory"):
        lstm_step_(params, grads, pack_state(problem.h, problem.c), problem.weights)
    state = pack_state(problem.h, problem.c)
    with pytest.raises(RuntimeError, match="params, grads and state must not share memory"):
        lstm_step_(state.data.view(-1)[:N], torch.zeros(N), state, problem.weights)


def test_in_place_takes_one_tensor_for_params_and_grads() -> None:
    problem = make_problem(N, H, L)
    expected, _ = lstm_step(problem.params, problem.params, pack_state(problem.h, problem.c), problem.weights)
    params = problem.params.clone()
    lstm_step_(params, params, pack_state(problem.h, problem.c), problem.weights)
    assert_same_bits("params", params, expected)


@pytest.mark.parametrize("name", ["output_scale", "preprocess_scale"])
def test_a_scale_whose_gradient_would_be_lost_is_refused(name: str) -> None:
    problem = make_problem(N, H, L)
    call = (problem.params, problem.grads, pack_state(problem.h, problem.c), problem.weights)
    with pytest.raises(TypeError, match=f"{name} must be a number, got a tensor of shape .* requires_grad=True"):
        lstm_step(*call, **{name: torch.tensor(1.0, requires_grad=True)})
    with pytest.raises(TypeError, match=rf"{name} must be a number, got a tensor of shape \[2\]"):
        lstm_step(*call, **{name: torch.ones(2)})
