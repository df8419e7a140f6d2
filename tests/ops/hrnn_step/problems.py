"""Calls of hrnn_step, and their gradients, argument by argument.

Axis legend: M tensors, T tasks, n coordinates of a segment, H = 10 hidden units, R = 21 rows of the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metakern.ops.hrnn_step import Step, hrnn_step
from tests.conformance.ops.hrnn_step import HIDDEN, make_states, make_weights

LISTS = ("params", "grads", "states", "weights")

#: Rows of the state.
MEANS, SQUARES = slice(HIDDEN, HIDDEN + 4), slice(HIDDEN + 4, HIDDEN + 8)
RATE, SCALE_DECAY, INPUT_DECAY = HIDDEN + 8, HIDDEN + 9, HIDDEN + 10


@dataclass
class Problem:
    """Arguments of one call, in the operator's order."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[Tensor]
    biases: Tensor
    mean_rate: Tensor
    weights: list[Tensor]

    def arguments(self) -> tuple[Any, ...]:
        return self.params, self.grads, self.states, self.biases, self.mean_rate, self.weights

    def named(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        lists = {f"{name}[{i}]": x for name in LISTS for i, x in enumerate(getattr(self, name))}
        return lists | {"biases": self.biases, "mean_rate": self.mean_rate}

    def run(self, backend: str = "cpp") -> Step:
        return hrnn_step(*self.arguments(), backend=backend)

    def tensors(self, kept: Sequence[int]) -> Problem:
        """The problem with some of the tensors alone."""
        lists = {name: [getattr(self, name)[i] for i in kept] for name in LISTS[:3]}
        return replace(self, **lists, biases=self.biases[list(kept)])


def make_problem(
    sizes: Sequence[int], tasks: int = 1, *, attention: bool = False, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Problem:
    """A tensor of every size, [T, n], with states as after some steps."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Problem(
        params=[draw(tasks, n).to(dtype) for n in sizes],
        grads=[draw(tasks, n).to(dtype) for n in sizes],
        states=[make_states(tasks, n, generator).to(wide) for n in sizes],
        biases=(0.5 * draw(len(sizes), tasks, 3 * HIDDEN)).to(wide),
        mean_rate=(0.5 * draw(tasks) - 3).to(wide),
        weights=[w.to(wide) for w in make_weights(attention, generator)],
    )


def results(step: Step) -> dict[str, Tensor]:
    """Every result by name."""
    lists = {"params": step.params, "states": step.states, "attended": step.attended}
    return {f"{name}[{i}]": x for name, xs in lists.items() for i, x in enumerate(xs)} | {"means": step.means}


def gradients(problem: Problem, backend: str) -> dict[str, Tensor]:
    """Gradients of every argument, from random gradients of every result."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in problem.named().items()}
    lists = {name: [leaves[f"{name}[{i}]"] for i in range(len(getattr(problem, name)))] for name in LISTS}
    call = Problem(**lists, biases=leaves["biases"], mean_rate=leaves["mean_rate"])
    outputs = list(results(call.run(backend)).values())
    generator = torch.Generator().manual_seed(9)
    seeds = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
    found = torch.autograd.grad(outputs, list(leaves.values()), seeds, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))
