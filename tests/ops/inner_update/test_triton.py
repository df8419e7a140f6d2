"""inner_update by Triton kernels, held to the reference.

Axis legend: T tasks, K inner steps, ``*shape`` the shape of one parameter tensor of the model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the package triton")

from metakern.ops.core import triton_launch
from metakern.ops.inner_update import triton as triton_inner_update
from tests.conftest import FORWARD_TOLERANCE, assert_close, assert_same_bits
from tests.update_problems import Update, make_update

pytestmark = pytest.mark.usefixtures("interpreter_like_a_gpu")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def update(problem: Update) -> list[Tensor]:
    return problem.run("triton")


def assert_matches_reference(problem: Update) -> None:
    """By the float64 reference and the table in tests/conftest.py; shapes and dtypes are those of the params."""
    expected = problem.expected(torch.float64)
    for index, (new, want, p) in enumerate(zip(update(problem), expected, problem.params, strict=True)):
        assert new.dtype == p.dtype
        assert_close(f"tensor {index}", new.cpu(), want.cpu(), FORWARD_TOLERANCE[p.dtype])


def test_every_tensor_may_have_a_dtype_of_its_own_and_so_may_its_rate(device: torch.device) -> None:
    parts = [make_update(2, "per parameter", dtype, shapes=[(130,)], device=device) for dtype in DTYPES]
    turned = [*DTYPES[1:], DTYPES[0]]
    params, grads = [part.params[0] for part in parts], [part.grads[0] for part in parts]
    lr = [part.lr[0].to(dtype) for part, dtype in zip(parts, turned, strict=True)]
    assert_matches_reference(Update(params, grads, lr, clip_norm=1.0))


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_squares_that_float32_cannot_hold(scale: float, device: torch.device) -> None:
    problem = make_update(2, shapes=[(40,)], device=device)
    assert_matches_reference(replace(problem, grads=[g * scale for g in problem.grads], clip_norm=scale))


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
