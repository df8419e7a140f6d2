"""lstm_step by Triton kernels: results and gradients against the float64 reference, NaN, padding, in place, bits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")

from metakern.ops.core.triton_launch import Config, is_interpreted
from metakern.ops.lstm_step import reference
from metakern.ops.lstm_step import triton as triton_lstm_step
from metakern.ops.lstm_step.triton import CONFIGS, FLOAT64_CONFIG
from tests.conftest import FORWARD_TOLERANCE, assert_close, assert_same_bits
from tests.ops.lstm_step.triton_evaluation import assert_matches_reference, backward, forward, options
from tests.problems import evaluate_reference, make_problem

pytestmark = pytest.mark.usefixtures("interpreter_like_a_gpu")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# ------------------------------------------------------------------------------------ results and every gradient


def test_more_blocks_than_chunks_and_more_than_one_slab(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(triton_lstm_step, "MAX_CHUNKS", 3)
    monkeypatch.setattr(triton_lstm_step, "WORKSPACE_BYTES", 1)  # slabs of 8 tiles
    assert_matches_reference(make_problem(8 * 32 * 2 + 33, 5, 2, device=device))


def test_gradients_of_every_magnitude(device: torch.device) -> None:
    sizes = 10 ** torch.linspace(-40, 30, 120, dtype=torch.float64)
    grads = torch.cat([sizes, -sizes, torch.tensor([0.0, 1.0, math.exp(-10)])]).float()
    for preprocess, scale in (("log_sign", 10.0), ("log_sign", 88.0), ("log_and_clip", 10.0)):
        problem = make_problem(len(grads), 4, 1, preprocess=preprocess, preprocess_scale=scale, device=device)
        problem.grads = grads.to(device)
        results = forward(problem)
        for name, want in evaluate_reference(problem)[0].items():
            assert_close(name, results[name].cpu(), want.cpu(), FORWARD_TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gate", ["i", "f", "g", "o"])
def test_activations_over_the_whole_line(gate: str, dtype: torch.dtype, device: torch.device) -> None:
    # One unit whose pre-activation of one gate is the gradient itself; the other gates stand open.
    sizes = torch.cat([10 ** torch.linspace(-8, 30, 150), torch.linspace(0.1, 100, 150)])
    problem = make_problem(300, 1, 1, dtype, preprocess="none", output_scale=1.0, device=device)
    problem.grads = (sizes * (1 - 2 * (torch.arange(300) % 2))).to(device, dtype)
    weight_ih, bias = torch.zeros(4, 1), torch.full((4,), 3.0)
    weight_ih["ifgo".index(gate)], bias["ifgo".index(gate)] = 1, 0
    small = [weight_ih, torch.zeros(4, 1), bias, torch.zeros(4), torch.ones(1, 1), torch.zeros(1)]
    problem.weights = [w.to(device, dtype) for w in small]
    results = forward(problem)
    for name, want in evaluate_reference(problem)[0].items():
        assert_close(f"{name} by gate {gate}", results[name].cpu(), want.cpu(), FORWARD_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_of_small_numbers_keeps_its_relative_accuracy(dtype: torch.dtype, device: torch.device) -> None:
    # c' = sigmoid(0) tanh(x): each element is compared with itself, down to 1e-30.
    x = torch.cat([10 ** torch.linspace(-30, 1, 200), -(10 ** torch.linspace(-30, 1, 200))])
    problem = make_problem(400, 1, 1, dtype, preprocess="none", device=device)
    problem.grads, problem.c, problem.h = x.to(device, dtype), problem.c * 0, problem.h * 0
    small = [torch.tensor([[0.0], [0], [1], [0]]), torch.zeros(4, 1), torch.zeros(4), torch.zeros(4)]
    problem.weights = [w.to(device, dtype) for w in (*small, torch.ones(1, 1), torch.zeros(1))]
    got = forward(problem)["new c"].flatten().double().cpu()
    want = 0.5 * problem.grads.double().cpu().tanh()
    assert_close("relative tanh", got / want, torch.ones(400), 1e-12 if dtype == torch.float64 else 1e-6)


# -------------------------------------------------------------------------- NaN, padding, in place, determinism


@pytest.mark.parametrize("precision", [0, 1, 2])
@pytest.mark.parametrize("preprocess", reference.PREPROCESS)
def test_a_gradient_that_is_not_finite_stays_with_its_coordinate(
    preprocess: str, precision: int, device: torch.device
) -> None:
    clean = make_problem(67, 5, 2, preprocess=preprocess, device=device)
    at = torch.tensor([0, 1, 40, 66], device=device)
    grads = clean.grads.clone()
    grads[at] = torch.tensor([math.nan, math.inf, math.inf, -math.inf], device=device)
    others = torch.ones(67, dtype=torch.bool, device=device).index_fill(0, at, False)
    dirty = replace(clean, grads=grads)
    results, got = forward(clean, precision), forward(dirty, precision)
    names = ["new params", "new h", "new c"]
    if precision == 0:
        results, got = results | backward(clean), got | backward(dirty)
        names += ["gradient of grads", "gradient of h", "gradient of c"]
        assert got["gradient of weight_ih_l0"].isnan().any(), "the shared weights must show it"
    for name in names:
        axis = results[name].dim() // 3
        if name.startswith("new"):
            assert got[name].index_select(axis, at).isnan().all(), f"{name} of a coordinate without finite gradient"
        rows = [x[name].movedim(axis, 0)[others] for x in (got, results)]
        assert_same_bits(f"{name} of the others", *rows)


@pytest.mark.parametrize("n", [1, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lanes_behind_the_last_coordinate_carry_no_meaning(n: int, dtype: torch.dtype, device: torch.device) -> None:
    problem = make_problem(n, 5, 3, dtype, device=device)
    state = problem.state.data
    unused = torch.arange(state.shape[0] * 32, device=device).view(-1, 1, 1, 1, 32) >= n
    cotangent = torch.randn(state.shape, dtype=dtype).to(device)
    clean = forward(problem) | backward(problem, grad_new_state=cotangent.masked_fill(unused, 0))
    poisoned = state.masked_fill(unused, math.nan)
    dirty = forward(problem, state=poisoned)
    dirty |= backward(problem, poisoned, cotangent.masked_fill(unused, math.nan))
    for name, want in clean.items():
        assert_same_bits(name, dirty[name], want)
    for name in ("new state", "gradient of state"):
        assert not dirty[name][unused.expand_as(state)].any(), f"{name} is not zero behind the last coordinate"


@pytest.mark.parametrize("n", [0, 1, 33, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_gives_the_same_bits_in_the_same_memory(n: int, dtype: torch.dtype, device: torch.device) -> None:
    problem = make_problem(n, 5, 2, dtype, device=device)
    expected = forward(problem)
    params, state = problem.params.clone(), problem.state.data
    addresses = params.data_ptr(), state.data_ptr()
    arguments = (params, problem.grads, state, problem.weights, *options(problem))
    assert torch.ops.metakern.lstm_step_triton_(*arguments) is None
    assert (params.data_ptr(), state.data_ptr()) == addresses
    assert_same_bits("params", params, expected["new params"])
    assert_same_bits("state", state, expected["new state"])


def with_blocks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(triton_lstm_step, "CONFIGS", {key: Config(block, 4) for key in CONFIGS})
    monkeypatch.setattr(triton_lstm_step, "FLOAT64_CONFIG", FLOAT64_CONFIG._replace(block=block))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results_of_a_coordinate_depend_on_no_block_size(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    problem = make_problem(100, 20, 2, dtype, device=device)
    outcomes = []
    for block in (32, 64, 128):
        with_blocks(monkeypatch, block)
        outcomes.append(forward(problem) | backward(problem))
    bits_of_a_product_differ = is_interpreted()  # NumPy picks its loop by the matrix's shape
    for other in outcomes[1:]:
        for name, want in outcomes[0].items():
            if "weight" in name or "bias" in name or bits_of_a_product_differ:
                assert_close(name, other[name].cpu(), want.cpu(), 1e-14 if dtype == torch.float64 else 1e-6)
            else:
                assert_same_bits(name, other[name], want)


# ------------------------------------------------------------------------- options whose error is stated and bounded

#: Largest error of new h and c relative to their largest magnitude, on problems with weights 1.5 times those of a
#: fresh nn.LSTM.
PRECISION_TOLERANCE = {0: 2e-6, 1: 2e-3, 2: 1e-2}


@pytest.mark.parametrize("precision", [0, 1, 2])
def test_precision_of_the_products(precision: int, device: torch.device) -> None:
    problem = make_problem(200, device=device)
    results, expected = forward(problem, precision), evaluate_reference(problem)[0]
    for name in ("new h", "new c"):
        assert_close(name, results[name].cpu(), expected[name].cpu(), PRECISION_TOLERANCE[precision])
    if precision:  # the option has an effect
        assert not torch.equal(results["new h"], forward(problem, 0)["new h"])


def test_float64_knows_one_precision(device: torch.device) -> None:
    problem = make_problem(40, 5, 2, torch.float64, device=device)
    for name, want in forward(problem).items():
        assert_same_bits(name, forward(problem, 2)[name], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_stored_in_bfloat16(dtype: torch.dtype, device: torch.device) -> None:
    # From a state that bfloat16 holds, the arithmetic is that of float32; only what is stored is rounded.
    problem = make_problem(100, 20, 2, dtype, device=device)
    problem.h, problem.c = problem.h.bfloat16().float(), problem.c.bfloat16().float()
    stored = problem.state.data.bfloat16()
    exact, got = forward(problem), forward(problem, state=stored)
    assert got["new state"].dtype == torch.bfloat16
    assert_same_bits("new params", got["new params"], exact["new params"])
    assert_same_bits("new state", got["new state"], exact["new state"].bfloat16())
    problem.cotangents = (problem.cotangents[0], *(x.bfloat16().float() for x in problem.cotangents[1:]))
    exact, got = backward(problem), backward(problem, stored)
    for name, want in exact.items():
        assert_same_bits(name, got[name], want.bfloat16() if name[12:] in ("h", "c", "state") else want)
