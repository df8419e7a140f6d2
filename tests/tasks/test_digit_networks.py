"""Networks on handwritten digits: each is the network it says it is, and its splits share no image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from metakern.tasks import DigitsCNN, DigitsMLP, DigitsRegression, DigitsRNN, NetworkProblem
from metakern.tasks.digit_networks import DIGITS_SPLITS, RowRNN, load_digits
from tests.tasks.draws import generator


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu"])
def test_perceptrons_are_those_of_torch(activation):
    problems = DigitsMLP(hidden_size=6, activation=activation)
    batch = problems.sample(2, generator())
    params = batch.init_params()
    layer = {"sigmoid": torch.nn.Sigmoid, "tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}[activation]
    network = torch.nn.Sequential(torch.nn.Linear(64, 6), layer(), torch.nn.Linear(6, 10))
    for task, loss in enumerate(batch.full_loss(params)):
        weights = {name: tensor[task] for name, tensor in params.items()}
        logits = functional_call(network, weights, (problems.inputs,))
        torch.testing.assert_close(loss, F.cross_entropy(logits, problems.targets))


@pytest.mark.parametrize(
    "problems",
    [DigitsMLP(6), DigitsMLP(6, "relu"), DigitsRegression(), DigitsCNN(3), DigitsRNN(5)],
    ids=["mlp", "relu", "regression", "cnn", "rnn"],
)
def test_batched_networks_compute_what_vmap_computes(problems):
    """Losses, gradients and second derivatives."""
    batch = problems.sample(3, generator())
    params = {name: p.double().requires_grad_() for name, p in batch.init_params().items()}
    data = batch.inputs[:90].double().view(3, 30, -1), batch.targets[:90].view(3, 30)
    found = []
    for losses in (problems.losses(params, *data), NetworkProblem.losses(problems, params, *data)):
        grads = torch.autograd.grad(losses.sum(), list(params.values()), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), list(params.values()))
        found.append([losses, *grads, *second])
    assert all(g.abs().max() > 0 for g in found[0])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_recurrent_network_reads_rows_as_nn_rnn_does():
    network = RowRNN(5)
    expected = nn.RNN(8, 5, batch_first=True)
    with torch.no_grad():
        expected.weight_ih_l0.copy_(network.row.weight)
        expected.bias_ih_l0.copy_(network.row.bias)
        expected.weight_hh_l0.copy_(network.recurrent.weight)
        expected.bias_hh_l0.zero_()
    images = load_digits("train")[0][:20]
    hidden = expected(images.view(20, 8, 8))[1].squeeze(0)
    torch.testing.assert_close(network(images), network.head(hidden))


@pytest.mark.parametrize(
    ("problems", "size"),
    [
        (DigitsRegression(32), 64 * 10 + 10),
        (DigitsMLP(batch_size=32), 64 * 20 + 20 + 20 * 10 + 10),
        (DigitsCNN(4, 32), 9 * 4 + 4 + 9 * 4 * 8 + 8 + 32 * 10 + 10),
        (DigitsRNN(6, 32), 8 * 6 + 6 + 6 * 6 + 6 * 10 + 10),
    ],
    ids=["regression", "mlp", "cnn", "rnn"],
)
def test_every_network_learns_digits(problems, size):
    """Adam takes full losses to half of log 10, that of a guess."""
    batch = problems.sample(2, generator())
    params = {name: tensor.requires_grad_() for name, tensor in batch.init_params().items()}
    assert sum(tensor.numel() for tensor in params.values()) == 2 * size
    assert batch.full_loss(params).min() > 2
    optimizer = torch.optim.Adam(params.values(), 0.03)
    for _ in range(60):
        optimizer.zero_grad()
        batch.loss(params).sum().backward()
        optimizer.step()
    assert batch.full_loss(params).max() < 1.2


def test_fresh_networks_start_within_the_bounds_of_nn_linear():
    params = DigitsMLP(hidden_size=20).sample(50, generator()).init_params()
    for name, bound in {"0.weight": 1 / 8, "0.bias": 1 / 8, "2.weight": 20**-0.5, "2.bias": 20**-0.5}.items():
        assert 0.98 * bound < params[name].abs().max() <= bound


def test_splits_share_no_image_and_hold_all():
    images = {name: load_digits(name)[0] for name in DIGITS_SPLITS}
    assert {name: len(x) for name, x in images.items()} == {"train": 1000, "valid": 397, "test": 400}
    rows = torch.cat(list(images.values()))
    assert len(rows) == 1797
    assert len(torch.unique(rows, dim=0)) == 1797
    assert rows.min() == 0
    assert rows.max() == 1


def test_a_split_keeps_the_network():
    problems = DigitsMLP(hidden_size=7, activation="tanh", batch_size=9).split("test")
    assert isinstance(problems, DigitsMLP)
    assert (problems.hidden_size, problems.activation, problems.batch_size) == (7, "tanh", 9)
    assert torch.equal(problems.inputs, load_digits("test")[0])
    assert torch.equal(problems.targets, load_digits("test")[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DigitsMLP(hidden_size=0), "hidden_size and batch_size must be at least 1, got 0"),
        (lambda: DigitsMLP(activation="gelu"), "activation must be sigmoid, tanh or relu, got 'gelu'"),
        (lambda: DigitsMLP(split="all"), "split must be one of train, valid, test, got 'all'"),
        (lambda: DigitsCNN(channels=0), "channels must be at least 1, got 0"),
        (lambda: DigitsRNN(hidden_size=-2), "hidden_size must be at least 1, got -2"),
        (lambda: DigitsRegression(batch_size=0), "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
