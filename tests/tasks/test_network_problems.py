"""Any network as a problem: its losses are torch's, its starting points too, and what cannot be drawn is named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metakern.tasks import NetworkProblem
from tests.tasks.draws import generator


def sines(split: str) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-3, 3, 30).view(30, 1) + {"train": 0.0, "valid": 0.1, "test": 0.2}[split]
    return x, x.sin()


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1, bias=False))


def test_losses_are_those_of_each_network_alone():
    problems = NetworkProblem(small, sines, loss=F.mse_loss, batch_size=5)
    batch = problems.sample(3, generator())
    params = batch.init_params()
    network, (x, y) = small(), sines("train")
    assert list(params) == [name for name, _ in network.named_parameters()]
    for task, loss in enumerate(batch.full_loss(params)):
        outputs = functional_call(network, {name: tensor[task] for name, tensor in params.items()}, (x,))
        torch.testing.assert_close(loss, F.mse_loss(outputs, y))


def test_minibatches_are_drawn_from_the_split():
    """The loss of the identity at 0 is the mean of squared targets: of a batch of one, the square of one target."""
    batch = NetworkProblem(lambda: nn.Linear(1, 1), sines, loss=F.mse_loss, batch_size=1).sample(200, generator())
    squares = batch.loss({"weight": torch.zeros(200, 1, 1), "bias": torch.zeros(200, 1)})
    distance = (squares.unsqueeze(1) - sines("train")[1].square().T).abs().amin(1)
    assert distance.max() < 1e-6
    assert len(squares.unique()) == 15  # x and -x have one square


def test_starting_points_are_those_of_torch():
    problems = NetworkProblem(lambda: nn.Conv1d(3, 5, 7), lambda _: (torch.zeros(1), torch.zeros(1)))
    drawn = problems.sample(100, generator()).init_params()
    bound = 21**-0.5
    assert {name: tensor.shape for name, tensor in drawn.items()} == {"weight": (100, 5, 3, 7), "bias": (100, 5)}
    for tensor in drawn.values():
        assert 0.99 * bound < tensor.abs().max() <= bound
        assert tensor.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    normed = NetworkProblem(small, sines, loss=F.mse_loss).sample(2, generator()).init_params()
    assert (normed["1.weight"] == 1).all()  # the normalisation's
    assert (normed["1.bias"] == 0).all()


def test_making_networks_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    NetworkProblem(small, sines)
    assert torch.equal(torch.rand(1), expected)


def test_a_split_changes_the_data_alone():
    problems = NetworkProblem(small, sines, loss=F.mse_loss, batch_size=5)
    valid = problems.split("valid")
    assert torch.equal(valid.inputs, sines("valid")[0])
    assert torch.equal(problems.inputs, sines("train")[0])
    assert valid.batch_size == 5


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="make must give networks with parameters, got a Tanh of none"):
        NetworkProblem(nn.Tanh, sines)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        NetworkProblem(small, sines, batch_size=0)
    with pytest.raises(
        ValueError, match=r"linear and convolution layers, got weight_ih_l0 of RNN; build it of nn\.Linear"
    ):
        NetworkProblem(lambda: nn.RNN(1, 2), sines)
