"""Invalid input of lstm_step: error types, and messages with the argument, what was expected and what came."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metakern.ops import LSTMState, lstm_step, lstm_step_
from tests.conftest import FORWARD_TOLERANCE, assert_close, assert_same_bits
from tests.problems import make_problem

N, H, L = 37, 5, 2


def arguments() -> dict[str, Any]:
    problem = make_problem(N, H, L)
    return {
        "params": problem.params,
        "grads": problem.grads,
        "state": problem.state,
        "weights": problem.weights,
        "preprocess": "log_sign",
        "preprocess_scale": 10.0,
        "output_scale": 0.1,
    }


def weights_with(index: int, change: Callable[[Tensor], Any]) -> list[Any]:
    weights: list[Any] = list(arguments()["weights"])
    weights[index] = change(weights[index])
    return weights


def state_with(change: Callable[[Tensor], Tensor], n: int = N, layout: int = 1) -> LSTMState:
    return LSTMState(change(arguments()["state"].data), n, layout)


def meta(x: Tensor) -> Tensor:
    return x.to("meta")


# What replaces which argument; the error; its message, with what was expected and what came.
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # shape
    "grads of another length": (
        {"grads": torch.zeros(N + 1)},
        ValueError,
        "grads must have the shape of params, [37], got [38]",
    ),
    "grads of another rank": (
        {"grads": torch.zeros(N, 1)},
        ValueError,
        "grads must have the shape of params, [37], got [37, 1]",
    ),
    "weight of another shape": (
        {"weights": weights_with(1, lambda w: w[:, :4])},
        ValueError,
        "weights[1] (weight_hh_l0) must have shape [20, 5], got [20, 4]",
    ),
    "weight transposed": (
        {"weights": weights_with(4, lambda w: w.T)},
        ValueError,
        "weights[4] (weight_ih_l1) must have shape [20, 5], got [5, 20]",
    ),
    "bias of another shape": (
        {"weights": weights_with(3, lambda w: w[:5])},
        ValueError,
        "weights[3] (bias_hh_l0) must have shape [20], got [5]",
    ),
    "weight for the features of another preprocessing": (
        {"preprocess": "none"},
        ValueError,
        "weights[0] (weight_ih_l0) must have shape [20, 1], got [20, 2]",
    ),
    "head with two outputs": (
        {"weights": weights_with(8, lambda w: torch.zeros(2, H))},
        ValueError,
        "weights[8] (head.weight) must have shape [1, 5], got [2, 5]",
    ),
    "head with a scalar bias": (
        {"weights": weights_with(9, lambda w: w[0])},
        ValueError,
        "weights[9] (head.bias) must have shape [1], got []",
    ),
    # count of weights
    "no weights": (
        {"weights": []},
        ValueError,
        "weights must hold 4 tensors a layer and 2 of the head, 10 for the state's 2 layers, got 0",
    ),
    "weights without the head": (
        {"weights": arguments()["weights"][:8]},
        ValueError,
        "weights must hold 4 tensors a layer and 2 of the head, 10 for the state's 2 layers, got 8",
    ),
    "weights of another number of layers": (
        {"weights": make_problem(1, H, 3).weights},
        ValueError,
        "weights must hold 4 tensors a layer and 2 of the head, 10 for the state's 2 layers, got 14",
    ),
    # state of another N, H, L or layout version
    "state of more coordinates": (
        {"state": LSTMState.zeros(N + 1, hidden_size=H)},
        ValueError,
        "state must hold as many coordinates as params, 37, got 38",
    ),
    "state of another H": (
        {"state": LSTMState.zeros(N, hidden_size=6)},
        ValueError,
        "weights[0] (weight_ih_l0) must have shape [24, 2], got [20, 2]",
    ),
    "state of another L": (
        {"state": LSTMState.zeros(N, hidden_size=H, num_layers=1)},
        ValueError,
        "weights must hold 4 tensors a layer and 2 of the head, 6 for the state's 1 layers, got 10",
    ),
    "state of another layout version": (
        {"state": state_with(lambda x: x, layout=2)},
        ValueError,
        "state has layout version 2, this metakern reads version 1",
    ),
    "state whose data is of another N": (
        {"state": state_with(lambda x: x[:1])},
        ValueError,
        "state.data must have shape [2, L, 2, H, 32] for N = 37, got [1, 2, 2, 5, 32]",
    ),
    "state whose data is of another rank": (
        {"state": state_with(lambda x: x[0])},
        ValueError,
        "state.data must have shape [2, L, 2, H, 32] for N = 37, got [2, 2, 5, 32]",
    ),
    "state with half the tile": (
        {"state": state_with(lambda x: x[..., :16])},
        ValueError,
        "state.data must have shape [2, L, 2, H, 32] for N = 37, got [2, 2, 2, 5, 16]",
    ),
    "state without hidden units": (
        {"state": state_with(lambda x: x[:, :, :, :0])},
        ValueError,
        "state must have 1 to 3 layers and 1 to 64 hidden units, got 2 and 0",
    ),
    "state of too many layers": (
        {"state": state_with(lambda x: x.repeat(1, 2, 1, 1, 1))},
        ValueError,
        "state must have 1 to 3 layers and 1 to 64 hidden units, got 4 and 5",
    ),
    "state of a negative count": (
        {"state": LSTMState(torch.zeros(0, L, 2, H, 32), -5)},
        ValueError,
        "N must be at least 0, got -5",
    ),
    "state of a count that is no integer": (
        {"state": state_with(lambda x: x, n=37.0)},  # type: ignore[arg-type]
        TypeError,
        "N must be an integer, got 37.0 of type float",
    ),
    "state of a count that is a bool": (
        {"state": LSTMState(torch.zeros(1, L, 2, H, 32), True), "params": torch.zeros(1), "grads": torch.zeros(1)},
        TypeError,
        "N must be an integer, got True of type bool",
    ),
    "h and c themselves": (
        {"state": (torch.zeros(L, N, H), torch.zeros(L, N, H))},
        TypeError,
        "state must be an LSTMState as pack_state makes it, got tuple",
    ),
    # dtype
    "params of integers": (
        {name: torch.zeros(N, dtype=torch.int64) for name in ("params", "grads")},
        TypeError,
        "params must be float32, bfloat16, float16 or float64, got torch.int64",
    ),
    "params that are complex": (
        {name: torch.zeros(N, dtype=torch.complex64) for name in ("params", "grads")},
        TypeError,
        "params must be float32, bfloat16, float16 or float64, got torch.complex64",
    ),
    "grads of another dtype": (
        {"grads": torch.zeros(N, dtype=torch.float64)},
        TypeError,
        "grads must have the dtype of params, torch.float32, got torch.float64",
    ),
    "state of another dtype": (
        {"state": state_with(Tensor.double)},
        TypeError,
        "state must be torch.float32 for torch.float32 params, got torch.float64",
    ),
    "float32 state of float64 params": (
        {"params": torch.zeros(N).double(), "grads": torch.zeros(N).double()},
        TypeError,
        "state must be torch.float64 for torch.float64 params, got torch.float32",
    ),
    "float16 state": (
        {"state": state_with(Tensor.half)},
        TypeError,
        "state must be torch.float32 for torch.float32 params, got torch.float16",
    ),
    "weight of another dtype": (
        {"weights": weights_with(5, Tensor.double)},
        TypeError,
        "weights[5] (weight_hh_l1) must be torch.float32, got torch.float64",
    ),
    # memory layout
    "sparse grads": (
        {"grads": torch.zeros(N).to_sparse()},
        TypeError,
        "grads must be a dense tensor, got layout torch.sparse_coo",
    ),
    "sparse params": (
        {"params": torch.zeros(N).to_sparse()},
        TypeError,
        "params must be a dense tensor, got layout torch.sparse_coo",
    ),
    "sparse state": (
        {"state": state_with(Tensor.to_sparse)},
        TypeError,
        "state must be a dense tensor, got layout torch.sparse_coo",
    ),
    "sparse weight": (
        {"weights": weights_with(1, Tensor.to_sparse)},
        TypeError,
        "weights[1] must be a dense tensor, got layout torch.sparse_coo",
    ),
    # device
    "grads on another device": (
        {"grads": torch.zeros(N, device="meta")},
        RuntimeError,
        "grads must be on the device of params, cpu, got meta",
    ),
    "state on another device": (
        {"state": state_with(meta)},
        RuntimeError,
        "state must be on the device of params, cpu, got meta",
    ),
    "weight on another device": (
        {"weights": weights_with(9, meta)},
        RuntimeError,
        "weights[9] (head.bias) must be on the device of params, cpu, got meta",
    ),
    # options
    "unknown preprocessing": (
        {"preprocess": "log"},
        ValueError,
        "preprocess must be one of none, log_sign, log_and_clip, got 'log'",
    ),
    "preprocessing None": (
        {"preprocess": None},
        ValueError,
        "preprocess must be one of none, log_sign, log_and_clip, got None",
    ),
    "scale zero": ({"preprocess_scale": 0.0}, ValueError, "preprocess_scale must be 1e-06 to 88.0, got 0.0"),
    "scale negative": ({"preprocess_scale": -1}, ValueError, "preprocess_scale must be 1e-06 to 88.0, got -1"),
    "scale infinite": (
        {"preprocess_scale": math.inf},
        ValueError,
        "preprocess_scale must be 1e-06 to 88.0, got inf",
    ),
    "scale NaN": ({"preprocess_scale": math.nan}, ValueError, "preprocess_scale must be 1e-06 to 88.0, got nan"),
    "output scale NaN": ({"output_scale": math.nan}, ValueError, "output_scale must be finite in float32, got nan"),
    "output scale infinite": (
        {"output_scale": -math.inf},
        ValueError,
        "output_scale must be finite in float32, got -inf",
    ),
    "unknown backend": (
        {"backend": "gpu"},
        ValueError,
        "backend must be one of auto, cpp, cuda, triton, reference, got 'gpu'",
    ),
    # types
    "grads None, as of a parameter without gradient": (
        {"grads": None},
        TypeError,
        "grads must be a tensor, got NoneType",
    ),
    "params a list": ({"params": [0.0] * N}, TypeError, "params must be a tensor, got list"),
    "weights None": ({"weights": None}, TypeError, "weights must be a sequence of tensors, got NoneType"),
    "a weight None, as of bias=False": (
        {"weights": weights_with(2, lambda w: None)},
        TypeError,
        "weights[2] must be a tensor, got NoneType",
    ),
    "scale a string": (
        {"preprocess_scale": "10"},
        TypeError,
        "preprocess_scale must be a number, got '10' of type str",
    ),
    "output scale None": (
        {"output_scale": None},
        TypeError,
        "output_scale must be a number, got None of type NoneType",
    ),
}


@pytest.mark.parametrize("in_place", [False, True], ids=["lstm_step", "lstm_step_"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_leaves_the_arguments_alone(case: str, in_place: bool, backend: str) -> None:
    changes, error, message = BAD[case]
    call = arguments() | {"backend": backend} | changes
    dense = [x for x in (call["params"], call["grads"], getattr(call["state"], "data", None)) if isinstance(x, Tensor)]
    dense = [x for x in dense if x.layout == torch.strided and not x.is_meta]
    before = [x.clone() for x in dense]
    with pytest.raises(error, match="^" + re.escape(message)):
        (lstm_step_ if in_place else lstm_step)(**call)
    for x, old in zip(dense, before, strict=True):
        assert_same_bits("argument", x, old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-60, 100.0, 1000.0])
@pytest.mark.parametrize("preprocess", ["log_sign", "log_and_clip"])
def test_a_scale_beyond_the_arithmetic_is_refused_or_right(
    preprocess: str, scale: float, dtype: torch.dtype, backend: str
) -> None:
    # e^p or 1/p overflows in float32: a zero gradient must not turn into NaN on the way.
    problem = make_problem(4, H, L, dtype, preprocess=preprocess, preprocess_scale=scale)
    problem.grads = torch.tensor([0.0, 1e-3, -1.0, 2.0], dtype=dtype)
    try:
        new_params, _ = problem.run(backend=backend)
    except ValueError as error:
        assert str(error).startswith("preprocess_scale must be ")  # noqa: PT017 (either outcome is sound)
        return
    assert new_params.isfinite().all(), "finite gradients came out as NaN"


# --------------------------------------------------------------------------- unusual tensors that must just work


def test_any_shape_of_params_including_a_scalar(backend: str) -> None:
    problem = make_problem(24, H, L)
    flat, flat_state = problem.run(backend=backend)
    for shape in ((2, 3, 4), (24, 1), (1, 24)):
        shaped = (problem.params.view(shape), problem.grads.view(shape), problem.state, problem.weights)
        got, state = lstm_step(*shaped, backend=backend)
        assert_same_bits(f"new params of shape {shape}", got, flat.view(shape))
        assert_same_bits("new state", state.data, flat_state.data)
    one = problem.coordinates(slice(0, 1))
    got, _ = lstm_step(one.params[0], one.grads[0], one.state, one.weights, backend=backend)
    assert got.shape == ()
    assert_close("scalar", got.view(1), flat[:1], FORWARD_TOLERANCE[torch.float32])
    empty, state = lstm_step(
        torch.zeros(0, 3), torch.zeros(0, 3), LSTMState.zeros(0, hidden_size=H), problem.weights, backend=backend
    )
    assert (empty.shape, state.num_coordinates) == ((0, 3), 0)


def test_expanded_conjugated_and_negated_views(backend: str) -> None:
    problem = make_problem(N, H, L)
    one = torch.full((1,), 0.25)
    negative = torch.randn(N, dtype=torch.complex64).conj().imag  # a view with the negative bit set
    assert negative.is_neg()
    for name, params, grads in (
        ("expanded", problem.params, one.expand(N)),
        ("negated", problem.params, negative),
        ("negated params", negative, problem.grads),
        ("real part", torch.randn(N, dtype=torch.complex64).real, problem.grads),
    ):
        got, state = lstm_step(params, grads, problem.state, problem.weights, backend=backend)
        plain = (params.clone().contiguous(), grads.clone().contiguous(), problem.state, problem.weights)
        plain = tuple(x.resolve_neg() if isinstance(x, Tensor) else x for x in plain)
        expected, expected_state = lstm_step(*plain, backend=backend)
        assert_same_bits(f"new params of {name}", got, expected)
        assert_same_bits(f"new state of {name}", state.data, expected_state.data)


@pytest.mark.parametrize("container", [list, tuple, nn.ParameterList])
def test_any_sequence_of_weights(container: type, backend: str) -> None:
    problem = make_problem(N, H, L)
    expected, _ = problem.run(backend=backend)
    got, _ = lstm_step(problem.params, problem.grads, problem.state, container(problem.weights), backend=backend)
    assert_same_bits("new params", got, expected)


@pytest.mark.parametrize("scale", [5, torch.tensor(5.0), True])
def test_a_scale_that_is_a_number_of_another_type(scale: Any, backend: str) -> None:
    problem = make_problem(N, H, L)
    got, _ = problem.run(preprocess_scale=scale, backend=backend)
    assert_same_bits("new params", got, problem.run(preprocess_scale=float(scale), backend=backend)[0])
