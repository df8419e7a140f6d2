"""lstm_step: its sigmoid and tanh over the whole line, of small numbers, saturated, and of every float16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metakern.ops import LSTMState, lstm_step, pack_state, unpack_state
from metakern.ops.lstm_step import reference
from tests.conftest import (
    FORWARD_TOLERANCE,
    assert_close,
    assert_same_bits,
)
from tests.problems import Problem, assert_matches_reference, make_problem


def activation_sweep() -> Tensor:
    sizes = torch.cat([10 ** torch.linspace(-8, 4, 600), torch.linspace(0.1, 100, 700), torch.tensor([0.0, 1e4])])
    return torch.cat([sizes, -sizes]).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gate", ["i", "f", "g", "o"])
def test_activations_over_the_whole_line(gate: str, dtype: torch.dtype, capability: str) -> None:
    # One unit whose pre-activation of one gate is the gradient itself; the other gates stand open.
    x = activation_sweep().to(dtype)
    n, open_gate = len(x), 3.0
    weight_ih = torch.zeros(4, 1, dtype=dtype)
    weight_ih["ifgo".index(gate)] = 1
    bias = torch.full((4,), open_gate, dtype=dtype)
    bias["ifgo".index(gate)] = 0
    weights = [weight_ih, torch.zeros(4, 1, dtype=dtype), bias, torch.zeros(4, dtype=dtype)]
    weights += [torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype)]
    state = pack_state(torch.zeros(1, n, 1, dtype=dtype), torch.full((1, n, 1), 0.5, dtype=dtype))
    options = {"preprocess": "none", "output_scale": 1.0}
    new_params, new_state = lstm_step(torch.zeros(n, dtype=dtype), x, state, weights, backend="cpp", **options)
    wide = [w.double() for w in weights]
    h, c = (s.double() for s in unpack_state(state))
    expected, h, c = reference.lstm_step(torch.zeros(n).double(), x.double(), h, c, wide, **options)
    for name, got, want in zip(
        ("new params", "new h", "new c"), (new_params, *unpack_state(new_state)), (expected, h, c), strict=True
    ):
        assert_close(f"{name} by gate {gate}", got, want, FORWARD_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_of_small_numbers_keeps_its_relative_accuracy(dtype: torch.dtype, capability: str) -> None:
    # c' = sigmoid(0) tanh(x) + 0: each element is compared with itself, down to 1e-30.
    x = torch.cat([10 ** torch.linspace(-30, 1, 400), -(10 ** torch.linspace(-30, 1, 400))]).to(dtype)
    weights = [torch.tensor([[0.0], [0], [1], [0]], dtype=dtype), torch.zeros(4, 1, dtype=dtype)]
    weights += [torch.zeros(4, dtype=dtype)] * 2 + [torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype)]
    state = LSTMState.zeros(len(x), hidden_size=1, num_layers=1, dtype=dtype)
    h, c = unpack_state(lstm_step(torch.zeros_like(x), x, state, weights, preprocess="none", backend="cpp")[1])
    expected_c = 0.5 * x.double().tanh()
    tolerance = FORWARD_TOLERANCE[dtype]
    assert_close("c / expected", c.double().flatten() / expected_c, torch.ones_like(expected_c), tolerance)
    expected_h = 0.5 * expected_c.tanh()
    assert_close("h / expected", h.double().flatten() / expected_h, torch.ones_like(expected_h), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("second", ["g", "c"])
def test_products_of_saturated_activations(second: str, dtype: torch.dtype, capability: str) -> None:
    # sigmoid(i) tanh(g) and sigmoid(o) tanh(c'), which share a division: every pair of sizes, the one from the
    # gradient, the other from the state.
    sizes = torch.tensor([1e-6, 0.5, 3, 8, 12, 20, 43, 44, 50, 88, 100, 400, 800, 1e4], dtype=dtype)
    x, y = torch.cartesian_prod(torch.cat([sizes, -sizes]), torch.cat([sizes, -sizes])).unbind(1)
    first = "i" if second == "g" else "o"
    weight_ih = torch.tensor([[float(gate == first)] for gate in "ifgo"], dtype=dtype)
    weight_hh = torch.tensor([[float(gate == second)] for gate in "ifgo"], dtype=dtype)
    open_gates = torch.tensor([0.0, 100.0, 0.0, 0.0], dtype=dtype)
    weights = [weight_ih, weight_hh, open_gates, torch.zeros(4, dtype=dtype)]
    weights += [torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype)]
    zero, given_state = torch.zeros(1, len(x), 1, dtype=dtype), y.view(1, -1, 1)
    h, c = (given_state, zero) if second == "g" else (zero, given_state)
    problem = Problem(torch.zeros_like(x), x, h, c, weights, (zero[0, :, 0], zero, zero), {"preprocess": "none"})
    assert_matches_reference(problem)


def test_every_float16_is_read_and_written_as_torch_does(capability: str) -> None:
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[~halves.isnan()]
    problem = make_problem(len(halves), 4, 1)
    arguments = (pack_state(problem.h, problem.c), problem.weights)
    grads = torch.linspace(-1, 1, len(halves)).half()
    for scale in (0.0, 1e-6, 0.3, 300.0, 1e5):  # no change; rounding, denormal results, overflow
        got, _ = lstm_step(halves, grads, *arguments, output_scale=scale, backend="cpp")
        wide, _ = lstm_step(halves.float(), grads.float(), *arguments, output_scale=scale, backend="cpp")
        assert_same_bits(f"params with output_scale {scale}", got, wide.half())
