"""Cases of the convolutional inner loop: 5-way episodes for conv4 and ResNet-12.

Axis legend: T tasks, S support and Q query samples of a task, K inner steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from bench.mlp_inner_loop.cases import Case
from metakern.models import RESNET12_WIDTHS, resnet12

WAYS = 5

#: Side of the images on which the contenders for ResNet-12 are compared in float64; half of it, halved, is odd.
SMALL_SIDE = 36


@dataclass(frozen=True)
class ConvCase(Case):
    """A convolutional network and its episodes; ``widths`` of ResNet-12 are those of its blocks, then the outputs."""

    resnet: bool = False

    def model(self) -> nn.Module:
        """The model, with the same random weights at every call."""
        if not self.resnet:
            return super().model()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return resnet12(self.shape, self.widths[-1], self.widths[:-1])

    def compared(self) -> ConvCase:
        """A case of the same network and steps, small enough for the comparison in float64."""
        side = min(SMALL_SIDE, self.shape[1]) if self.resnet else self.shape[1]
        return replace(self, tasks=min(2, self.tasks), query=min(WAYS, self.query), shape=(self.shape[0], side, side))


def conv4_28(shots: int, tasks: int, steps: int, *, first_order: bool = False) -> ConvCase:
    """conv4 of Omniglot: 28 x 28, 64 filters, 15 query samples a class."""
    name = f"conv4 28x28, 64 filters, {shots}-shot"
    return ConvCase(name, (1, 28, 28), (64, WAYS), tasks, WAYS * shots, 15 * WAYS, steps, 0.1, first_order)


def conv4_84(tasks: int, steps: int, *, first_order: bool = False) -> ConvCase:
    """conv4 of miniImageNet: 84 x 84, 32 filters, 1 shot, 15 query samples a class."""
    name = "conv4 84x84, 32 filters, 1-shot"
    return ConvCase(name, (3, 84, 84), (32, WAYS), tasks, WAYS, 15 * WAYS, steps, 0.01, first_order)


def resnet12_84(tasks: int, *, first_order: bool = False) -> ConvCase:
    """ResNet-12 of TADAM: 84 x 84, 1 shot, one query sample a class, one step."""
    widths = (*RESNET12_WIDTHS, WAYS)
    return ConvCase("ResNet-12 84x84, 1-shot", (3, 84, 84), widths, tasks, WAYS, WAYS, 1, 0.01, first_order, True)
