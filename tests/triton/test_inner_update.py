"""inner_update by Triton kernels, held to the reference.

Axis legend: T tasks, K inner steps, ``*shape`` the shape of one parameter tensor of the model.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from metakern.ops.core import triton_launch
from metakern.ops.inner_update import triton as triton_inner_update
from tests.conftest import FORWARD_TOLERANCE, assert_close, assert_same_bits
from tests.update_problems import RATES, SHAPES, Update, make_update

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def update(problem: Update) -> list[Tensor]:
    return problem.run("triton")


def assert_matches_reference(problem: Update) -> None:
    """By the float64 reference and the table in tests/conftest.py; shapes and dtypes are those of the params."""
    expected = problem.expected(torch.float64)
    for index, (new, want, p) in enumerate(zip(update(problem), expected, problem.params, strict=True)):
        assert new.dtype == p.dtype
        assert_close(f"tensor {index}", new.cpu(), want.cpu(), FORWARD_TOLERANCE[p.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("resting", [None, (1,)], ids=["all step", "one rests"])
@pytest.mark.parametrize("clip_norm", [None, 2.0])
def test_rates_dtypes_clipping_and_resting_tasks(
    clip_norm: float | None, resting: tuple[int, ...] | None, rates: str, dtype: torch.dtype, device: torch.device
) -> None:
    assert_matches_reference(make_update(3, rates, dtype, clip_norm=clip_norm, resting=resting, device=device))


@pytest.mark.parametrize("n", [1, 2, 3, 31, 32, 33, 1023, 1024, 1025, 4099])
@pytest.mark.parametrize("rates", ["number", "per parameter"])
@pytest.mark.parametrize("tasks", [1, 4])
def test_every_tail(tasks: int, rates: str, n: int, device: torch.device) -> None:
    for clip_norm in (None, 0.5):
        assert_matches_reference(make_update(tasks, rates, shapes=[(n,)], clip_norm=clip_norm, device=device))


def test_tensors_of_one_task_without_a_task_axis(device: torch.device) -> None:
    one = make_update(1, "per parameter", device=device)
    params, grads = ([x[0] for x in xs] for xs in (one.params, one.grads))
    for new, want in zip(update(replace(one, params=params, grads=grads)), update(one), strict=True):
        assert_same_bits("new params", new, want[0])


@pytest.mark.parametrize("by_task", [False, True])
@pytest.mark.parametrize("shape", [(2,), (3, 2), (4, 3, 2)])
def test_rates_of_the_last_axes_alone_or_with_the_task_axis(
    shape: tuple[int, ...], by_task: bool, device: torch.device
) -> None:
    problem = make_update(4, shapes=[(3, 2)], resting=(2,) if by_task else None, device=device)
    assert_matches_reference(replace(problem, lr=[torch.rand(shape).to(device)]))


def test_every_tensor_may_have_a_dtype_of_its_own_and_so_may_its_rate(device: torch.device) -> None:
    parts = [make_update(2, "per parameter", dtype, shapes=[(130,)], device=device) for dtype in DTYPES]
    turned = [*DTYPES[1:], DTYPES[0]]
    params, grads = [part.params[0] for part in parts], [part.grads[0] for part in parts]
    lr = [part.lr[0].to(dtype) for part, dtype in zip(parts, turned, strict=True)]
    assert_matches_reference(Update(params, grads, lr, clip_norm=1.0))


def test_tensors_of_any_layout(device: torch.device) -> None:
    problem = make_update(2, "per parameter", shapes=[(3, 5)], clip_norm=1.0, device=device)
    strided = [[torch.stack([x] * 2, -1)[..., 0] for x in xs] for xs in (problem.params, problem.grads, problem.lr)]
    params, grads, lr = strided
    got = update(replace(problem, params=params, grads=grads, lr=lr))
    assert_same_bits("new params", got[0], update(problem)[0])


def test_nothing_to_update(device: torch.device) -> None:
    for tasks, shapes in ((0, SHAPES), (2, [(0,), (3, 0)])):
        problem = make_update(tasks, "per parameter", shapes=shapes, clip_norm=1.0, resting=(), device=device)
        assert [new.shape for new in update(problem)] == [p.shape for p in problem.params]


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_squares_that_float32_cannot_hold(scale: float, device: torch.device) -> None:
    problem = make_update(2, shapes=[(40,)], device=device)
    assert_matches_reference(replace(problem, grads=[g * scale for g in problem.grads], clip_norm=scale))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stays_with_its_task(value: float, device: torch.device) -> None:
    clean = make_update(3, clip_norm=1.0, device=device)
    grads = [g.clone() for g in clean.grads]
    grads[0][1, 0, 0] = value
    dirty = replace(clean, grads=grads)
    for new, before in zip(update(dirty), update(clean), strict=True):
        assert_same_bits("other tasks", new[[0, 2]], before[[0, 2]])
    assert_matches_reference(dirty)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tasks_that_rest_keep_their_bits(dtype: torch.dtype, device: torch.device) -> None:
    problem = make_update(3, "per parameter", dtype, clip_norm=1.0, resting=(0, 2), device=device)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for p in problem.params:
        p[0] = -0.0
        p[2] = torch.tensor(-1, dtype=integer).view(dtype)  # a NaN whose payload arithmetic does not keep
    for new, p in zip(update(problem), problem.params, strict=True):
        assert_same_bits("resting tasks", new[[0, 2]], p[[0, 2]])


def test_blocks_change_no_element(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    problem = make_update(2, "per parameter", shapes=[(3000,)], device=device)
    expected = update(problem)
    monkeypatch.setattr(triton_inner_update, "MAX_BLOCK", 128)
    assert_same_bits("new params", update(problem)[0], expected[0])


def test_two_runs_give_the_same_bits(device: torch.device) -> None:
    problem = make_update(2, clip_norm=1.0, shapes=[(5000,), (3,)], device=device)
    for new, again in zip(update(problem), update(problem), strict=True):
        assert_same_bits("new params", again, new)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_launches(clip_norm: float | None, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    launched: list[Any] = []
    launch = triton_inner_update.launch_in_parts

    def counted(kernel: Any, *args: Any, **constants: Any) -> None:
        launched.append(kernel)
        launch(kernel, *args, **constants)

    monkeypatch.setattr(triton_inner_update, "launch_in_parts", counted)
    update(make_update(3, shapes=[(3, 2), (5,), (0,)], clip_norm=clip_norm, device=device))
    assert len(launched) == (2 if clip_norm is None else 5)


def test_schema_is_that_of_the_compiled_operator(device: torch.device) -> None:
    compiled, schema = (
        str(getattr(torch.ops.metakern, name).default._schema) for name in ("inner_update", "inner_update_triton")
    )
    assert schema.replace("_triton", "").replace("SymInt", "int") == compiled
    for clip_norm, resting in ((None, None), (1.0, (1,))):
        problem = make_update(2, "per tensor and step", clip_norm=clip_norm, resting=resting, device=device)
        torch.library.opcheck(
            torch.ops.metakern.inner_update_triton.default, problem.arguments(), test_utils="test_schema"
        )


def test_more_programs_than_one_launch_takes_are_several_launches(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    problem = make_update(5, "per parameter", shapes=[(3,), (1500,)], clip_norm=1.0, resting=(1,), device=device)
    whole = update(problem)
    monkeypatch.setattr(triton_launch, "MAX_GRID", 2)
    for new, want in zip(update(problem), whole, strict=True):
        assert_same_bits("new params", new, want)


def test_a_grid_that_no_launch_takes_is_refused() -> None:
    with pytest.raises(RuntimeError, match="too large: they take 2147483648 programs, and one launch at most"):
        triton_launch.launch(None, 2**31, triton_launch.Config(32, 4))


#: Beyond float32's range on both sides, of 53 bits, and subnormal as float64.
NUMBERS = (1e39, -1e39, 1e-50, -0.1, 1 + 2**-52, 3e-310)


@pytest.mark.parametrize("rate", NUMBERS)
def test_float64_takes_a_rate_as_it_is(rate: float, device: torch.device) -> None:
    problem = replace(make_update(2, dtype=torch.float64, shapes=[(5,)], device=device), rate=rate)
    problem.params[0].zero_()
    assert_same_bits("new params", update(problem)[0], 0 - rate * problem.grads[0])


def test_float32_rounds_a_rate_to_the_nearest(device: torch.device) -> None:
    for rate in (0.1, 1e39, -1e39, 1e-50, 1 + 2**-24, 1 + 3 * 2**-24):
        problem = replace(make_update(2, shapes=[(5,)], device=device), rate=rate)
        problem.params[0].zero_()
        rounded = torch.tensor(rate, dtype=torch.float32, device=device)
        assert_same_bits("new params", update(problem)[0], 0 - rounded * problem.grads[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("clip_norm", [1e39, 1e-30])
def test_a_norm_to_clip_to_beyond_float32(clip_norm: float, dtype: torch.dtype, device: torch.device) -> None:
    assert_matches_reference(make_update(2, dtype=dtype, shapes=[(5,), (3, 2)], clip_norm=clip_norm, device=device))
    lone = make_update(1, dtype=torch.float64, shapes=[(4,)], clip_norm=1e39, device=device)
    lone.grads[0].fill_(1e50)
    lone.params[0].zero_()
    assert_close("new params", update(lone)[0], torch.full_like(lone.params[0], -0.3 * 5e38), 1e-12)
