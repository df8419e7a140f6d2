"""Clipped gradients and several activations in Triton's mlp_inner_loop, held to the reference and to loops by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="needs the package triton")

from metakern.ops import mlp_inner_loop, mlp_meta_loss
from metakern.ops.core.triton_launch import is_interpreted
from metakern.ops.mlp_inner_loop import triton as triton_mlp
from tests.conftest import assert_close, assert_same_bits
from tests.inner_loops import assert_same, hand_written, mlp, regression
from tests.mlp_problems import F64, Case, assert_equal
from tests.ops.mlp_inner_loop.test_activations import assert_dead_units_have_no_gradient
from tests.ops.mlp_inner_loop.test_triton import make_case
from tests.triton.memory_model import Watch

pytestmark = pytest.mark.usefixtures("interpreter_like_a_gpu", "quick_interpreter")


@pytest.mark.skipif(not is_interpreted(), reason="the loop by hand runs on the CPU")
def test_equals_a_loop_by_hand() -> None:
    net, episode = mlp(2, 5, 3, activation=lambda: nn.LeakyReLU(0.2)), regression(2, 4, 3, 2, 3)
    rate, params = torch.tensor(0.3, dtype=F64, requires_grad=True), list(net.parameters())
    options = {"steps": 2, "activation": "leaky_relu:0.2", "clip_norm": 1.5, "backend": "triton"}
    losses = mlp_meta_loss(params, episode.support, episode.query, lr=rate, **options)
    assert_same(losses, hand_written(net, episode, 2, lambda *_: rate, clip_norm=1.5), [*params, rate])


@pytest.mark.skipif(not is_interpreted(), reason="the loop by hand runs on the CPU")
@pytest.mark.parametrize("clip_norm", [None, 1e6])
def test_an_infinite_gradient_of_a_dead_unit_is_zero(clip_norm: float | None) -> None:
    assert_dead_units_have_no_gradient(2, clip_norm, "triton")


def test_a_gradient_of_zero_and_one_that_is_not_finite_leave_the_others_alone(device: torch.device) -> None:
    case = make_case(device, [2, 3, 2], 3, own=True)
    options: dict[str, Any] = {"steps": 1, "clip_norm": 0.1}
    before = case.meta("triton", **options)
    case.params[0][1] = case.params[1][1] = 0
    case.support[1][1] = case.params[3][1]
    case.support[0][2].view(-1)[0] = torch.nan
    after = case.meta("triton", **options)
    for index, (a, b) in enumerate(zip(after, before, strict=True)):
        assert_same_bits(f"result {index}", a[:1], b[:1])
        assert a[1].isfinite().all()
    assert after[0][2].isnan()
    case.support[0][2] = 1
    assert_equal(case.meta("triton", **options), case.meta("reference", **options), 1e-10)


def test_squares_that_overflow_float32_are_clipped(device: torch.device) -> None:
    case = make_case(device, [2, 5, 1])
    x, y = (t.float() for t in (case.support[0], case.support[1] * 1e25))
    params = [p.float() for p in case.params]
    moved = mlp_inner_loop(params, x, y, lr=1.0, steps=1, clip_norm=1.0, backend="triton")
    norms = torch.cat([(p - m).flatten(1) for p, m in zip(params, moved, strict=True)], 1).norm(dim=1)
    assert_close("length of the step", norms, torch.ones(2), 1e-5)


@pytest.mark.skipif(not is_interpreted(), reason="the interpreter is what is watched")
@pytest.mark.parametrize("learned", [False, True])
def test_barriers_order_every_access(learned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([3, 18, 7, 2], 1, 17, 2, own=True)
    lr = [torch.full((2, *p.shape[1:]), 0.1, dtype=F64) for p in case.params] if learned else 0.1
    watch = Watch(monkeypatch, triton_mlp)
    options = {"steps": 2, "activation": ["tanh", "leaky_relu:0.2"], "checkpoint_every": 1, "clip_norm": 0.1}
    case.meta("triton", lr=lr, per_step=learned, **options)
    assert watch.accesses > 500
    assert watch.phases > 30


@pytest.mark.parametrize(
    ("activation", "slopes", "norm"),
    [([5], [], None), ([1, 1, 1], [], None), ([4], [0.1, 0.1], None), ([4], [-0.5], None), ([1], [], -0.5)],
    ids=itertools.count(),
)
def test_the_operator_refuses_what_the_compiled_one_does(
    activation: list[int], slopes: list[float], norm: float | None, device: torch.device
) -> None:
    raised = []
    for place, suffix in ((torch.device("cpu"), ""), (device, "_triton")):
        case, flags = make_case(place, [2, 4, 3, 1], 3), torch.ones(2, dtype=torch.bool)
        arguments = [case.params, *case.support, None, [], 0.1, 2, False, -1, activation, 0, 1, False, flags]
        with pytest.raises(ValueError, match="must") as error:
            getattr(torch.ops.metakern, f"mlp_inner_loop{suffix}")(*arguments, slopes, norm)
        raised.append(str(error.value).partition("\n")[0])
    assert raised[0] == raised[1]
