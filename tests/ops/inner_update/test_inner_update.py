"""inner_update: results and gradients against the float64 reference, bits, tasks that rest, NaN, threads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from metakern.ops import inner_update
from metakern.ops.inner_update import reference
from metakern.ops.inner_update.autograd import FUSED_ELEMENTS
from tests.conftest import FORWARD_TOLERANCE, assert_close, assert_same_bits
from tests.update_problems import LAYOUTS, SHAPES, draw, expected, make_lr, step_of, with_nan

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVE = torch.tensor([True, False, True])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip_norm": 5.0},
    "some rest": {"active": ACTIVE},
    "clipped, some rest": {"clip_norm": 5.0, "active": ACTIVE},
}


@pytest.fixture(params=["cpp", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """Backends for every dtype on the CPU; Triton's interpreter truncates bfloat16, see test_triton.py."""
    return str(request.param)


# --------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_without_options_the_bits_are_those_of_the_formula(
    large: bool, recorded: bool, dtype: torch.dtype, layout: str, capability: str
) -> None:
    shapes = [*SHAPES, (FUSED_ELEMENTS // 3,)] if large else SHAPES
    params, grads, lr = draw(3, dtype, 0, shapes), draw(3, dtype, 1, shapes), make_lr(layout, dtype, shapes)
    params[0].requires_grad_(recorded)
    got = inner_update(params, grads, lr, step=step_of(layout), backend="cpp")
    for new, want in zip(got, reference.inner_update(params, grads, lr, step=step_of(layout)), strict=True):
        assert_same_bits("updated", new, want)


def test_every_instruction_set_gives_the_same_bits(capability: str) -> None:
    params, grads = draw(3, torch.float32, 0), draw(3, torch.float32, 1)
    got = inner_update(params, grads, 0.1, clip_norm=5.0, backend="cpp")
    factors = [min(1.0, 5.0 / math.sqrt(sum(float(g[t].double().square().sum()) for g in grads))) for t in range(3)]
    rate = torch.tensor(0.1)
    for p, g, new in zip(params, grads, got, strict=True):
        for task in range(3):
            assert_same_bits("updated", new[task], p[task] - rate * (g[task] * torch.tensor(factors[task])))


@pytest.mark.sanitize
def test_tensors_of_different_dtypes_share_a_norm() -> None:
    params = [x.to(dtype) for x, dtype in zip(draw(2, torch.float64, 0), [*DTYPES, *DTYPES], strict=False)]
    grads = [x.to(p.dtype) for x, p in zip(draw(2, torch.float64, 1), params, strict=True)]
    got = inner_update(params, grads, 0.1, clip_norm=5.0, backend="cpp")
    for new, p, want in zip(got, params, expected(params, grads, 0.1, clip_norm=5.0), strict=True):
        assert_close("updated", new, want, FORWARD_TOLERANCE[p.dtype])


def test_a_gradient_whose_squares_overflow_float32_is_clipped_to_the_norm() -> None:
    (got,) = inner_update([torch.zeros(1, 4)], [torch.full((1, 4), 1e30)], 1.0, clip_norm=2.0, backend="cpp")
    assert_close("updated", got, torch.full((1, 4), -1.0), 1e-6)


@pytest.mark.sanitize
def test_nothing_to_update(backend: str) -> None:
    assert inner_update([], [], 0.1, backend=backend) == []
    (got,) = inner_update([torch.ones(0, 3)], [torch.ones(0, 3)], 0.1, clip_norm=1.0, backend=backend)
    assert got.shape == (0, 3)


# ---------------------------------------------------------------------------------------------- isolation of tasks


@pytest.mark.sanitize
@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tasks_that_rest_keep_their_bits(dtype: torch.dtype, clip_norm: float | None, backend: str) -> None:
    params = draw(3, dtype, 0)
    params[0][1, 0, 0] = -0.0
    params[0][1, 0, 1] = math.nan
    grads = [g.clone() for g in draw(3, dtype, 1)]
    for g in grads:
        g[1] = math.nan
    lr = torch.tensor(0.1, dtype=dtype, requires_grad=True)
    got = inner_update(params, grads, lr, clip_norm=clip_norm, active=ACTIVE, backend=backend)
    everyone = inner_update(params, grads, lr, clip_norm=clip_norm, backend=backend)
    for p, new, unmasked in zip(params, got, everyone, strict=True):
        assert_same_bits("a task that rests", new[1], p[1])
        assert_same_bits("a task that steps", new[::2], unmasked[::2])
    (slope,) = torch.autograd.grad(sum(new[::2].sum() for new in got) + got[1][1].sum(), lr)
    assert slope.isfinite()  # a resting task has no influence, whatever its gradient


def test_nan_in_one_element_stays_there_without_clipping(backend: str) -> None:
    params, grads = draw(3, torch.float32, 0, [(1025,)]), draw(3, torch.float32, 1, [(1025,)])
    clean = inner_update(params, grads, 0.1, backend=backend)[0]
    got = inner_update(params, with_nan(grads, 2), 0.1, backend=backend)[0]
    assert got[2, 0].isnan()
    got[2, 0] = clean[2, 0]
    assert_same_bits("everything else", got, clean)


# --------------------------------------------------------------------------------------------------- determinism


# --------------------------------------------------------------------------------------------------- derivatives


def test_derivatives_of_clipping_a_gradient_of_zero_are_finite(backend: str) -> None:
    g = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    (new,) = inner_update([torch.ones_like(g)], [g], 0.1, clip_norm=1.0, backend=backend)
    (first,) = torch.autograd.grad(new.square().sum(), g, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), g)
    assert first.isfinite().all()
    assert second.isfinite().all()
