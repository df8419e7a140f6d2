"""lstm_step on a GPU: results and gradients against the float64 reference, storage, precision, determinism, layouts.

Triton compiles for every size, dtype and option; its cases are fewer. test_triton.py covers it without a GPU.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from metakern.ops import LSTMState, lstm_step, lstm_step_, unpack_state
from tests.conftest import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close, assert_same_bits
from tests.gpu.common import BACKENDS, forward, needs_cuda, shifted, with_bfloat16_state
from tests.ops.lstm_step.test_cuda import PRODUCT_ERROR, error_bounds
from tests.problems import Problem, assert_matches_reference, evaluate, evaluate_reference, make_problem

pytestmark = needs_cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def on_device(*args: Any, **options: Any) -> Problem:
    return make_problem(*args, device="cuda", **options)


def rounded(problem: Problem) -> Problem:
    """The same problem with h, c and their cotangents representable in bfloat16."""
    coarse, work = with_bfloat16_state(problem), problem.h.dtype
    p, h, c = coarse.cotangents
    return replace(coarse, h=coarse.h.to(work), c=coarse.c.to(work), cotangents=(p, h.to(work), c.to(work)))


# ------------------------------------------------------------------------------------ results and every gradient


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [70_001, 400_003])
def test_many_coordinates_keep_the_gradients_of_shared_weights_exact(n: int, backend: str) -> None:
    # More tiles than there are chunks of them; Triton's workspace holds no more than a part.
    assert_matches_reference(on_device(n), backend)


# -------------------------------------------------------------------------------------------- storage, precision


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("hidden", "layers"), [(20, 2), (32, 2), (7, 3)])
def test_state_in_bfloat16_is_rounded_once(hidden: int, layers: int, dtype: torch.dtype, backend: str) -> None:
    # The arithmetic is float32: what is stored is the reference's value rounded, everything else as exact as ever.
    if backend == "triton" and (hidden, dtype) not in ((20, torch.float32), (7, torch.bfloat16)):
        pytest.skip("two cases are compiled by Triton")
    problem = rounded(on_device(1024, hidden, layers, dtype))
    expected, expected_gradients = evaluate_reference(problem)
    results, gradients = evaluate(with_bfloat16_state(problem), backend)
    assert results["new h"].dtype == results["new c"].dtype == gradients["gradient of h"].dtype == torch.bfloat16
    for name, got in results.items():
        assert_close(name, got, expected[name], FORWARD_TOLERANCE[got.dtype])
    for name, got in gradients.items():
        assert_close(name, got, expected_gradients[name], GRADIENT_TOLERANCE[got.dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bfloat16_state", [False, True], ids=["float32 state", "bfloat16 state"])
@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize(("hidden", "layers"), [(20, 2), (32, 1)])
def test_coarser_products_are_as_coarse_as_stated(
    hidden: int, layers: int, precision: str, bfloat16_state: bool, backend: str
) -> None:
    problem = rounded(on_device(1024, hidden, layers))
    expected, _ = evaluate_reference(problem)
    bounds = error_bounds(problem, PRODUCT_ERROR[precision])
    stored = with_bfloat16_state(problem) if bfloat16_state else problem
    coarse, fine = forward(stored, backend, precision=precision), forward(stored, backend)
    for name, want in expected.items():
        slack = FORWARD_TOLERANCE[coarse[name].dtype] * want.abs().max()
        error, fine_error = ((x[name].double() - want).abs() for x in (coarse, fine))
        assert bool((error <= 1.01 * bounds[name] + slack).all()), f"{name} is off by more than {precision} may be"
        if coarse[name].dtype == torch.float32:
            assert error.max() > 5 * fine_error.max(), f"{name} is as exact as by float32 products: were they used?"


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_precision_leaves_backward_as_it_is(precision: str) -> None:
    problem = on_device(500)
    _, expected = evaluate(problem, "cuda")
    _, got = evaluate(replace(problem, options=problem.options | {"precision": precision}), "cuda")
    for name, x in expected.items():
        assert_same_bits(name, got[name], x)


# --------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bfloat16_state", [False, True], ids=["float32 state", "bfloat16 state"])
def test_same_bits_in_every_run_and_on_every_stream(bfloat16_state: bool, backend: str) -> None:
    problem = on_device(100_016)
    problem = with_bfloat16_state(problem) if bfloat16_state else problem
    expected = evaluate(problem, backend)
    for stream in (None, torch.cuda.Stream(), torch.cuda.Stream(priority=-1)):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            got = evaluate(problem, backend)
        torch.cuda.synchronize()
        for name, x in (expected[0] | expected[1]).items():
            assert_same_bits(name, (got[0] | got[1])[name], x)


# ------------------------------------------------------------------- what must stay with its coordinate or lane


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_stays_with_its_coordinate(bad: float, precision: str, backend: str) -> None:
    clean = on_device(77)
    clean.options["precision"] = precision
    results, gradients = evaluate(clean, backend)
    for at in (0, 40, 76):
        dirty = replace(clean, grads=clean.grads.clone())
        dirty.grads[at] = bad
        dirty_results, dirty_gradients = evaluate(dirty, backend)
        others = torch.arange(77, device="cuda") != at
        for name, got in dirty_results.items():
            axis = 0 if got.dim() == 1 else 1
            assert got.select(axis, at).isnan().all(), f"{name} of the coordinate with gradient {bad} is not NaN"
            kept, expected = (x.movedim(axis, 0)[others] for x in (got, results[name]))
            assert_same_bits(f"{name} of the other coordinates", kept, expected)
        for name in ("gradient of grads", "gradient of h", "gradient of c"):
            axis = 0 if gradients[name].dim() == 1 else 1
            kept, expected = (x.movedim(axis, 0)[others] for x in (dirty_gradients[name], gradients[name]))
            assert_same_bits(f"{name} of the other coordinates", kept, expected)
        assert dirty_gradients["gradient of weight_ih_l0"].isnan().any(), "the shared weights must show it"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 33, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lanes_behind_the_last_coordinate_carry_no_meaning(dtype: torch.dtype, n: int, backend: str) -> None:
    # Whatever stands there, NaN included, neither results nor any gradient change.
    problem = on_device(n)
    state = problem.state.data.to(dtype)
    unused = torch.arange(state.shape[0] * 32, device="cuda").view(-1, 1, 1, 1, 32) >= n
    cotangent = torch.randn_like(state).masked_fill(unused, math.nan)
    outcomes = []
    for data, seed in ((state, cotangent.nan_to_num(0)), (state.masked_fill(unused, math.nan), cotangent)):
        leaves = [x.detach().requires_grad_() for x in (problem.params, problem.grads, data, *problem.weights)]
        new_params, new_state = lstm_step(*leaves[:2], LSTMState(leaves[2], n), leaves[3:], backend=backend)
        gradients = list(torch.autograd.grad([new_params, new_state.data], leaves, [problem.cotangents[0], seed]))
        gradients[2:3] = unpack_state(LSTMState(gradients[2], n))
        outcomes.append([new_params, *unpack_state(new_state), *gradients])
    for index, (clean, got) in enumerate(zip(*outcomes, strict=True)):
        assert_same_bits(f"result {index}", got, clean)


# --------------------------------------------------------------------------------------------- in place, layouts

IN_PLACE = [
    *itertools.product(["cuda"], (20, 32, 7), ("highest", "high", "medium"), (torch.float32, torch.bfloat16)),
    *itertools.product(["triton"], (20,), ("highest", "medium"), (torch.float32, torch.bfloat16)),
]


@pytest.mark.parametrize(("backend", "hidden", "precision", "state_dtype"), IN_PLACE)
def test_in_place_gives_the_same_bits_in_the_same_memory(
    backend: str, hidden: int, precision: str, state_dtype: torch.dtype
) -> None:
    problem = on_device(50_007, hidden)
    data = problem.state.data.to(state_dtype)
    options = problem.options | {"precision": precision, "backend": backend}
    arguments = (problem.params, problem.grads, LSTMState(data.clone(), 50_007), problem.weights)
    expected, expected_state = lstm_step(*arguments, **options)
    params, state = problem.params.clone(), LSTMState(data.clone(), 50_007)
    addresses = params.data_ptr(), state.data.data_ptr()
    lstm_step_(params, problem.grads, state, problem.weights, **options)
    assert (params.data_ptr(), state.data.data_ptr()) == addresses
    assert_same_bits("params", params, expected)
    for name, got, want in zip("hc", unpack_state(state), unpack_state(expected_state), strict=True):
        assert_same_bits(name, got, want)


def test_in_place_refuses_a_state_that_is_not_aligned() -> None:
    problem = on_device(77)
    params, state = problem.params.clone(), LSTMState(shifted(problem.state.data), 77)
    before = state.data.clone()
    with pytest.raises(ValueError, match="state must start at a multiple of 16 bytes to be updated in place"):
        lstm_step_(params, problem.grads, state, problem.weights, backend="cuda")
    assert_same_bits("params", params, problem.params)
    assert_same_bits("state", state.data, before)


# ------------------------------------------------------------------------------------------- 64-bit addressing


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_of_more_than_two_to_the_31_elements(backend: str) -> None:
    # A product of two 32-bit sizes would wrap: both ends are compared with a small problem of the same coordinates.
    n = 2**31 // 80 // 32 * 32 + 32 * 100 + 5
    needed, free = 60 * 2**30, torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory, {free >> 30} GiB are free")
    ends = torch.cat([torch.arange(64), torch.arange(n - 101, n)]).cuda()
    few = on_device(len(ends))
    tile, lane = ends // 32, ends % 32

    def spread(h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        data = LSTMState.zeros(n, device="cuda").data
        data[tile, :, 0, :, lane] = h.transpose(0, 1)
        data[tile, :, 1, :, lane] = c.transpose(0, 1)
        return data

    def gathered(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(data[tile, :, kind, :, lane].transpose(0, 1) for kind in (0, 1))

    params, grads, grad_new = (torch.full((n,), 0.01, device="cuda") for _ in range(3))
    params[ends], grads[ends], grad_new[ends] = few.params, few.grads, few.cotangents[0]
    data, cotangent = spread(few.h, few.c).requires_grad_(), spread(*few.cotangents[1:])
    assert data.numel() > 2**31
    grads.requires_grad_()
    new_params, state = lstm_step(params, grads, LSTMState(data, n), few.weights, backend=backend)
    grad_grads, grad_data = torch.autograd.grad([new_params, state.data], [grads, data], [grad_new, cotangent])
    got = [new_params[ends], *gathered(state.data), grad_grads[ends], *gathered(grad_data)]
    del cotangent, grad_data
    results, gradients = evaluate(few, backend)
    names = ("gradient of grads", "gradient of h", "gradient of c")
    expected = results | {name: gradients[name] for name in names}
    for (name, want), x in zip(expected.items(), got, strict=True):
        assert_close(f"{name} at both ends", x, want, GRADIENT_TOLERANCE[torch.float32])
    middle = new_params[64 : n - 101]
    assert bool((middle == middle[0]).all()), "coordinates with equal inputs came out different"
    with torch.no_grad():
        lstm_step_(params, grads.detach(), LSTMState(data.detach(), n), few.weights, backend=backend)
    assert_same_bits("params in place", params, new_params.detach())
    assert torch.equal(data[:-1], state.data[:-1]), "the state in place differs"  # all but the tile with unused lanes
