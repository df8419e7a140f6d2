"""The tasks of the comparison: those that choices may be made on, and those of the test.

No learned optimizer of the package was trained on a test task, and nothing is chosen by one: neither weights nor
options of a rule, nor a learning rate that is one for all tasks. Test tasks differ from all training problems in their
data, most in their architecture too. The data come with scikit-learn or are made by it; nothing is downloaded.

A task is a network with its data: the loss is that on all samples, the gradients those of minibatches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Tensor, nn

from bench.optimizers.networks import Characters, Picture, Residual, RowAttention, RowGRU
from metakern.tasks import DigitsCNN, DigitsMLP, DigitsRegression, DigitsRNN, NetworkProblem
from metakern.tasks.digit_networks import load_digits
from metakern.tasks.general import fully_connected as mlp

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A task by its name.

    Attributes:
        name: its name in tables
        make: makes the problem
    """

    name: str
    make: Callable[[], NetworkProblem]


def _network(
    name: str,
    make: Callable[[], nn.Module],
    data: Callable[[], Data],
    batch_size: int,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Task:
    return Task(name, lambda: NetworkProblem(make, lambda _: data(), loss=loss, batch_size=batch_size))


def _standard(inputs: Any, targets: Any, *, labels: bool = True) -> Data:
    """Inputs of mean 0 and variance 1; class labels, or targets [n, 1] likewise standardised."""
    x = torch.from_numpy(np.asarray(inputs, dtype=np.float64))
    x = (x - x.mean(0)) / (x.std(0) + 1e-8)
    if labels:
        return x.float(), torch.from_numpy(np.asarray(targets)).long()
    y = torch.from_numpy(np.asarray(targets, dtype=np.float64)).reshape(len(x), -1)
    return x.float(), ((y - y.mean(0)) / (y.std(0) + 1e-8)).float()


def _digits(split: str) -> Callable[[], Data]:
    return lambda: load_digits(split)


def _copied(split: str) -> Data:
    """Images as both inputs and targets."""
    images, _ = load_digits(split)
    return images, images


def _mirrored(split: str) -> Data:
    """Images, and themselves turned upside down as targets."""
    images, _ = load_digits(split)
    return images, images.flip(1)


# ------------------------------------------------------------------------------------------------ data of validation


@functools.cache
def _quantiles() -> Data:
    return _standard(*datasets.make_gaussian_quantiles(n_samples=400, n_features=4, n_classes=3, random_state=0))


@functools.cache
def _hastie() -> Data:
    inputs, labels = datasets.make_hastie_10_2(n_samples=600, random_state=0)
    return _standard(inputs, labels > 0)


@functools.cache
def _blobs() -> Data:
    return _standard(*datasets.make_blobs(n_samples=500, n_features=6, centers=8, cluster_std=4.0, random_state=0))


@functools.cache
def _uncorrelated() -> Data:
    return _standard(*datasets.make_sparse_uncorrelated(n_samples=500, n_features=8, random_state=0), labels=False)


@functools.cache
def _wave() -> Data:
    x = torch.linspace(-3, 3, 300).view(-1, 1)
    return x, torch.sin(2 * x) + 0.3 * torch.sin(7 * x)


@functools.cache
def _low_rank() -> Data:
    x = torch.from_numpy(datasets.make_low_rank_matrix(400, 30, effective_rank=6, random_state=0)).float()
    x = x / x.std()
    return x, x


#: Tasks for every choice: a rule's weights and options, the learning rates that are one for all tasks.
VALIDATION = (
    Task("digits, 20 sigmoid units", lambda: DigitsMLP(20, split="valid")),
    Task("digits, 48 ReLU units, B = 16", lambda: DigitsMLP(48, "relu", 16, split="valid")),
    Task("digits, logistic, B = 32", lambda: DigitsRegression(32, split="valid")),
    Task("digits, CNN of 6 channels", lambda: DigitsCNN(6, 64, split="valid")),
    Task("digits, RNN of 28 units", lambda: DigitsRNN(28, 64, split="valid")),
    _network("digits, 3 tanh layers", lambda: mlp(64, 32, 32, 32, 10, activation=nn.Tanh), _digits("valid"), 64),
    _network("digits, layer norm", lambda: mlp(64, 40, 40, 10, norm=True), _digits("valid"), 32),
    _network("digits upside down, MSE", lambda: mlp(64, 24, 64), lambda: _mirrored("valid"), 64, F.mse_loss),
    _network("quantiles, 2 ReLU layers", lambda: mlp(4, 24, 24, 3), _quantiles, 32),
    _network("Hastie, 1 tanh layer", lambda: mlp(10, 40, 2, activation=nn.Tanh), _hastie, 48),
    _network("blobs, logistic", lambda: nn.Linear(6, 8), _blobs, 64),
    _network("uncorrelated, MSE", lambda: mlp(8, 32, 1, activation=nn.SiLU), _uncorrelated, 32, F.mse_loss),
    _network("wave, MSE", lambda: mlp(1, 32, 32, 1, activation=nn.Tanh), _wave, 50, F.mse_loss),
    _network("low rank, linear, MSE", lambda: mlp(30, 8, 30, activation=nn.Identity), _low_rank, 64, F.mse_loss),
)


# ----------------------------------------------------------------------------------------------------- data of the test


@functools.cache
def _iris() -> Data:
    return _standard(*datasets.load_iris(return_X_y=True))


@functools.cache
def _wine() -> Data:
    return _standard(*datasets.load_wine(return_X_y=True))


@functools.cache
def _cancer() -> Data:
    return _standard(*datasets.load_breast_cancer(return_X_y=True))


@functools.cache
def _diabetes() -> Data:
    return _standard(*datasets.load_diabetes(return_X_y=True), labels=False)


@functools.cache
def _linnerud() -> Data:
    return _standard(*datasets.load_linnerud(return_X_y=True), labels=False)


@functools.cache
def _friedman() -> Data:
    return _standard(*datasets.make_friedman1(n_samples=800, noise=0.3, random_state=0), labels=False)


@functools.cache
def _correlated() -> Data:
    made = datasets.make_regression(
        n_samples=500, n_features=40, n_informative=15, effective_rank=8, noise=1.0, random_state=0
    )
    inputs, targets = (torch.from_numpy(x).float() for x in made[:2])
    return inputs / inputs.std(), (targets / targets.std()).unsqueeze(1)


@functools.cache
def _moons() -> Data:
    return _standard(*datasets.make_moons(n_samples=400, noise=0.15, random_state=0))


@functools.cache
def _circles() -> Data:
    return _standard(*datasets.make_circles(n_samples=400, noise=0.08, factor=0.6, random_state=0))


@functools.cache
def _classes() -> Data:
    made = datasets.make_classification(
        n_samples=1000, n_features=40, n_informative=12, n_classes=5, class_sep=1.2, flip_y=0.05, random_state=0
    )
    return _standard(*made)


@functools.cache
def _roll() -> Data:
    return _standard(*datasets.make_swiss_roll(n_samples=600, noise=0.3, random_state=0), labels=False)


@functools.cache
def _text() -> Data:
    """Ten characters of scikit-learn's description of a data set, and the one after them."""
    text = datasets.load_wine().DESCR.lower()
    known = sorted(set(text))
    numbers = torch.tensor([known.index(character) for character in text])
    windows = numbers.unfold(0, 11, 1)
    return windows[:, :10].contiguous(), windows[:, 10].contiguous()


@functools.cache
def _picture() -> Data:
    """Every eighth point of scikit-learn's picture of a flower, and its colours."""
    pixels = torch.from_numpy(np.asarray(datasets.load_sample_image("flower.jpg"))[::8, ::8].copy())
    grid = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in pixels.shape[:2]), indexing="ij")
    return torch.stack(grid, 2).view(-1, 2), pixels.view(-1, 3).float() / 255 - 0.5


@functools.cache
def _one_hot() -> Data:
    images, labels = load_digits("test")
    return images, F.one_hot(labels, 10).float()


@functools.cache
def _characters() -> int:
    return int(_text()[0].max()) + 1


def _deep_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 6, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(6, 12, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(12, 12, 3, padding=1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


#: The tasks of the test. Nothing is chosen by them.
TEST = (
    _network("iris, 8 tanh units, B = 16", lambda: mlp(4, 8, 3, activation=nn.Tanh), _iris, 16),
    _network("wine, logistic, B = 32", lambda: nn.Linear(13, 3), _wine, 32),
    _network("wine, 2 ReLU layers, B = 16", lambda: mlp(13, 32, 32, 3), _wine, 16),
    _network("cancer, logistic, B = 64", lambda: nn.Linear(30, 2), _cancer, 64),
    _network("cancer, 4 tanh layers, B = 32", lambda: mlp(30, 24, 24, 24, 24, 2, activation=nn.Tanh), _cancer, 32),
    _network("diabetes, linear, MSE", lambda: nn.Linear(10, 1), _diabetes, 64, F.mse_loss),
    _network("diabetes, 40 SiLU units, Huber", lambda: mlp(10, 40, 1, activation=nn.SiLU), _diabetes, 32, F.huber_loss),
    _network("Linnerud, 16 tanh units, MSE", lambda: mlp(3, 16, 3, activation=nn.Tanh), _linnerud, 10, F.mse_loss),
    _network("Friedman, 2 ReLU layers, MSE", lambda: mlp(10, 64, 64, 1), _friedman, 64, F.mse_loss),
    _network("correlated, linear, MSE", lambda: nn.Linear(40, 1), _correlated, 64, F.mse_loss),
    _network("moons, 2 tanh layers", lambda: mlp(2, 16, 16, 2, activation=nn.Tanh), _moons, 32),
    _network("circles, 12 GELU units", lambda: mlp(2, 12, 2, activation=nn.GELU), _circles, 32),
    _network("5 classes, layer norm", lambda: mlp(40, 48, 5, norm=True), _classes, 100),
    _network(
        "Swiss roll, 3 SiLU layers, MSE", lambda: mlp(3, 32, 32, 32, 1, activation=nn.SiLU), _roll, 48, F.mse_loss
    ),
    _network("text, RNN of 32 units", lambda: Characters(_characters(), 32), _text, 64),
    _network("picture, sines and SiLU, MSE", lambda: Picture(5, 32), _picture, 128, F.mse_loss),
    _network(
        "digits, autoencoder, MSE",
        lambda: mlp(64, 32, 8, 32, 64, activation=nn.Tanh),
        functools.partial(_copied, "test"),
        64,
        F.mse_loss,
    ),
    _network("digits, 4 residual blocks", lambda: Residual(64, 32, 4, 10), _digits("test"), 64),
    _network("digits, attention over rows", lambda: RowAttention(24), _digits("test"), 64),
    _network("digits, GRU of 24 units", lambda: RowGRU(24), _digits("test"), 64),
    _network("digits, CNN of 3 layers, tanh", _deep_cnn, _digits("test"), 32),
    _network("digits, 128 ReLU units, B = 8", lambda: mlp(64, 128, 10), _digits("test"), 8),
    _network(
        "digits, 4 sigmoid layers", lambda: mlp(64, 24, 24, 24, 24, 10, activation=nn.Sigmoid), _digits("test"), 128
    ),
    _network(
        "digits, linear, MSE, B = 16",
        lambda: nn.Linear(64, 10),
        _one_hot,
        16,
        F.mse_loss,
    ),
)
