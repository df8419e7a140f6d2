"""inner_update: results and gradients against the float64 reference, bits, tasks that rest, NaN, threads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metakern.ops import inner_update
from metakern.ops.inner_update import reference
from metakern.ops.inner_update.autograd import FUSED_ELEMENTS
from tests.conftest import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close, assert_same_bits
from tests.updates import LAYOUTS, SHAPES, draw, expected, make_lr, step_of, with_nan

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVE = torch.tensor([True, False, True])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip_norm": 5.0},
    "some rest": {"active": ACTIVE},
    "clipped, some rest": {"clip_norm": 5.0, "active": ACTIVE},
}


# Under the sanitizers a test takes twenty times as long.
SANITIZED_TAILS = [pytest.param(n, marks=pytest.mark.sanitize) for n in (0, 1, 33, 4097)]


@pytest.fixture(params=["cpp", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """What serves every dtype on the CPU; Triton, whose interpreter cuts bfloat16, has its tests in tests/triton."""
    return str(request.param)


#: The reference rounds every intermediate of bfloat16 and float16, the norm too, where kernels round the result alone.
REFERENCE_ROUNDINGS = 8


def tolerance(dtype: torch.dtype, backend: str) -> float:
    wide = backend != "reference" or dtype in (torch.float32, torch.float64)
    return FORWARD_TOLERANCE[dtype] * (1 if wide else REFERENCE_ROUNDINGS)


# --------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_layout_and_option(dtype: torch.dtype, layout: str, options: str, backend: str) -> None:
    params, grads, lr = draw(3, dtype, 0), draw(3, dtype, 1), make_lr(layout, dtype)
    arguments = {"step": step_of(layout), **OPTIONS[options]}
    got = inner_update(params, grads, lr, **arguments, backend=backend)
    for index, (new, want) in enumerate(zip(got, expected(params, grads, lr, **arguments), strict=True)):
        assert new.dtype == dtype
        assert_close(f"tensor {index}", new, want, tolerance(dtype, backend))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", ["number", "per parameter and step"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [*SANITIZED_TAILS, 3, 31, 1023, 1025, 4096, 9001])
def test_every_tail_on_every_instruction_set(
    n: int, dtype: torch.dtype, layout: str, options: str, capability: str
) -> None:
    shapes = [(n,), (2,)]
    params, grads = draw(3, dtype, 0, shapes), draw(3, dtype, 1, shapes)
    lr, arguments = make_lr(layout, dtype, shapes), {"step": step_of(layout), **OPTIONS[options]}
    got = inner_update(params, grads, lr, **arguments, backend="cpp")
    for new, want in zip(got, expected(params, grads, lr, **arguments), strict=True):
        assert_close(f"{n} elements", new, want, FORWARD_TOLERANCE[dtype])


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


@settings(max_examples=40, deadline=None)
@given(
    tasks=st.integers(1, 9),
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    layout=st.sampled_from(LAYOUTS),
    clip=st.sampled_from((None, 0.5, 1e6)),
    rest=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_list_of_tensors(
    tasks: int, sizes: list[int], layout: str, clip: float | None, rest: bool, seed: int
) -> None:
    shapes = [(size,) for size in sizes]
    params, grads = draw(tasks, torch.float64, seed, shapes), draw(tasks, torch.float64, seed + 1, shapes)
    lr, active = make_lr(layout, torch.float64, shapes), torch.arange(tasks) % 2 == 0
    arguments = {"step": step_of(layout), "clip_norm": clip, "active": active if rest else None}
    got = inner_update(params, grads, lr, **arguments, backend="cpp")
    for new, want in zip(got, expected(params, grads, lr, **arguments), strict=True):
        assert_close("updated", new, want, FORWARD_TOLERANCE[torch.float64])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_of_one_task_need_no_task_axis(layout: str, backend: str) -> None:
    params, grads, lr = draw(None, torch.float32, 0), draw(None, torch.float32, 1), make_lr(layout, torch.float32)
    got = inner_update(params, grads, lr, step=step_of(layout), backend=backend)
    for new, p, want in zip(got, params, expected(params, grads, lr, step=step_of(layout)), strict=True):
        assert new.shape == p.shape
        assert_close("updated", new, want, FORWARD_TOLERANCE[torch.float32])


@pytest.mark.parametrize("layout", ["tensor", "per parameter", "per parameter and step"])
@pytest.mark.parametrize("lr_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lr_of_another_dtype(dtype: torch.dtype, lr_dtype: torch.dtype, layout: str, backend: str) -> None:
    params, grads, lr = draw(2, dtype, 0), draw(2, dtype, 1), make_lr(layout, lr_dtype)
    got = inner_update(params, grads, lr, step=step_of(layout), backend=backend)
    for new, want in zip(got, expected(params, grads, lr, step=step_of(layout)), strict=True):
        assert new.dtype == dtype
        assert_close("updated", new, want, tolerance(dtype, backend))


@pytest.mark.sanitize
def test_tensors_of_different_dtypes_share_a_norm() -> None:
    params = [x.to(dtype) for x, dtype in zip(draw(2, torch.float64, 0), [*DTYPES, *DTYPES], strict=False)]
    grads = [x.to(p.dtype) for x, p in zip(draw(2, torch.float64, 1), params, strict=True)]
    got = inner_update(params, grads, 0.1, clip_norm=5.0, backend="cpp")
    for new, p, want in zip(got, params, expected(params, grads, 0.1, clip_norm=5.0), strict=True):
        assert_close("updated", new, want, FORWARD_TOLERANCE[p.dtype])


@pytest.mark.sanitize
def test_tensors_that_are_not_contiguous() -> None:
    params, grads = ([x[:, ::2].transpose(0, 2) for x in draw(5, torch.float32, s, [(6, 3)])] for s in (0, 1))
    lr = [torch.rand(5, 3).t()]
    assert not params[0].is_contiguous()
    (got,) = inner_update(params, grads, lr, backend="cpp")
    assert_same_bits("updated", got, params[0] - lr[0] * grads[0])


def test_a_gradient_whose_squares_overflow_float32_is_clipped_to_the_norm() -> None:
    (got,) = inner_update([torch.zeros(1, 4)], [torch.full((1, 4), 1e30)], 1.0, clip_norm=2.0, backend="cpp")
    assert_close("updated", got, torch.full((1, 4), -1.0), 1e-6)


@pytest.mark.sanitize
def test_nothing_to_update(backend: str) -> None:
    assert inner_update([], [], 0.1, backend=backend) == []
    (got,) = inner_update([torch.ones(0, 3)], [torch.ones(0, 3)], 0.1, clip_norm=1.0, backend=backend)
    assert got.shape == (0, 3)


@pytest.mark.sanitize
def test_the_callers_tensors_are_untouched(backend: str) -> None:
    params, grads = draw(3, torch.float32, 0), draw(3, torch.float32, 1)
    kept = [x.clone() for x in (*params, *grads)]
    for new in inner_update(params, grads, 0.1, clip_norm=1.0, active=ACTIVE, backend=backend):
        new.fill_(7.0)
    for x, before in zip((*params, *grads), kept, strict=True):
        assert_same_bits("argument", x, before)


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


def test_nan_in_one_task_leaves_the_others_bits(backend: str) -> None:
    params, grads = draw(3, torch.float32, 0), draw(3, torch.float32, 1)
    clean = inner_update(params, grads, 0.1, clip_norm=1.0, backend=backend)
    for new, before in zip(
        inner_update(params, with_nan(grads, 2), 0.1, clip_norm=1.0, backend=backend), clean, strict=True
    ):
        assert_same_bits("other tasks", new[:2], before[:2])
        assert new[2].isnan().all()  # their common norm is NaN


def test_nan_in_one_element_stays_there_without_clipping(backend: str) -> None:
    params, grads = draw(3, torch.float32, 0, [(1025,)]), draw(3, torch.float32, 1, [(1025,)])
    clean = inner_update(params, grads, 0.1, backend=backend)[0]
    got = inner_update(params, with_nan(grads, 2), 0.1, backend=backend)[0]
    assert got[2, 0].isnan()
    got[2, 0] = clean[2, 0]
    assert_same_bits("everything else", got, clean)


# --------------------------------------------------------------------------------------------------- determinism


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype, threads: None) -> None:
    shapes = [(40_000,), (3,), (257, 129)]
    params, grads = draw(3, dtype, 0, shapes), draw(3, dtype, 1, shapes)
    results = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        results.append(inner_update(params, grads, 0.1, clip_norm=3.0, active=ACTIVE, backend="cpp"))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits("updated", b, a)


# --------------------------------------------------------------------------------------------------- derivatives


def leaves_of(layout: str, dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> tuple[list[Tensor], Any]:
    lr = make_lr(layout, dtype, shapes)
    flat = lr if isinstance(lr, list) else [lr] if isinstance(lr, Tensor) else []
    tensors = (*draw(3, dtype, 0, shapes), *draw(3, dtype, 1, shapes), *flat)
    return [x.clone().requires_grad_() for x in tensors], lr


def update_of_leaves(leaves: list[Tensor], lr: Any, count: int, **options: Any) -> tuple[Tensor, ...]:
    rates = leaves[2 * count :] if isinstance(lr, list) else leaves[2 * count] if isinstance(lr, Tensor) else lr
    return tuple(inner_update(leaves[:count], leaves[count : 2 * count], rates, **options))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_and_second_derivatives(layout: str, options: str, backend: str) -> None:
    shapes: list[tuple[int, ...]] = [(2, 2), (), (3,)]
    leaves, lr = leaves_of(layout, torch.float64, shapes)
    arguments = {**OPTIONS[options], "step": step_of(layout), "backend": backend}
    if "clip_norm" in arguments:  # within the range of the tasks' norms
        arguments["clip_norm"] = 2.5

    def function(*flat: Tensor) -> tuple[Tensor, ...]:
        return update_of_leaves(list(flat), lr, len(shapes), **arguments)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("options", ["plain", "clipped, some rest"])
@pytest.mark.parametrize("layout", ["number", "tensor", "per tensor and step", "per parameter"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_large_lists_in_every_dtype(dtype: torch.dtype, layout: str, options: str) -> None:
    shapes: list[tuple[int, ...]] = [(FUSED_ELEMENTS // 2,), (3,), ()]
    leaves, lr = leaves_of(layout, dtype, shapes)
    arguments = {**OPTIONS[options], "step": step_of(layout)}
    cotangents = draw(3, dtype, 2, shapes)
    got = torch.autograd.grad(update_of_leaves(leaves, lr, 3, backend="cpp", **arguments), leaves, cotangents)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    new = update_of_leaves(wide, lr, 3, backend="reference", **arguments)
    want = torch.autograd.grad(new, wide, [x.double() for x in cotangents])
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == dtype
        # A gradient of α sums 200,000 products in float32; its size is that of their root of squares.
        slack = 30 if index >= 6 else 1
        assert_close(f"gradient {index}", a, b, GRADIENT_TOLERANCE[dtype] * slack)


@pytest.mark.sanitize
@pytest.mark.parametrize("kind", range(3))
def test_only_what_requires_a_gradient_gets_one(kind: int) -> None:
    shapes: list[tuple[int, ...]] = [(2,), (3,)]
    leaves, lr = leaves_of("per tensor", torch.float32, shapes)
    for index, x in enumerate(leaves):
        x.requires_grad_(index // 2 == kind)
    sum(new.sum() for new in update_of_leaves(leaves, lr, 2, clip_norm=1.0, backend="cpp")).backward()
    assert [x.grad is not None for x in leaves] == [index // 2 == kind for index in range(6)]


def test_derivatives_of_clipping_a_gradient_of_zero_are_finite(backend: str) -> None:
    g = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    (new,) = inner_update([torch.ones_like(g)], [g], 0.1, clip_norm=1.0, backend=backend)
    (first,) = torch.autograd.grad(new.square().sum(), g, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), g)
    assert first.isfinite().all()
    assert second.isfinite().all()
