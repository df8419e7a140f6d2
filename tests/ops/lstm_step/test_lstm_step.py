"""lstm_step: results and gradients against the float64 reference, determinism, NaN, in place, 64-bit addressing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metakern import FallbackWarning
from metakern.core import backend as _backend
from metakern.ops import LSTMState, lstm_step, lstm_step_, unpack_state
from metakern.ops.lstm_step import reference
from metakern.ops.lstm_step import state as state_module
from tests.conftest import (
    FORWARD_TOLERANCE,
    GRADIENT_TOLERANCE,
    assert_close,
    assert_same_bits,
)
from tests.problems import Problem, assert_matches_reference, evaluate, evaluate_reference, make_problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# ------------------------------------------------------------------------------------ results and every gradient


@pytest.mark.parametrize("hidden", range(1, 65))
def test_every_hidden_size_on_the_capability_in_use(hidden: int) -> None:
    assert_matches_reference(make_problem(35, hidden, 1 + hidden % 3, preprocess="log_and_clip"))


def magnitudes(dtype: torch.dtype, scale: float) -> Tensor:
    """Gradients of every magnitude that the dtype has, both signs, and those on either side of e^-scale."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps  # the smallest denormal
    threshold = math.exp(-scale)
    low, high = math.log10(smallest) + 0.1, min(math.log10(info.max) - 0.1, 30.0)
    sizes = [0.0, smallest, info.smallest_normal, info.smallest_normal * 0.75, 1.0, math.e]
    sizes += [threshold * (1 + offset) for offset in (-0.02, -0.01, 0.01, 0.02)]
    sizes += (10 ** torch.linspace(low, high, 200, dtype=torch.float64)).tolist()
    return torch.tensor([sign * size for size in sizes for sign in (1, -1)], dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [3.0, 10.0, 80.0])
@pytest.mark.parametrize("preprocess", ["log_sign", "log_and_clip"])
def test_gradients_of_every_magnitude(preprocess: str, scale: float, dtype: torch.dtype, capability: str) -> None:
    # A coordinate's own largest value is what its error is compared with: one huge slope must not hide the others.
    grads = magnitudes(dtype, scale)
    problem = make_problem(len(grads), 8, 2, dtype, preprocess=preprocess, preprocess_scale=scale)
    problem.grads = grads
    results, gradients = evaluate(problem)
    expected_results, expected_gradients = evaluate_reference(problem)
    for name, expected in expected_results.items():
        assert_close(name, results[name], expected, FORWARD_TOLERANCE[results[name].dtype])
    # |d features / d g| is at most e^p, and 1/(p |g|) above the threshold: scaled by it, slopes are comparable.
    size = grads.double().abs().clamp(min=math.exp(-scale))
    if preprocess == "log_and_clip":
        size = size + reference.LOG_AND_CLIP_EPSILON
    got, want = (g["gradient of grads"].double() * size for g in (gradients, expected_gradients))
    kept = gradients["gradient of grads"].isfinite()  # float16 overflows where the slope exceeds 65,504
    want = want.where(kept, torch.zeros(()))
    info = torch.finfo(dtype)
    overflows = expected_gradients["gradient of grads"].abs() > info.max * 0.999
    assert bool((kept | overflows).all()), "a finite gradient came out infinite"
    tiny = (expected_gradients["gradient of grads"].abs() < 4 * info.smallest_normal) & (dtype == torch.float16)
    assert_close(
        "scaled gradient of grads",
        got.where(kept & ~tiny, torch.zeros(())),
        want.where(~tiny, torch.zeros(())),
        GRADIENT_TOLERANCE[dtype] * (1 if dtype in (torch.float32, torch.float64) else 2),
    )


@pytest.mark.parametrize("preprocess", ["log_sign", "log_and_clip"])
def test_results_are_continuous_at_the_threshold(preprocess: str, capability: str) -> None:
    for scale in (1.0, 3.0, 10.0):
        threshold = torch.tensor(math.exp(-scale))
        around = [threshold]
        for _ in range(3):
            around += [torch.nextafter(around[-1], torch.tensor(1.0))]
            around.insert(0, torch.nextafter(around[0], torch.tensor(0.0)))
        grads = torch.stack(around + [-x for x in around])
        problem = make_problem(len(grads), preprocess=preprocess, preprocess_scale=scale)
        problem.grads = grads
        results, _ = evaluate(problem)
        for name, expected in evaluate_reference(problem)[0].items():
            assert_close(name, results[name], expected, FORWARD_TOLERANCE[torch.float32])


@pytest.mark.parametrize("scale", [60.0, 85.0, 88.0])
def test_logarithm_of_denormal_gradients(scale: float, capability: str) -> None:
    # e^-88 is denormal in float32, so these gradients take the logarithm's branch for denormal numbers.
    grads = torch.tensor([6.1e-39, -7e-39, 1.1e-38, 1.3e-38, 1e-37, 1e-35, -1e-20, 1.0])
    problem = make_problem(len(grads), 8, 1, preprocess_scale=scale)
    problem.grads = grads
    results, _ = evaluate(problem)
    for name, expected in evaluate_reference(problem)[0].items():
        assert_close(name, results[name], expected, FORWARD_TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_update_itself_is_accurate(dtype: torch.dtype, capability: str) -> None:
    # With zero params the new params are the update alone, and no large parameter hides its error.
    problem = make_problem(1025, dtype=dtype)
    problem.params = torch.zeros_like(problem.params)
    update = problem.run(backend="cpp")[0]
    assert_close("update", update, evaluate_reference(problem)[0]["new params"], FORWARD_TOLERANCE[dtype])


def test_low_precision_params_round_the_float32_result(capability: str) -> None:
    # Half an ulp away from the float64 result is allowed; two ulps away from the rounded float32 result is not.
    for dtype in (torch.bfloat16, torch.float16):
        problem = make_problem(1025, dtype=dtype)
        got = problem.run(backend="cpp")[0]
        wide = Problem(**(vars(problem) | {"params": problem.params.float(), "grads": problem.grads.float()}))
        expected = wide.run(backend="cpp")[0].to(dtype)
        assert_same_bits(f"new params in {dtype}", got, expected)


# ------------------------------------------------------------------------------------------------- hypothesis


# ------------------------------------------------------------------------------------------------ determinism


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_every_split_of_the_coordinates(dtype: torch.dtype, capability: str) -> None:
    n = 101
    problem = make_problem(n, 6, 2, dtype)
    results, gradients = evaluate(problem)
    whole = results | {name: gradients[f"gradient of {name}"] for name in ("params", "grads", "h", "c")}
    for cut in range(n + 1):
        parts = [problem.coordinates(slice(0, cut)), problem.coordinates(slice(cut, n))]
        outcomes = [evaluate(part) for part in parts]
        for name, expected in whole.items():
            pieces = [r[name] if name in r else g[f"gradient of {name}"] for r, g in outcomes]
            assert_same_bits(f"{name} split at {cut}", torch.cat(pieces, dim=1 if expected.dim() == 3 else 0), expected)


# ------------------------------------------------------------------------------- gradients that are not finite


@pytest.mark.parametrize("n", [1, 33])
def test_lanes_behind_the_last_coordinate_carry_no_meaning(n: int, capability: str) -> None:
    # Whatever stands there, NaN included, neither results nor any gradient change.
    problem = make_problem(n, 5, 2)
    state = problem.state
    unused = torch.arange(state.data.shape[0] * 32).view(-1, 1, 1, 1, 32) >= n
    dirty = LSTMState(state.data.masked_fill(unused, math.nan), n)
    cotangent = torch.randn_like(state.data).masked_fill(unused, math.nan)
    outcomes = []
    for data, seed in ((state.data, cotangent.nan_to_num(0)), (dirty.data, cotangent)):
        leaves = [x.detach().requires_grad_() for x in (problem.params, problem.grads, data, *problem.weights)]
        new_params, new_state = lstm_step(*leaves[:2], LSTMState(leaves[2], n), leaves[3:], backend="cpp")
        gradients = torch.autograd.grad([new_params, new_state.data], leaves, [problem.cotangents[0], seed])
        outcomes.append((new_params, *unpack_state(new_state), *gradients))
    names = ("new params", "new h", "new c", "grad params", "grad grads", "grad state")
    for index, (clean, got) in enumerate(zip(*outcomes, strict=True)):
        name = names[index] if index < len(names) else f"gradient of weights[{index - len(names)}]"
        if name == "grad state":
            clean, got = (unpack_state(LSTMState(x, n))[0] for x in (clean, got))
        assert_same_bits(name, got, clean)


# --------------------------------------------------------------------------------------------------- in place


@pytest.mark.sanitize
@pytest.mark.parametrize("n", [0, 1, 33, 1025])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_gives_the_same_bits_in_the_same_memory(n: int, dtype: torch.dtype, capability: str) -> None:
    problem = make_problem(n, dtype=dtype)
    expected, expected_state = problem.run(backend="cpp")
    params, state = problem.params.clone(), problem.state
    addresses = params.data_ptr(), state.data.data_ptr()
    assert lstm_step_(params, problem.grads, state, problem.weights, backend="cpp", **problem.options) is None
    assert (params.data_ptr(), state.data.data_ptr()) == addresses
    assert_same_bits("params", params, expected)
    assert_same_bits("state", state.data, expected_state.data)


def test_in_place_by_the_reference() -> None:
    problem = make_problem(33)
    params, state = problem.params.clone(), problem.state
    expected, expected_state = problem.run(backend="reference")
    lstm_step_(params, problem.grads, state, problem.weights, backend="reference", **problem.options)
    assert_same_bits("params", params, expected)
    assert_same_bits("state", state.data, expected_state.data)


def test_in_place_works_on_params_that_require_a_gradient_and_leaves_no_graph(backend: str) -> None:
    problem = make_problem(33)
    params, weights = problem.params.clone().requires_grad_(), [w.clone().requires_grad_() for w in problem.weights]
    state = problem.state
    lstm_step_(params, problem.grads, state, weights, backend=backend)
    assert params.is_leaf
    assert params.requires_grad
    assert not state.data.requires_grad


def test_in_place_is_seen_by_a_graph_that_saved_the_old_values(backend: str) -> None:
    # Without a new version of the tensor, backward would take the new values for the old ones and be wrong silently.
    problem = make_problem(33)
    for changed in ("params", "state"):
        params, state = problem.params.clone(), problem.state
        tensor = params if changed == "params" else state.data
        factor = torch.ones((), requires_grad=True)
        loss = (tensor * factor).sum()
        lstm_step_(params, problem.grads, state, problem.weights, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("name", ["params", "state.data"])
def test_in_place_refuses_what_is_not_contiguous(name: str, backend: str) -> None:
    problem = make_problem(64)
    params, state = problem.params.clone(), problem.state
    if name == "params":
        params = torch.stack([params, params], 1)[:, 0]
    else:
        state = LSTMState(torch.stack([state.data, state.data], -1)[..., 0], 64)
    before = params.clone(), state.data.clone()
    with pytest.raises(ValueError, match=rf"^{name} must be contiguous to be updated in place, got strides \["):
        lstm_step_(params, problem.grads, state, problem.weights, backend=backend)
    assert_same_bits("params", params, before[0])
    assert_same_bits("state", state.data, before[1])


# ------------------------------------------------------------------------------------------- 64-bit addressing


def available_memory() -> int:
    """Bytes that can be allocated without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no line MemAvailable")


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="free memory is read from /proc/meminfo")
def test_state_of_more_than_two_to_the_31_elements() -> None:
    # A product of two 32-bit sizes would wrap; few hidden units keep the arithmetic short. In place: one state only.
    hidden, layers = 8, 3
    n = 2**31 // (2 * hidden * layers) // 32 * 32 + 32 * 100 + 5
    needed = 12 * 2**30
    if available_memory() < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory, {available_memory() >> 30} GiB are free")
    ends = torch.cat([torch.arange(64), torch.arange(n - 101, n)])
    few = make_problem(len(ends), hidden, layers)
    params, grads = torch.zeros(n), torch.full((n,), 0.01)
    state = LSTMState.zeros(n, hidden_size=hidden, num_layers=layers)
    assert state.data.numel() > 2**31
    params[ends], grads[ends] = few.params, few.grads
    tile, lane = ends // 32, ends % 32
    state.data[tile, :, 0, :, lane] = few.h.transpose(0, 1)
    state.data[tile, :, 1, :, lane] = few.c.transpose(0, 1)
    lstm_step_(params, grads, state, few.weights, backend="cpp")
    expected, expected_state = few.run(backend="cpp")
    assert_same_bits("params at both ends", params[ends], expected)
    for kind, want in enumerate(unpack_state(expected_state)):
        got = state.data[tile, :, kind, :, lane].transpose(0, 1)
        assert_same_bits("hc"[kind] + " at both ends", got, want)
    middle = params[64 : n - 101]
    assert bool((middle == middle[0]).all()), "coordinates with equal inputs came out different"


# ---------------------------------------------------------------------------- constants that stand in two places


def test_constants_of_the_kernels_are_those_of_the_package() -> None:
    assert _backend._C.tile_lanes == state_module.TILE_LANES
    assert _backend._C.max_hidden == state_module.MAX_HIDDEN
    assert _backend._C.max_layers == state_module.MAX_LAYERS
    assert _backend._C.log_and_clip_epsilon == reference.LOG_AND_CLIP_EPSILON == torch.finfo(torch.float32).eps


def test_bfloat16_state_is_stored_rounded_and_computed_in_float32() -> None:
    problem = make_problem(45, 7, 2)
    state = LSTMState(problem.state.data.bfloat16(), 45)
    got, new_state = lstm_step(problem.params, problem.grads, state, problem.weights, backend="reference")
    wide = LSTMState(state.data.float(), 45)
    expected, expected_state = lstm_step(problem.params, problem.grads, wide, problem.weights, backend="reference")
    assert_same_bits("params", got, expected)
    assert_same_bits("state", new_state.data, expected_state.data.bfloat16())


def test_the_kernels_for_the_cpu_refuse_bfloat16_state_and_auto_goes_round_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_backend, "_warned", set())
    problem = make_problem(45, 7, 2)
    arguments = (problem.params, problem.grads, LSTMState(problem.state.data.bfloat16(), 45), problem.weights)
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot run: the kernels for the CPU keep no bfloat16 state"):
        lstm_step(*arguments, backend="cpp")
    with pytest.warns(FallbackWarning, match="keep no bfloat16 state"):
        got, _ = lstm_step(*arguments)
    expected, _ = lstm_step(*arguments, backend="reference")
    assert_same_bits("params", got, expected)
