"""The reference of inner_update, held to a loop over tasks and to numerical derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metakern.ops.inner_update.reference import clip_coefficients, inner_update
from tests.conftest import assert_close, assert_same_bits

SHAPES = ((3, 2), (3,), ())


def tensors(tasks: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tasks, *shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def rates(kind: str, steps: int) -> float | Tensor | list[Tensor]:
    generator = torch.Generator().manual_seed(9)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    return {
        "number": 0.3,
        "tensor": draw(),
        "per tensor": [draw() for _ in SHAPES],
        "per tensor and step": [draw(steps) for _ in SHAPES],
        "per parameter": [draw(*shape) for shape in SHAPES],
        "per parameter and step": [draw(steps, *shape) for shape in SHAPES],
    }[kind]


KINDS = ("number", "tensor", "per tensor", "per tensor and step", "per parameter", "per parameter and step")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(tasks=st.sampled_from((1, 2, 7)), seed=st.integers(0, 99), clip=st.booleans(), step=st.integers(0, 2))
def test_equals_a_loop_over_tasks(kind: str, tasks: int, seed: int, clip: bool, step: int) -> None:
    params, grads, lr = tensors(tasks, seed), tensors(tasks, seed + 1), rates(kind, 3)
    per_step = kind.endswith("step")
    norm = 2.0 if clip else None
    got = inner_update(params, grads, lr, step=step if per_step else None, clip_norm=norm)
    for task in range(tasks):
        size = math.sqrt(sum(float(g[task].square().sum()) for g in grads))
        scale = min(1.0, 2.0 / size) if clip else 1.0
        for index, new in enumerate(got):
            rate = lr[index] if isinstance(lr, list) else lr
            rate = rate[step] if per_step else rate
            expected = params[index][task] - rate * grads[index][task] * scale
            assert_close(f"tensor {index} of task {task}", new[task], expected, 1e-14)


def test_clipping_is_that_of_torch() -> None:
    grads = tensors(7, 3)
    got = clip_coefficients(grads, 2.0)
    for task in range(7):
        parameters = [torch.zeros_like(g[task], requires_grad=True) for g in grads]
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g[task].clone()
        torch.nn.utils.clip_grad_norm_(parameters, 2.0)
        for p, g in zip(parameters, grads, strict=True):
            assert_close("clipped gradient", got[task] * g[task], p.grad, 1e-5)  # torch adds 1e-6 to the norm


def test_tasks_that_do_not_step_keep_their_bits() -> None:
    params, grads = tensors(3, 0), tensors(3, 1)
    params[0][1, 0, 0] = -0.0
    for g in grads:
        g[1] = math.nan
    active = torch.tensor([True, False, True])
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    got = inner_update(params, grads, lr, active=active, clip_norm=1.0)
    free = inner_update(params, grads, lr, clip_norm=1.0)
    for p, new, unmasked in zip(params, got, free, strict=True):
        assert_same_bits("a task that rests", new[1], p[1])
        assert_same_bits("a task that steps", new[0], unmasked[0])
    sum(new.sum() for new in got).backward()
    assert lr.grad is not None
    assert lr.grad.isfinite()  # a resting task has no influence, whatever its gradient


def test_nan_in_one_task_leaves_the_others_bits() -> None:
    params, grads = tensors(3, 0), tensors(3, 1)
    expected = inner_update(params, grads, 0.1, clip_norm=1.0)
    grads[1][2, 0] = math.nan
    for new, before in zip(inner_update(params, grads, 0.1, clip_norm=1.0), expected, strict=True):
        assert_same_bits("other tasks", new[:2], before[:2])
        assert new[2].isnan().all()  # their common norm is NaN


@pytest.mark.parametrize("clip_norm", [None, 2.0])
@pytest.mark.parametrize("kind", ["tensor", "per tensor and step", "per parameter"])
def test_first_and_second_derivatives(kind: str, clip_norm: float | None) -> None:
    params, grads, lr = tensors(2, 0), tensors(2, 1), rates(kind, 3)
    flat = list(lr) if isinstance(lr, list) else [lr]
    inputs = [x.clone().requires_grad_() for x in (*params, *grads, *flat)]
    active = torch.tensor([True, True])
    step = 1 if kind.endswith("step") else None

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        rate = list(leaves[6:]) if isinstance(lr, list) else leaves[6]
        new = inner_update(leaves[:3], leaves[3:6], rate, step=step, clip_norm=clip_norm, active=active)
        return tuple(new)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_derivatives_of_clipping_a_zero_gradient_are_finite() -> None:
    grads = [torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)]
    (first,) = torch.autograd.grad(
        clip_coefficients(grads, 1.0).sum() + grads[0].square().sum(), grads, create_graph=True
    )
    (second,) = torch.autograd.grad(first.sum(), grads)
    assert first.isfinite().all()
    assert second.isfinite().all()


def test_one_task_without_its_axis() -> None:
    params, grads = tensors(1, 0), tensors(1, 1)
    got = inner_update([p[0] for p in params], [g[0] for g in grads], 0.1)
    for new, batched in zip(got, inner_update(params, grads, 0.1), strict=True):
        assert_same_bits("update", new, batched[0])
