"""All task distributions, one row each, small enough for tests of milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metakern.tasks import (
    Abs,
    Bowls,
    ClassicFunction,
    ClippedBowls,
    Digits,
    DigitsCNN,
    DigitsMLP,
    DigitsRegression,
    DigitsRNN,
    Episodes,
    FewShotEpisodes,
    GradientNoise,
    Linear,
    LogObjective,
    MiniImageNet,
    MixedOptimizees,
    NetworkProblem,
    Norms,
    Omniglot,
    Quadratic,
    Quadratics,
    Reparametrised,
    Sinusoid,
    SoftmaxRegressions,
    SparseGradients,
    SumOfProblems,
    Tanh,
    mixture,
)
from metakern.tasks.classic_functions import FUNCTIONS
from metakern.tasks.distribution import check_split
from metakern.tasks.variants import SCALE_SHARES
from tests.tasks.pictures import write_mini_imagenet, write_omniglot


@dataclass(frozen=True)
class Row:
    """A distribution of tasks.

    Attributes:
        name: its test name
        make: builds the distribution from an empty folder and a monkeypatch, for those that read files
        material: rows [n, ...] of a batch that no two splits may share: a task's parameters, or its data
        own: whether it is a user's class, which only follows the protocols
    """

    name: str
    make: Callable[[Path, pytest.MonkeyPatch], Any]
    material: Callable[[Any], Tensor]
    own: bool = False


def plain(make: Callable[[], Any]) -> Callable[[Path, pytest.MonkeyPatch], Any]:
    """Builder for distributions that read no files."""
    return lambda _, __: make()


class Decays:
    """A user's few-shot tasks: y = exp(-r·x); every split has rates r of its own."""

    def __init__(self, low: float = 0.5, high: float = 2.0) -> None:
        self.low, self.high = low, high

    def split(self, name: str) -> Decays:
        return Decays(*{"train": (0.5, 2.0), "valid": (2.0, 2.25), "test": (2.25, 2.5)}[name])

    def sample(self, num_tasks: int, generator: torch.Generator) -> Episodes:
        rates = torch.empty(num_tasks, 1, 1).uniform_(self.low, self.high, generator=generator)
        x = torch.rand(num_tasks, 20, 1, generator=generator)
        y = torch.exp(-rates * x)
        return Episodes(x[:, :10], y[:, :10], x[:, 10:], y[:, 10:])


class OwnBowls:
    """A user's problems to optimise, with one tensor [T, P] of params: Σ_i a_i·x_i²; splits differ in the range of a.

    With ``parts`` the params are a list of two tensors, [T, 1] and [T] of what is left of x.
    """

    def __init__(self, split: str = "train", parts: bool = False) -> None:
        self.low, self.parts = {"train": 1.0, "valid": 2.0, "test": 3.0}[split], parts

    def split(self, name: str) -> OwnBowls:
        return OwnBowls(name, self.parts)

    def sample(self, num_tasks: int, generator: torch.Generator) -> BowlBatch:
        factor, start = torch.rand(2, num_tasks, 2, generator=generator)
        return BowlBatch(self.low + factor, start + 1, self.parts)


class BowlBatch:
    """T bowls."""

    def __init__(self, factor: Tensor, start: Tensor, parts: bool) -> None:
        self.factor, self.start, self.parts, self.num_tasks = factor, start, parts, len(factor)

    def init_params(self) -> Any:
        return [self.start[:, :1].clone(), self.start[:, 1].clone()] if self.parts else self.start.clone()

    def loss(self, params: Any) -> Tensor:
        x = torch.cat([params[0], params[1].unsqueeze(1)], 1) if self.parts else params
        return (self.factor * x.square()).sum(1)

    full_loss = loss

    def select(self, tasks: slice | Tensor) -> BowlBatch:
        return BowlBatch(self.factor[tasks], self.start[tasks], self.parts)


def sines(split: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets [30, 1]."""
    check_split(split)
    x = torch.linspace(-3, 3, 30).view(30, 1) + {"train": 0.0, "valid": 0.1, "test": 0.2}[split]
    return x, x.sin()


def small_network() -> nn.Module:
    """A network with random parameters and normalisation parameters."""
    return nn.Sequential(nn.Linear(1, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1, bias=False))


def pictures(split: str) -> list[Tensor]:
    """Images [4, 1, 2] of each of 5 classes; they hold the split, the class and their number."""
    first = {"train": 0.0, "valid": 100.0, "test": 200.0}[split]
    return [torch.tensor([[[first + label, number]] for number in range(4)]) for label in range(5)]


def few_shot(**options: Any) -> FewShotEpisodes:
    return FewShotEpisodes({name: pictures(name) for name in ("train", "valid", "test")}, ways=3, query=2, **options)


def omniglot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Omniglot:
    write_omniglot(folder, monkeypatch)
    return Omniglot(folder, ways=3, support=1, query=2)


def mini_imagenet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> MiniImageNet:
    write_mini_imagenet(folder, monkeypatch, lists=False)
    return MiniImageNet(folder, ways=2, support=1, query=2)


def images_of(batch: Episodes) -> Tensor:
    """All images of a batch."""
    return torch.cat([batch.support_x, batch.query_x], 1).flatten(0, 1)


def starts_of(batch: Any) -> Tensor:
    """The starting points of problems with one tensor."""
    (start,) = pytree.tree_leaves(batch.init_params())
    return start


def groups_of(batch: Any) -> Tensor:
    """The matrices of a mixture's quadratics, which differ in size."""
    return torch.cat([group.weight.flatten() for group in batch.groups]).unsqueeze(1)


_FAMILIES = [
    Row(family.__name__.lower(), plain(partial(family, 3, 4)), lambda batch: batch.query_y)
    for family in (Sinusoid, Linear, Quadratic, Tanh, Abs)
]
_FUNCTIONS = [
    Row(name, plain(partial(ClassicFunction, name, 3 if function.any_dim else 2)), starts_of)
    for name, function in FUNCTIONS.items()
]
_DIGITS = {
    "regression": lambda: DigitsRegression(batch_size=7),
    "mlp": lambda: DigitsMLP(hidden_size=5, batch_size=7),
    "cnn": lambda: DigitsCNN(channels=2, batch_size=7),
    "rnn": lambda: DigitsRNN(hidden_size=4, batch_size=7),
}

EPISODES = [
    *_FAMILIES,
    Row("mixture of families", plain(lambda: mixture(5, 3, 4)), lambda batch: batch.query_y),
    Row("few-shot", plain(few_shot), images_of),
    Row("digits", plain(lambda: Digits(ways=3, query=2)), images_of),
    Row(
        "digits in domains",
        plain(lambda: Digits(ways=3, query=2, domains=["identity", "inverted"], flat=False)),
        images_of,
    ),
    Row("omniglot", omniglot, images_of),
    Row("mini-imagenet", mini_imagenet, images_of),
    Row("own episodes", plain(Decays), lambda batch: batch.query_y, own=True),
]
PROBLEMS = [
    Row("quadratics", plain(lambda: Quadratics(3)), lambda batch: batch.weight),
    *_FUNCTIONS,
    *[Row(f"digit {name}", plain(make), lambda batch: batch.inputs) for name, make in _DIGITS.items()],
    Row(
        "network",
        plain(lambda: NetworkProblem(small_network, sines, loss=F.mse_loss, batch_size=5)),
        lambda batch: batch.inputs,
    ),
    Row("noisy quadratics", plain(lambda: GradientNoise(Quadratics(3), 0.1)), lambda batch: batch.batch.weight),
    Row(
        "noisy mlp",
        plain(lambda: GradientNoise(DigitsMLP(5, batch_size=7), 0.1)),
        lambda batch: batch.batch.inputs,
    ),
    Row("bowls", plain(Bowls), lambda batch: batch.weight),
    Row("norms", plain(lambda: Norms(3, 3.0)), lambda batch: batch.weight),
    Row("clipped bowls", plain(lambda: ClippedBowls(3)), lambda batch: batch.target),
    Row("softmax regressions", plain(lambda: SoftmaxRegressions(3, 3, 9, 5)), lambda batch: batch.inputs),
    Row("sparse gradients", plain(lambda: SparseGradients(Quadratics(5), 0.5)), lambda batch: batch.batch.weight),
    *[
        Row(
            f"scale of a {share}",
            plain(partial(Reparametrised, SoftmaxRegressions(3, 2, 9, 5), share, 1.0)),
            lambda batch: batch.batch.inputs,
        )
        for share in SCALE_SHARES
    ],
    Row("log objective", plain(lambda: LogObjective(Quadratics(3))), lambda batch: batch.batch.weight),
    Row(
        "sums",
        plain(lambda: SumOfProblems([Quadratics(3), ClippedBowls(2)])),
        lambda batch: torch.cat([part.target.flatten() for part in batch.parts]).unsqueeze(1),
    ),
    Row(
        "network with held-out samples",
        plain(lambda: DigitsMLP(hidden_size=5, batch_size=7).hold_out(0.2)),
        lambda batch: torch.cat([batch.inputs, batch.held_out[0]]),
    ),
    Row("mixture of problems", plain(lambda: MixedOptimizees([Quadratics(3), Quadratics(2)])), groups_of),
    Row(
        "mixture of networks",
        plain(lambda: MixedOptimizees([GradientNoise(DigitsMLP(5, batch_size=7), 0.1), DigitsRNN(4, batch_size=7)])),
        lambda batch: batch.groups[-1].inputs,
    ),
    Row(
        "mixture of a mixture",
        plain(lambda: MixedOptimizees([MixedOptimizees([Quadratics(3), Quadratics(2)]), Quadratics(4)])),
        lambda batch: torch.cat(
            [groups_of(group) if hasattr(group, "groups") else group.weight.reshape(-1, 1) for group in batch.groups]
        ),
    ),
    Row("own problems", plain(OwnBowls), lambda batch: batch.factor, own=True),
    Row("own problems of two tensors", plain(lambda: OwnBowls(parts=True)), lambda batch: batch.factor, own=True),
]
ROWS = [*EPISODES, *PROBLEMS]
