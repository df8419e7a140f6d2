"""The training problems of a general optimizer: small networks of many kinds on digits, and functions to minimise.

Kinds differ in architecture, width, depth, activation, batch size, loss and scale of the parameters. Tables are columns
of numbers made of the digits: a few random projections of the images, with labels or numbers to predict that they do
not determine, so that losses stay above a floor, as they do on most data of users.

Axis legend: n samples.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.core.memo import outside_modes
from metakern.tasks.classic_functions import ClassicFunction
from metakern.tasks.digit_networks import CLASSES, SIDE, DigitsCNN, DigitsMLP, DigitsRegression, DigitsRNN, load_digits
from metakern.tasks.network_problems import NetworkProblem
from metakern.tasks.optimizee_groups import MixedOptimizees
from metakern.tasks.optimizees import Optimizees, Quadratics
from metakern.tasks.toys import Bowls, ClippedBowls, SoftmaxRegressions
from metakern.tasks.variants import GradientNoise, Reparametrised, SumOfProblems

#: Projections of a table, and samples of each split that it keeps.
COLUMNS, ROWS = 8, 300


@functools.cache
@outside_modes()
def digits_table(split: str) -> Tensor:
    """Random projections of a split's images, [n, 8], each of mean 0 and variance 1."""
    images, _ = load_digits(split)
    directions = torch.randn(SIDE * SIDE, COLUMNS, generator=torch.Generator().manual_seed(1))
    table = images[:ROWS] @ directions
    return (table - table.mean(0)) / table.std(0)


def _labelled(columns: int, classes: int, split: str) -> tuple[Tensor, Tensor]:
    labels = load_digits(split)[1][:ROWS]
    return digits_table(split)[:, :columns], labels * classes // CLASSES


def _numbers(split: str) -> tuple[Tensor, Tensor]:
    table = digits_table(split)
    return table[:, 1:], table[:, :1]


def _one_hot(split: str) -> tuple[Tensor, Tensor]:
    images, labels = load_digits(split)
    return images, F.one_hot(labels, CLASSES).float()


def _images(split: str) -> tuple[Tensor, Tensor]:
    images, _ = load_digits(split)
    return images, images


def fully_connected(*sizes: int, activation: Callable[[], nn.Module] = nn.ReLU, norm: bool = False) -> nn.Sequential:
    """Linear layers with an activation between them, and a layer norm before each of these if ``norm``."""
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(inputs, outputs))
        if index < len(sizes) - 2:
            layers += [nn.LayerNorm(outputs), activation()] if norm else [activation()]
    return nn.Sequential(*layers)


def general_problems() -> MixedOptimizees:
    """The mixture, with the same number of problems of every kind in a sample.

    Example:
        >>> problems = general_problems()
    """
    network = NetworkProblem
    layers = functools.partial
    kinds: list[Optimizees] = [
        Reparametrised(DigitsMLP(20, "sigmoid", 128), "tensor", 1.0),
        DigitsMLP(32, "relu", 32),
        Reparametrised(DigitsMLP(12, "tanh", 64), "problem", 3.0),
        network(layers(fully_connected, 64, 24, 24, 24, 10, activation=nn.ReLU), load_digits, batch_size=64),
        network(layers(fully_connected, 64, 28, 28, 10, activation=nn.GELU, norm=True), load_digits, batch_size=32),
        Reparametrised(DigitsRegression(32), "tensor", 1.0),
        DigitsCNN(4, 32),
        DigitsRNN(16, 32),
        network(layers(fully_connected, 64, 20, 10, activation=nn.Tanh), _one_hot, loss=F.mse_loss, batch_size=32),
        network(layers(fully_connected, 64, 16, 64, activation=nn.Sigmoid), _images, loss=F.mse_loss, batch_size=48),
        network(
            layers(fully_connected, 5, 20, 20, 10, activation=nn.Tanh),
            functools.partial(_labelled, 5, 10),
            batch_size=32,
        ),
        network(
            layers(fully_connected, 7, 32, 1, activation=nn.ReLU), _numbers, loss=F.smooth_l1_loss, batch_size=24
        ),
        network(layers(nn.Linear, 8, 2), functools.partial(_labelled, 8, 2), batch_size=64),
        SoftmaxRegressions(),
        Reparametrised(GradientNoise(Quadratics(20), 1.0), "problem", 2.0),
        SumOfProblems([ClippedBowls(), ClassicFunction("rosenbrock"), Bowls()]),
    ]  # fmt: skip
    return MixedOptimizees(kinds, even=True)
