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


def _buffer(state: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    return state.setdefault(name, torch.zeros_like(like))


def sgd(grad: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
    """The gradient."""
    del state, step
    return grad


def momentum(grad: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
    """V' = 0.9 v + g."""
    del step
    return _buffer(state, "v", grad).mul_(0.9).add_(grad)


def rmsprop(grad: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
    """G / (√s' + 1e-8), s' = 0.99 s + 0.01 g²."""
    del step
    mean = _buffer(state, "s", grad).mul_(0.99).addcmul_(grad, grad, value=0.01)
    return grad / mean.sqrt().add_(1e-8)


def adam(grad: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
    """m̂ / (√v̂ + 1e-8), decays 0.9 and 0.999."""
    mean = _buffer(state, "m", grad).mul_(0.9).add_(grad, alpha=0.1)
    square = _buffer(state, "v", grad).mul_(0.999).addcmul_(grad, grad, value=0.001)
    first, second = (-math.expm1(step * math.log(decay)) for decay in (0.9, 0.999))
    return mean / square.div(second).sqrt_().add_(1e-8).mul_(first)


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
            direction = self.direction(g, self.states.setdefault(index, {}), self.done)
            new.append(start - rates * direction)
        return new
