"""Contenders for a block: the kernels, PyTorch's three operators task by task, and with the tasks as channels.

Axis legend: T tasks, S samples, C channels, [n, n] the images of x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.ops import task_norm_act_pool

PASSES = ("forward", "backward", "double backward")


@dataclass(frozen=True)
class Block:
    """Sizes of one block."""

    name: str
    tasks: int
    samples: int
    channels: int
    size: int

    @property
    def bytes(self) -> int:
        """Of x in float32."""
        return 4 * self.tasks * self.samples * self.channels * self.size**2


@dataclass
class Problem:
    """Random arguments, and cotangents of y and of the gradients."""

    block: Block
    leaves: list[Tensor]  # x, gamma, beta
    grad_y: Tensor
    cotangents: list[Tensor]

    @classmethod
    def make(cls, block: Block, seed: int) -> Problem:
        """Normal numbers."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        channels, half = (block.tasks, block.channels), block.size // 2
        leaves = [normal(block.tasks, block.samples, block.channels, block.size, block.size)]
        leaves += [1 + 0.1 * normal(*channels), normal(*channels)]
        cotangents = [normal(*x.shape) for x in leaves]
        grad_y = normal(block.tasks, block.samples, block.channels, half, half)
        return cls(block, [x.requires_grad_() for x in leaves], grad_y.requires_grad_(), cotangents)

    def to(self, device: torch.device) -> Problem:
        """The same numbers on a device."""
        leaves = [x.detach().to(device).requires_grad_() for x in self.leaves]
        grad_y = self.grad_y.detach().to(device).requires_grad_()
        return Problem(self.block, leaves, grad_y, [x.to(device) for x in self.cotangents])


def by_kernels(x: Tensor, gamma: Tensor, beta: Tensor, backend: str = "cpp") -> Tensor:
    """The kernels of a backend."""
    return task_norm_act_pool(x, gamma, beta, backend=backend)[0]


def by_loop(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """PyTorch's operators, one task at a time."""
    tasks = zip(x, gamma, beta, strict=True)
    return torch.stack([F.max_pool2d(F.relu(F.batch_norm(a, None, None, g, b, True)), 2) for a, g, b in tasks])


def by_channels(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """PyTorch's operators once, on the channels of all tasks, as torch.func.vmap makes them of a model."""
    images = x.transpose(0, 1).flatten(1, 2)
    y = F.max_pool2d(F.relu(F.batch_norm(images, None, None, gamma.flatten(), beta.flatten(), True)), 2)
    found: Tensor = y.unflatten(1, gamma.shape).transpose(0, 1)
    return found


CONTENDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "metakern": by_kernels,
    "loop": by_loop,
    "channels": by_channels,
}


def prepared(
    problem: Problem, run: Callable[[Tensor, Tensor, Tensor], Tensor], which: str
) -> Callable[[], list[Tensor]]:
    """A pass that can be run again and again; what comes before it has run already."""
    if which == "forward":
        return lambda: [run(*problem.leaves).detach()]
    y = run(*problem.leaves)
    if which == "backward":
        return lambda: list(torch.autograd.grad(y, problem.leaves, problem.grad_y, retain_graph=True))
    first = torch.autograd.grad(y, problem.leaves, problem.grad_y, create_graph=True)
    wanted = [*problem.leaves[:2], problem.grad_y]
    return lambda: list(torch.autograd.grad(first, wanted, problem.cotangents, retain_graph=True))
