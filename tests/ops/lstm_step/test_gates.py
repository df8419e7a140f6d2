"""Gates that forward keeps for backward on the CPU: when it does, and that results do not depend on it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metakern.ops import LSTMState, lstm_step, lstm_step_staged
from metakern.ops.lstm_step import autograd, staged
from tests.conftest import assert_same_bits
from tests.ops.lstm_step.test_stages import OWN_PAIRS, Staged, make_staged, raw_inputs
from tests.problems import Problem, make_problem


def call(problem: Problem, *, weights: list[Tensor] | None = None) -> tuple[Tensor, LSTMState]:
    return lstm_step(
        problem.params, problem.grads, problem.state, weights or problem.weights, backend="cpp", **problem.options
    )


def with_gradients(results: list[Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """The results, and the gradients of all leaves, the same in a second backward."""
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in results]
    first = torch.autograd.grad(results, leaves, cotangents, retain_graph=True)
    again = torch.autograd.grad(results, leaves, cotangents)
    for x, y in zip(first, again, strict=True):
        assert_same_bits("gradient of a second backward", x, y)
    return *(x.detach() for x in results), *first


def gradients(problem: Problem, data: Tensor) -> tuple[Tensor, ...]:
    """New params, new state, and the gradients of params, grads, state and weights, from a state with this data."""
    leaves = [x.detach().clone().requires_grad_() for x in (problem.params, problem.grads, data, *problem.weights)]
    params, grads, state, *weights = leaves
    problem = Problem(**{**vars(problem), "params": params, "grads": grads})
    new, new_state = lstm_step(params, grads, LSTMState(state, len(params)), weights, backend="cpp", **problem.options)
    return with_gradients([new, new_state.data], leaves)


def staged_gradients(problem: Staged, tail: float = 0.0) -> tuple[Tensor, ...]:
    """The same of a step with stages; ``tail`` stands behind the last coordinate of the states."""
    *tensors, weights = raw_inputs(problem)
    n = problem.params.numel()
    for data in tensors[2:4]:
        data.movedim(-1, 1).flatten(0, 1)[n:] = tail
    leaves = [x.detach().clone().requires_grad_() for x in (*tensors, *weights)]
    params, grads, state, rows, inputs, *weights = leaves
    given = {"stage_state": rows, "coordinate_inputs": inputs, "backend": "cpp", **problem.keywords()}
    new, new_state, new_rows = lstm_step_staged(params, grads, LSTMState(state, n), weights, **given)
    return with_gradients([new, new_state.data, new_rows], leaves)


class Called(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__.removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def keeps(problem: Problem) -> bool:
    """Whether a call with a gradient keeps its gates."""
    with Called() as called:
        call(problem, weights=[w.detach().requires_grad_() for w in problem.weights])
    assert called.names & {"lstm_step", "lstm_step_with_gates"}
    return "lstm_step_with_gates" in called.names


def staged_operators(problem: Staged) -> set[str]:
    """Names of the operators that a step with stages and its backward call."""
    with Called() as called:
        staged_gradients(problem)
    return {name for name in called.names if name.startswith("lstm_step")}


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "hidden", "layers"), [(1, 20, 2), (70, 5, 3), (321, 20, 2), (64, 33, 1)])
def test_results_and_gradients_have_the_same_bits_with_and_without_gates(
    n: int, hidden: int, layers: int, dtype: torch.dtype, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem(n, hidden, layers, dtype)
    data = problem.state.data.clone()
    data.movedim(-1, 1).flatten(0, 1)[n:] = math.nan  # lanes after the last coordinate carry no meaning
    with_gates = gradients(problem, data)
    monkeypatch.setattr(autograd, "MAX_GATES", -1)
    assert not keeps(problem)
    for index, (x, y) in enumerate(zip(with_gates, gradients(problem, data), strict=True)):
        assert_same_bits(f"tensor {index}", x, y)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("features", "head"), OWN_PAIRS)
@pytest.mark.parametrize(("n", "hidden", "layers"), [(1, 20, 2), (70, 5, 3), (321, 20, 1)])
def test_stages_give_the_same_bits_with_and_without_gates(
    *,
    n: int,
    hidden: int,
    layers: int,
    features: str,
    head: str,
    dtype: torch.dtype,
    capability: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = make_staged(n, features, head, dtype, hidden=hidden, layers=layers)
    with_gates = staged_gradients(problem, math.nan)
    monkeypatch.setattr(autograd, "MAX_GATES", -1)
    for index, (x, y) in enumerate(zip(with_gates, staged_gradients(problem, math.nan), strict=True)):
        assert_same_bits(f"tensor {index}", x, y)


def test_steps_with_stages_keep_their_gates_up_to_the_same_size(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_staged(32, "moments", "tanh", hidden=5)
    assert staged_operators(problem) == {"lstm_step_staged_with_gates", "lstm_step_staged_with_gates_backward"}
    monkeypatch.setattr(autograd, "MAX_GATES", 4 * 32 * 5 * 2 * 5 - 1)  # one byte less than they take
    assert staged_operators(problem) == {"lstm_step_staged", "lstm_step_staged_backward"}


@pytest.mark.parametrize(("n", "kept"), [(1, True), (10_464, True), (10_465, False)])
def test_gates_are_kept_up_to_the_documented_number_of_coordinates(n: int, kept: bool) -> None:
    problem = make_problem(n)
    assert keeps(problem) is kept
    assert "10,464" in (lstm_step.__doc__ or "")


def refuse(_: str) -> None:
    raise AssertionError("the operator with gates was asked for")


def test_nothing_of_a_step_with_stages_is_kept_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged.step_with_gates, "kernel", refuse)
    problem = make_staged(40, "moments", "tanh")
    with pytest.raises(AssertionError, match="was asked for"):
        staged_gradients(problem)
    params, grads, state, rows, inputs, weights = raw_inputs(problem)
    given = {"stage_state": rows, "coordinate_inputs": inputs, "backend": "cpp", **problem.keywords()}
    lstm_step_staged(params, grads, LSTMState(state, 40), weights, **given)
    with torch.no_grad():
        lstm_step_staged(params.requires_grad_(), grads, LSTMState(state, 40), weights, **given)


def test_nothing_is_kept_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autograd.step_with_gates, "kernel", refuse)
    problem = make_problem(40)
    call(problem)
    weights = [w.detach().requires_grad_() for w in problem.weights]
    with torch.no_grad():
        call(problem, weights=weights)
    with pytest.raises(AssertionError, match="was asked for"):
        call(problem, weights=weights)
