"""Clipped gradients in mlp_inner_loop and mlp_meta_loss: against loops by hand, the reference, and bit by bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metakern.ops import mlp_inner_loop, mlp_meta_loss
from tests.conftest import assert_close, assert_same_bits
from tests.inner_loops import assert_same, hand_written, mlp, regression
from tests.mlp_problems import Case, assert_equal

F32, F64 = torch.float32, torch.float64
BACKENDS = ("cpp", "reference")  # Triton's: test_triton_clipping.py
NORMS = (0.05, 2.7, 1e3)  # below all gradients of these problems, between them, above them


def largest_norms(case: Case) -> Tensor:
    """Norm of every task's initial gradient by all parameters."""
    steps = mlp_inner_loop(case.params, *case.support, lr=1.0, steps=1, loss=case.loss, backend="reference")
    return torch.cat([(p - s).flatten(1) for p, s in zip(case.params, steps, strict=True)], 1).norm(dim=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first_order", [False, True, (False, True, False)], ids=["second", "first", "mixed"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_equals_a_loop_by_hand(
    activation: Callable[[], nn.Module], norm: float, first_order: Any, backend: str
) -> None:
    net, episode = mlp(2, 5, 3, activation=activation), regression(3, 4, 3, 2, 3)
    rate = torch.tensor(0.3, dtype=F64, requires_grad=True)
    params = list(net.parameters())
    kind = "relu" if activation is nn.ReLU else "tanh"
    options = {"steps": 3, "activation": kind, "clip_norm": norm, "first_order": first_order, "backend": backend}
    losses = mlp_meta_loss(params, episode.support, episode.query, lr=rate, **options)
    expected = hand_written(net, episode, 3, lambda *_: rate, first_order=first_order, clip_norm=norm)
    assert_same(losses, expected, [*params, rate])


def test_the_norms_of_these_tests_lie_below_between_and_above_the_gradients() -> None:
    norms = largest_norms(Case([3, 20, 4], 19))
    assert NORMS[0] < norms.min()
    assert norms.min() < NORMS[1] < norms.max()
    assert NORMS[2] > norms.max()


# ------------------------------------------------------------------------------------ numbers at the border


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_zero_is_not_clipped(backend: str) -> None:
    """Neither its root, whose derivative is infinite, nor a division by it."""
    case = Case([2, 3, 2], 3, own=True)
    perfect = nn.functional.linear(torch.zeros(5, 3, dtype=F64), case.params[2][1], case.params[3][1])
    case.params[0][1] = case.params[1][1] = 0
    case.support[1][1] = perfect
    options = {"steps": 2, "clip_norm": 0.1}
    got = case.meta(backend, **options)
    assert all(x.isfinite().all() for x in got)
    assert_equal(got, case.meta("reference", **options), 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_squares_that_overflow_float32_are_clipped(backend: str) -> None:
    """The norm of such a gradient is near 1e25."""
    case = Case([2, 5, 1], 3)
    case.support = case.support[0], case.support[1] * 1e25
    options = {"steps": 1, "clip_norm": 1.0, "activation": "tanh"}
    if backend == "reference":  # its squares are those of its dtype
        options["dtype"] = F64
    got, expected = case.meta(backend, **({"dtype": F32} | options)), case.meta("reference", **options)
    assert_close("losses", got[0], expected[0], 1e-5)
    moved = mlp_inner_loop([p.float() for p in case.params], *case.data(F32)[0], lr=1.0, steps=1, clip_norm=1.0)
    norms = torch.cat([(p.float() - m).flatten(1) for p, m in zip(case.params, moved, strict=True)], 1).norm(dim=1)
    assert_close("length of the step", norms, torch.ones(3), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_gradient_of_one_parameter_takes_no_step_elsewhere(backend: str) -> None:
    """With an infinite norm the factor is zero: finite gradients give no step, infinite ones NaN, as in PyTorch."""
    x, y = torch.tensor([[[1e200]], [[1.0]]], dtype=F64), torch.tensor([[[-1e200]], [[-1.0]]], dtype=F64)
    params = [torch.zeros(1, 1, dtype=F64), torch.zeros(1, dtype=F64)]
    weight, bias = mlp_inner_loop(params, x, y, lr=0.1, steps=1, clip_norm=1.0, backend=backend)
    assert weight[0].isnan()
    assert bias[0] == 0
    assert weight[1].isfinite()
    assert bias[1] < 0


# ------------------------------------------------------------------------------------ bits


def test_same_bits_with_and_without_a_graph_and_checkpoints() -> None:
    case, options = Case([3, 20, 4], 19), {"steps": 7, "step_weights": [0.1] * 7, "clip_norm": 2.7}
    expected = case.meta("cpp", **options)
    for every in (1, 3, 7):
        for index, (a, b) in enumerate(zip(case.meta("cpp", checkpoint_every=every, **options), expected, strict=True)):
            assert_same_bits(f"result {index}", a, b)
    with torch.no_grad():
        plain = mlp_meta_loss(case.params, case.support, case.query, lr=0.1, **options)
    assert_same_bits("losses", plain, expected[0])


def test_gradients_that_are_not_clipped_have_the_bits_of_those_without() -> None:
    case = Case([3, 20, 4], 19)
    results = [case.adapt("cpp", steps=2, clip_norm=norm)[:4] for norm in (1e6, None)]
    for index, (a, b) in enumerate(zip(*results, strict=True)):
        assert_same_bits(f"result {index}", a, b)


# ------------------------------------------------------------------------------------ torch


def flags(steps: int) -> Tensor:
    return torch.ones(steps, dtype=torch.bool)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("activation", "slopes", "norm", "message"),
    [
        ([5], [], None, "activation must be 0 to 4, got 5"),
        ([-1], [], None, "activation must be 0 to 4, got -1"),
        ([1, 1, 1], [], None, "activation must hold 1 kind or one for each of the 2 hidden layers, got 3"),
        ([], [], None, "activation must hold 1 kind or one for each of the 2 hidden layers, got 0"),
        ([4], [0.1, 0.1], None, "slopes must hold none or one for each of the 1 activations, got 2"),
        ([4], [-0.1], None, "slopes must be finite and not negative, got -0.1"),
        ([4], [math.inf], None, "slopes must be finite and not negative, got inf"),
        ([1], [], 0.0, "clip_norm must be positive and finite, got 0"),
        ([1], [], -1.0, "clip_norm must be positive and finite, got -1"),
        ([1], [], math.nan, "clip_norm must be positive and finite, got nan"),
    ],
)
def test_the_operator_called_directly_refuses(
    activation: list[int], slopes: list[float], norm: float | None, message: str
) -> None:
    case = Case([2, 4, 3, 1], 3)
    with pytest.raises(ValueError, match=message):
        torch.ops.metakern.mlp_inner_loop(
            case.params, *case.support, None, [], 0.1, 2, False, -1, activation, 0, 1, False, flags(2), slopes, norm
        )
