"""Clipped gradients and several activations in csrc/mlp_inner_loop/cuda_kernels.cu, run on the CPU thread by thread."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conftest import GRADIENT_TOLERANCE, assert_close, assert_same_bits
from tests.cuda.device import Device
from tests.mlp_problems import F64, Case, assert_equal
from tests.ops.mlp_inner_loop.emulator import ONE_STEP, WITHOUT_ADJOINT, Arguments, MlpEmulator
from tests.ops.mlp_inner_loop.test_activations import exploding, plain
from tests.ops.mlp_inner_loop.test_cuda import F32, adapt, arguments, assert_same, meta, small


@pytest.mark.parametrize("clip_norm", [None, 1e6])
def test_an_infinite_gradient_of_a_dead_unit_is_zero(clip_norm: float | None, mlp: MlpEmulator) -> None:
    case = Case([1, 3, 1], 2)
    case.params, case.support, case.query = exploding(2)
    a = arguments(case, F64, 0.01, 2, clip_norm=clip_norm)
    losses, task_grads = mlp.mlp_meta_loss(a, [0.0, 1.0])
    grads, _ = mlp.mlp_meta_loss_backward(torch.ones(2, dtype=F64), task_grads, a)
    for got, want in zip([losses, *grads], plain(case.params, case.support, case.query, 0.01), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_steps_that_do_not_fit_give_the_same_bits_as_those_that_do(mlp: MlpEmulator) -> None:
    case = Case([17, 20, 4], 3)
    options = {"steps": 4, "step_weights": [0.1] * 4, "activation": "tanh", "clip_norm": 2.0}
    expected = meta(mlp, case, F32, **options)
    assert_equal(expected, case.meta("reference", **options), GRADIENT_TOLERANCE[F32])
    for placement, every in ((ONE_STEP, 4), (ONE_STEP, 2), (WITHOUT_ADJOINT, 2)):
        device = small(case, mlp, placement, 4, every, "tanh")
        assert_same(meta(mlp, case, F32, device=device, checkpoint_every=every, **options), expected)
    a = arguments(case, F32, 0.1, 4, activation="tanh", clip_norm=2.0)
    losses = mlp.mlp_meta_loss(a, [0.1] * 4, False)[0]  # without gradients less memory is needed
    assert_same_bits("losses", losses, expected[0])


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
def test_same_bits_in_every_schedule(order: str, mlp: MlpEmulator) -> None:
    case = Case([17, 20, 4], 3, 6, 5, "cross_entropy")
    options: dict[str, Any] = {"steps": 3, "checkpoint_every": 2, "first_order": (False, True, False)}
    options |= {"clip_norm": 0.5, "activation": "sigmoid"}
    for lr in (0.1, [torch.full((), 0.1)], [0.1 + 0.05 * case.draw(*p.shape) for p in case.params]):
        scheduled = Device(multiprocessors=1, order=order, seed=2)
        assert_same(*(meta(mlp, case, F32, lr, on, **options) for on in (Device(), scheduled)))
        assert_same(*(adapt(mlp, case, F32, lr, on, **options) for on in (Device(), scheduled)))


def test_squares_that_overflow_float32_are_clipped_and_zeros_are_not(mlp: MlpEmulator) -> None:
    case = Case([2, 5, 1], 3)
    x, y = case.support
    y[0], y[1] = y[0] * 1e25, y[1] * 1e30
    case.params[0][:], case.params[1][:] = 0, 0
    y[2] = case.params[3]
    a = arguments(case, F32, 1.0, 1, clip_norm=1.0)
    a = Arguments(a.problem, a.params, a.lr, (x.float(), y.float(), None))
    moved, _ = mlp.mlp_inner_loop(a)
    norms = torch.cat([(p - m).flatten(1) for p, m in zip(a.params, moved, strict=True)], 1).norm(dim=1)
    assert_close("length of the step", norms, torch.tensor([1.0, 1.0, 0.0]), 1e-5)
