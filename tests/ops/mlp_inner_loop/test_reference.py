"""The reference of mlp_inner_loop against one task after another, by functional_call and autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metakern.ops.mlp_inner_loop.reference import mlp_inner_loop, predict, task_losses
from tests.conftest import assert_close
from tests.inner_loops import Episode, hand_written, mlp, regression


@pytest.mark.parametrize(("name", "module"), [("relu", nn.ReLU), ("tanh", nn.Tanh), ("gelu", nn.GELU)])
@pytest.mark.parametrize("loss", [F.mse_loss, F.cross_entropy, F.binary_cross_entropy_with_logits])
@pytest.mark.parametrize("first_order", [False, True])
def test_equals_a_hand_written_loop(name: str, module: type[nn.Module], loss: object, first_order: bool) -> None:
    net, episode = mlp(2, 5, 4, activation=module), regression(3, 6, 5, 2, 4)
    kind = {F.mse_loss: "mse", F.cross_entropy: "cross_entropy"}.get(loss, "binary_cross_entropy_with_logits")
    sets = [episode.support, episode.query]
    if kind == "cross_entropy":
        sets = [(x, y.argmax(-1)) for x, y in sets]
    elif kind != "mse":
        sets = [(x, (y > 0).double()) for x, y in sets]
    params = list(net.parameters())
    trajectory = mlp_inner_loop(
        params,
        *sets[0],
        None,
        0.1,
        steps=3,
        per_step=False,
        adapted=[True] * 4,
        first_order=[first_order] * 3,
        activation=name,
        loss=kind,
    )
    losses = task_losses(predict(trajectory[-1], sets[1][0], name), sets[1][1], kind)
    expected = hand_written(net, Episode(*sets), 3, lambda *_: 0.1, loss=loss, first_order=first_order)
    assert_close("losses", losses, expected, 1e-12)
    for a, b in zip(*(torch.autograd.grad(x.sum(), params) for x in (losses, expected)), strict=True):
        assert_close("meta-gradient", a, b, 1e-11)


def test_a_mask_leaves_samples_out() -> None:
    prediction, y = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    expected = torch.stack([F.mse_loss(prediction[t][mask[t]], y[t][mask[t]]) for t in range(2)])
    assert_close("losses", task_losses(prediction, y, "mse", mask), expected, 1e-13)
