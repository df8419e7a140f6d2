"""Cases of the inner-loop benchmark: models, tasks, and the FLOPs of a meta-iteration.

Axis legend: T tasks, S support and Q query samples of a task, K inner steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from metakern.models import conv4, mlp

#: Inputs [T, S, ...] and targets of T tasks.
Set = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A model and its tasks.

    Attributes:
        name: of the model
        shape: of one input; an MLP has [inputs], conv4 has [channels, height, width]
        widths: of the following layers, the outputs last; conv4 has [filters, outputs]
        tasks: T
        support: S
        query: Q
        steps: K
        lr: α
        first_order: whether the inner gradients are constants
    """

    name: str
    shape: tuple[int, ...]
    widths: tuple[int, ...]
    tasks: int
    support: int
    query: int
    steps: int
    lr: float
    first_order: bool = False

    @property
    def title(self) -> str:
        """The case in words."""
        order = "first" if self.first_order else "second"
        return f"{self.name}, T = {self.tasks:,}, K = {self.steps}, {order} order"

    @property
    def is_classification(self) -> bool:
        """Several outputs mean classes with cross entropy; one output means regression with the mean squared error."""
        return self.widths[-1] > 1

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Loss of one task."""
        return F.cross_entropy if self.is_classification else F.mse_loss

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of metakern's calls."""
        return {"loss": self.loss, "steps": self.steps, "lr": self.lr, "first_order": self.first_order}

    def model(self) -> nn.Module:
        """The model, with the same random weights at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return conv4(self.shape, *self.widths) if len(self.shape) == 3 else mlp(self.shape[0], *self.widths)

    def batch(self, seed: int) -> tuple[Set, Set]:
        """Support and query sets of T tasks."""
        generator = torch.Generator().manual_seed(seed)
        if not self.is_classification:
            return self._sinusoids(generator)
        return self._classes(self.support, generator), self._classes(self.query, generator)

    def flops(self) -> int:
        """FLOPs of a meta-iteration: products of its forward and backward passes."""
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.model()(torch.zeros(1, *self.shape))
        forwards = inner_loop_forwards(self.support, self.query, self.steps, self.first_order)
        return int(counter.get_total_flops()) * self.tasks * forwards

    def describe(self) -> dict[str, Any]:
        """The case's entry in the results."""
        keys = ("name", "shape", "widths", "tasks", "support", "query", "steps", "lr", "first_order")
        return {"title": self.title, **{key: getattr(self, key) for key in keys}}

    def _sinusoids(self, generator: torch.Generator) -> tuple[Set, Set]:
        """A·sin(x − φ), A from 0.1 to 5, φ from 0 to π, x from −5 to 5 (Finn et al. 2017); of more inputs the mean."""
        amplitude, phase = (torch.rand(self.tasks, 1, 1, generator=generator) for _ in range(2))

        def samples(count: int) -> Set:
            x = torch.rand(self.tasks, count, *self.shape, generator=generator) * 10 - 5
            return x, (amplitude * 4.9 + 0.1) * torch.sin(x.mean(-1, keepdim=True) - phase * torch.pi)

        return samples(self.support), samples(self.query)

    def _classes(self, samples: int, generator: torch.Generator) -> Set:
        """Gaussian inputs, as many of every class."""
        x = torch.randn(self.tasks, samples, *self.shape, generator=generator)
        return x, (torch.arange(samples) % self.widths[-1]).expand(self.tasks, samples).contiguous()


def sinusoid(tasks: int = 32, steps: int = 5, *, first_order: bool = False) -> Case:
    """MLP 1-40-40-1 on 10-shot sinusoids."""
    return Case("sinusoid 1-40-40-1", (1,), (40, 40, 1), tasks, 10, 10, steps, 0.01, first_order)


def embedding(tasks: int = 32, steps: int = 5) -> Case:
    """MLP 64-64-64-5 on 5-way 5-shot episodes."""
    return Case("5-way 64-64-64-5", (64,), (64, 64, 5), tasks, 25, 25, steps, 0.1)


#: MLP for Omniglot, 5-way 1-shot; its linear layers are those of Finn et al. 2017.
OMNIGLOT_MLP = Case("5-way 784-256-128-64-64-5", (784,), (256, 128, 64, 64, 5), 32, 5, 75, 1, 0.1)

OMNIGLOT_CONV4 = Case("conv4 28x28, 64 filters", (1, 28, 28), (64, 5), 4, 5, 5, 1, 0.1)
MINI_IMAGENET_CONV4 = Case("conv4 84x84, 32 filters", (3, 84, 84), (32, 5), 2, 5, 15, 1, 0.01)


def inner_loop_forwards(support: int, query: int, steps: int, first_order: bool) -> int:
    """Products of a task's meta-iteration, in multiples of one sample's forward pass.

    A backward has two products for each one of the forward. An inner step is a forward and a backward, 3; for second
    order the outer backward goes through both, twice 3 more, 9. The query set takes 3. The first layer's input needs no
    gradient; this saving is not subtracted.
    """
    return support * steps * (3 if first_order else 9) + 3 * query
