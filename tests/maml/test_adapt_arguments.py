"""The forms in which adapt takes support sets: a pair, as meta_loss, or x and y one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern import adapt
from tests.conftest import assert_same_bits
from tests.inner_loops import Episode, mlp, regression

pytestmark = pytest.mark.usefixtures("one_thread")


class Sum(nn.Module):
    """Takes two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1, dtype=torch.float64)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.layer(a + b)


@pytest.fixture
def episode() -> Episode:
    return regression(3, 4, 5, 2, 1)


def parameters(model: nn.Module, *support: Any, **options: Any) -> Tensor:
    adapted = adapt(model, *support, steps=2, lr=0.1, **options)
    return torch.cat([p.detach().flatten(1) for p in adapted.parameters.values()], 1)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_pair_is_x_and_y(episode: Episode, backend: str) -> None:
    net, (x, y) = mlp(2, 5, 1), episode.support
    expected = parameters(net, x, y, backend=backend)
    assert_same_bits("pair", parameters(net, (x, y), backend=backend), expected)
    assert_same_bits("by keyword", parameters(net, support_x=x, support_y=y, backend=backend), expected)
    assert_same_bits("pair by keyword", parameters(net, support_x=(x, y), backend=backend), expected)


def test_a_pair_of_several_inputs(episode: Episode) -> None:
    (x, y), net = episode.support, Sum()
    expected = parameters(net, (x, 2 * x), y)
    assert_same_bits("pair", parameters(net, ((x, 2 * x), y)), expected)
    named = parameters(net, ({"a": x, "b": 2 * x}, y))
    assert_same_bits("dict", named, expected)


def test_a_loss_without_a_target(episode: Episode) -> None:
    """Several inputs beside no target are told from a pair by the None."""
    x = episode.support[0]
    loss = torch.Tensor.mean
    expected = parameters(mlp(2, 5, 1), x, None, loss=loss)
    assert_same_bits("x alone", parameters(mlp(2, 5, 1), x, loss=loss), expected)
    assert_same_bits("pair", parameters(mlp(2, 5, 1), (x, None), loss=loss), expected)
    net = Sum()
    expected = parameters(net, (x, x), None, loss=loss)
    assert_same_bits("pair of a pair", parameters(net, ((x, x), None), loss=loss), expected)


def test_a_pair_in_torch_compile(episode: Episode) -> None:
    net, pair = mlp(2, 5, 1), episode.support

    def losses(x: Tensor, y: Tensor, *, paired: bool) -> Tensor:
        support = ((x, y),) if paired else (x, y)
        return F.mse_loss(adapt(net, *support, steps=2, lr=0.1, backend="reference")(x), y)

    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)
    assert_same_bits("loss", compiled(*pair, paired=True).detach(), compiled(*pair, paired=False).detach())


def test_a_tuple_of_other_lengths_is_inputs(episode: Episode) -> None:
    x = episode.support[0]
    with pytest.raises(TypeError, match="forward"):
        adapt(Sum(), (x, x, x), loss=torch.Tensor.mean)
