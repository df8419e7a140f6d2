"""Contenders for one step of the hierarchical RNN: the kernels, the definition in PyTorch, and that compiled.

Axis legend: T tasks, n coordinates of one tensor of one task, H = 10 hidden units, R = 21 rows of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.hrnn_step.work import HIDDEN, ROWS
from bench.peers import compile_peer
from metakern.ops.hrnn_step import Step, hrnn_step, reference

Contender = Callable[..., Step]


def fused(*arguments: Any) -> Step:
    """The kernels for the CPU."""
    return hrnn_step(*arguments, backend="cpp")


def contenders(*, compiled: bool) -> dict[str, Contender]:
    """By name, the kernels first."""
    found: dict[str, Contender] = {"metakern": fused, "eager": reference.hrnn_step}
    if compiled:
        found["compiled"] = compile_peer(reference.hrnn_step)
    return found


@dataclass
class Problem:
    """Arguments of one step, in the operator's order."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[Tensor]
    biases: Tensor
    mean_rate: Tensor
    weights: list[Tensor]

    @classmethod
    def make(cls, sizes: Sequence[int], tasks: int, seed: int) -> Problem:
        """Random numbers: gradients of 1e-6 to 1e1, a state as a run leaves it."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def state(n: int) -> Tensor:
            x = normal(tasks, ROWS, n)
            x[:, :HIDDEN].tanh_()
            x[:, HIDDEN + 4 : HIDDEN + 8] = x[:, HIDDEN : HIDDEN + 4].square() + x[:, HIDDEN + 4 : HIDDEN + 8].exp()
            x[:, -3] -= 5
            x[:, -2:] = (x[:, -2:] + 3).sigmoid()
            return x

        shapes = reference.weight_shapes(HIDDEN, attention=False)
        return cls(
            params=[normal(tasks, n) for n in sizes],
            grads=[normal(tasks, n) * 10 ** (normal(tasks, n).clamp(-3, 1) * 2) for n in sizes],
            states=[state(n) for n in sizes],
            biases=normal(len(sizes), tasks, 3 * HIDDEN),
            mean_rate=normal(tasks) - 5,
            weights=[0.2 * normal(*shape) for shape in shapes],
        )

    def arguments(self) -> tuple[Any, ...]:
        """As the operator takes them."""
        return self.params, self.grads, self.states, self.biases, self.mean_rate, self.weights

    def leaves(self) -> list[Tensor]:
        """Every tensor."""
        return [*self.params, *self.grads, *self.states, self.biases, self.mean_rate, *self.weights]

    def forward(self, contender: Contender) -> list[Tensor]:
        """The step without a graph."""
        with torch.no_grad():
            return results(contender(*self.arguments()))

    def forward_backward(self, contender: Contender) -> list[Tensor]:
        """Gradients of every tensor, the results themselves as the gradients of the results."""
        leaves = self.leaves()
        for leaf in leaves:
            leaf.requires_grad_()
        new = results(contender(*self.arguments()))
        return list(torch.autograd.grad(new, leaves, [x.detach() for x in new]))


def results(step: Step) -> list[Tensor]:
    """Every result."""
    return [*step.params, *step.states, step.means]
