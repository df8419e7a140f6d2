"""Contenders for the three maps: the kernels, a loop of PyTorch's convolutions, one grouped convolution.

Axis legend: T tasks, S samples, C channels of x, O channels of y, [n, n] their images, [k, k] kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.ops import task_conv2d, task_conv2d_input, task_conv2d_weight

MAPS = ("y", "gradient by x", "gradient by weight")

_backward = torch.ops.aten.convolution_backward.default


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer with padding k // 2 and stride 1."""

    name: str
    tasks: int
    samples: int
    channels: int
    outputs: int
    size: int
    kernel: int = 3

    @property
    def padding(self) -> int:
        """Zeros on each side, which keep the image's size."""
        return self.kernel // 2

    @property
    def flops(self) -> int:
        """Of one map: two for each product, padding counted."""
        return 2 * self.tasks * self.samples * self.outputs * self.channels * (self.kernel * self.size) ** 2


@dataclass
class Problem:
    """Random arguments of the three maps."""

    layer: Layer
    x: Tensor
    weight: Tensor
    grad: Tensor

    @classmethod
    def make(cls, layer: Layer, seed: int) -> Problem:
        """Normal numbers."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        image = (layer.size, layer.size)
        return cls(
            layer,
            normal(layer.tasks, layer.samples, layer.channels, *image),
            normal(layer.tasks, layer.outputs, layer.channels, layer.kernel, layer.kernel),
            normal(layer.tasks, layer.samples, layer.outputs, *image),
        )

    def to(self, device: torch.device) -> Problem:
        """The same arguments on a device."""
        return Problem(self.layer, self.x.to(device), self.weight.to(device), self.grad.to(device))


def by_kernels(problem: Problem, which: str, backend: str = "cpp") -> list[Tensor]:
    """The kernels of a backend."""
    p, layer = problem, problem.layer
    if which == "y":
        return [task_conv2d(p.x, p.weight, None, 1, layer.padding, backend=backend)]
    if which == "gradient by x":
        return [task_conv2d_input(p.grad, p.weight, layer.size, 1, layer.padding, backend=backend)]
    return [task_conv2d_weight(p.x, p.grad, layer.kernel, 1, layer.padding, backend=backend)[0]]


def by_loop(problem: Problem, which: str) -> list[Tensor]:
    """One convolution a task, and what autograd calls for its gradients."""
    p, padding = problem, problem.layer.padding
    tasks = zip(p.x, p.weight, p.grad, strict=True)
    if which == "y":
        return [torch.stack([F.conv2d(x, w, None, 1, padding) for x, w, _ in tasks])]
    return [torch.stack([_gradient(x, w, g, padding, 1, which) for x, w, g in tasks])]


def by_groups(problem: Problem, which: str) -> list[Tensor]:
    """One convolution whose groups are the tasks, as torch.func.vmap makes it."""
    p, tasks, padding = problem, problem.layer.tasks, problem.layer.padding
    x, grad = p.x.transpose(0, 1).flatten(1, 2), p.grad.transpose(0, 1).flatten(1, 2)
    weight = p.weight.flatten(0, 1)
    if which == "y":
        found = F.conv2d(x, weight, None, 1, padding, 1, tasks)
    else:
        found = _gradient(x, weight, grad, padding, tasks, which)
    if which == "gradient by weight":
        return [found.unflatten(0, (tasks, -1))]
    return [found.unflatten(1, (tasks, -1)).transpose(0, 1)]


def _gradient(x: Tensor, weight: Tensor, grad: Tensor, padding: int, groups: int, which: str) -> Tensor:
    wanted = [which == name for name in MAPS[1:]]
    options: Sequence[Any] = ([1, 1], [padding] * 2, [1, 1], False, [0, 0], groups, [*wanted, False])
    found: Tensor = _backward(grad, x, weight, None, *options)[wanted.index(True)]
    return found


CONTENDERS: dict[str, Callable[[Problem, str], list[Tensor]]] = {
    "metakern": by_kernels,
    "loop": by_loop,
    "grouped": by_groups,
}
