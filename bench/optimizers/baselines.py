"""Baselines with a learning rate of every task's own, so that all rates of a grid train side by side.

The formulas are those of ``torch.optim`` with its defaults; tests/bench holds them to that.

Axis legend: T tasks, ``*shape`` the shape of one parameter tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: A step of one tensor: (gradient, state, number of the step from 1, its share of all steps) gives the direction.
Direction = Callable[[Tensor, dict[str, Tensor], int], Tensor]

#: Weight decay of AdamW, torch's default.
WEIGHT_DECAY = 0.01


def sgd(grad: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
    """The gradient."""
    del state, step
    return grad


def momentum(grad: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
    """V' = 0.9 v + g."""
    del step
    state["v"] = 0.9 * state["v"] + grad if "v" in state else grad
    return state["v"]


def rmsprop(grad: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
    """G / (√s' + 1e-8), s' = 0.99 s + 0.01 g²."""
    del step
    state["s"] = 0.99 * state.get("s", torch.zeros_like(grad)) + 0.01 * grad * grad
    return grad / (state["s"].sqrt() + 1e-8)


def adam(grad: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
    """m̂ / (√v̂ + 1e-8), decays 0.9 and 0.999."""
    zero = torch.zeros_like(grad)
    state["m"] = 0.9 * state.get("m", zero) + 0.1 * grad
    state["v"] = 0.999 * state.get("v", zero) + 0.001 * grad * grad
    root = (state["v"] / -math.expm1(step * math.log(0.999))).sqrt()
    return state["m"] / -math.expm1(step * math.log(0.9)) / (root + 1e-8)


#: Direction of every baseline, and whether it is AdamW with a cosine decay over all steps.
BASELINES: dict[str, tuple[Direction, bool]] = {
    "SGD": (sgd, False),
    "Momentum 0.9": (momentum, False),
    "RMSprop": (rmsprop, False),
    "Adam": (adam, False),
    "AdamW, cosine": (adam, True),
}


class Baseline:
    """An optimizer of params [T, *shape].

    Args:
        name: one of :data:`BASELINES`
        rates: learning rates [T]
        steps: number of all steps, for the cosine
    """

    def __init__(self, name: str, rates: Tensor, steps: int) -> None:
        self.direction, self.decays = BASELINES[name]
        self.rates, self.steps, self.done = rates, steps, 0
        self.states: dict[int, dict[str, Tensor]] = {}

    def step(self, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """New params after a step."""
        share = 0.5 * (1 + math.cos(math.pi * self.done / self.steps)) if self.decays else 1.0
        self.done += 1
        new = []
        for index, (p, g) in enumerate(zip(params, grads, strict=True)):
            rates = (share * self.rates).view(-1, *[1] * (p.dim() - 1))
            start = p * (1 - WEIGHT_DECAY * rates) if self.decays else p
            new.append(start - rates * self.direction(g, self.states.setdefault(index, {}), self.done))
        return new
