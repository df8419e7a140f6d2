"""Tasks of the paper's four kinds on real digits: each network learns from data of its own.

Axis legend: T tasks, M images of a task, B samples of a minibatch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.paper import test_tasks
from metakern.tasks import DigitsCNN, DigitsMLP, DigitsRegression, DigitsRNN, MixedOptimizees
from metakern.tasks.digit_networks import SIDE, load_digits
from metakern.tasks.distribution import ShortRepr
from metakern.tasks.network_problems import NetworkBatch, NetworkProblem
from metakern.tasks.optimizee_groups import MixedBatch

#: Images of a task, and of one of its minibatches.
IMAGES, BATCH_SIZE = 200, 32

#: Training networks by kind: the sizes that the package's digit problems have by default.
TRAINING = ("regression-8", "mlp-20-sigmoid", "cnn-8", "rnn-20")

#: Validation networks: other sizes than those of training and of testing.
VALIDATION = ("regression-8", "mlp-16-sigmoid", "cnn-6", "rnn-16")

#: Seeds of the generators of validation and test tasks, and tasks of each network.
VALIDATION_SEED, TEST_SEED, HELD_OUT_TASKS = 10**6, test_tasks.SEED, test_tasks.TASKS


class Instances(ShortRepr):
    """Networks of one kind; each learns from images of its own.

    A task draws M images of the split without replacement, turns and mirrors them all alike by one of the eight
    symmetries of the square, and renames the ten classes.

    Args:
        kind: the networks, whose data are images [n, 64] and labels [n]
        images: M
    """

    def __init__(self, kind: NetworkProblem, images: int = IMAGES) -> None:
        self.kind, self.images = kind, images

    def split(self, name: str) -> Instances:
        """The same networks on images of another split."""
        return Instances(self.kind.split(name), self.images)

    def sample(self, num_tasks: int, generator: torch.Generator) -> InstanceBatch:
        """Draw ``num_tasks`` tasks."""
        return InstanceBatch(self.kind, self.images, num_tasks, generator)


class InstanceBatch(NetworkBatch):
    """T networks of one kind, each with its images [T, M, 64] and labels [T, M]."""

    per_task = ("inputs", "targets")
    shared = ()  # type: ignore[assignment]

    def __init__(self, kind: NetworkProblem, images: int, num_tasks: int, generator: torch.Generator) -> None:
        super().__init__(kind, num_tasks, generator)
        count, pixels = len(kind.targets), torch.arange(SIDE * SIDE).view(SIDE, SIDE)
        views = [turned.rot90(turns) for turned in (pixels, pixels.flip(1)) for turns in range(4)]
        turn = self.draw(functools.partial(torch.randint, len(views)))
        chosen = self.draw(torch.rand, count).argsort(1)[:, :images]
        names = self.draw(torch.rand, 10).argsort(1)
        order = torch.stack([view.flatten() for view in views])[turn]
        self.inputs = kind.inputs[chosen].gather(2, order.unsqueeze(1).expand(-1, images, -1))
        self.targets = names.gather(1, kind.targets[chosen])

    def minibatch(self) -> tuple[Tensor, Tensor]:
        """The next minibatch of every task: images [T, B, 64] and labels [T, B]."""
        index = self.draw(functools.partial(torch.randint, self.inputs.shape[1]), self.problem.batch_size)
        tasks, images = self.targets.shape
        rows = (index + torch.arange(0, tasks * images, images, device=index.device).unsqueeze(1)).flatten()
        inputs = self.inputs.flatten(0, 1).index_select(0, rows).view(*index.shape, -1)
        return inputs, self.targets.flatten()[rows].view(index.shape)

    def loss(self, params: dict[str, Tensor]) -> Tensor:
        """Losses [T] of params on the next minibatch of each network."""
        return self.problem.losses(params, *self.minibatch())

    def full_loss(self, params: dict[str, Tensor]) -> Tensor:
        """Losses [T] of params on all images of each task."""
        return self.problem.losses(params, self.inputs, self.targets)


class SmallRegression(NetworkProblem):
    """Logistic regressions 16-10 on images of 4×4 pixels, means over 2×2."""

    def __init__(self, batch_size: int = BATCH_SIZE, split: str = "train") -> None:
        super().__init__(functools.partial(nn.Linear, 16, 10), load_digits, batch_size=batch_size, split=split)

    def losses(self, params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy [T] of params on images [T, B, 64]."""
        pixels = inputs.unflatten(-1, (SIDE // 2, 2, SIDE // 2, 2)).mean((-3, -1)).flatten(-2)
        return super().losses(params, pixels, targets)


def network(name: str) -> NetworkProblem:
    """The networks of a name such as "mlp-20-sigmoid", "cnn-8", "rnn-20", "regression-8" (the side of its images)."""
    kind, size, *activation = name.split("-")
    if kind == "regression":
        return SmallRegression() if int(size) == SIDE // 2 else DigitsRegression(batch_size=BATCH_SIZE)
    if kind == "mlp":
        return DigitsMLP(int(size), activation[0], BATCH_SIZE)
    return DigitsCNN(int(size), BATCH_SIZE) if kind == "cnn" else DigitsRNN(int(size), BATCH_SIZE)


def mixture(names: Sequence[str] = TRAINING, split: str = "train") -> MixedOptimizees:
    """Networks of these names in equal shares, on images of one split."""
    return MixedOptimizees([Instances(network(name).split(split)) for name in names])


def balanced(names: Sequence[str], split: str, tasks: int, generator: torch.Generator) -> MixedBatch:
    """``tasks`` networks of every name."""
    return MixedBatch(
        [Instances(network(name).split(split)).sample(tasks, generator) for name in names],
        torch.arange(len(names)).repeat_interleave(tasks),
    )


def validation_tasks() -> MixedBatch:
    """Tasks on which choices are made and curves are drawn."""
    return balanced(VALIDATION, "valid", HELD_OUT_TASKS, torch.Generator().manual_seed(VALIDATION_SEED))


def held_out_tasks() -> MixedBatch:
    """The test tasks of test_tasks.py."""
    return balanced(test_tasks.NETWORKS, "test", HELD_OUT_TASKS, torch.Generator().manual_seed(TEST_SEED))
