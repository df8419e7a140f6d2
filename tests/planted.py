"""Two task families that no single learner can serve: steeply rising and steeply falling lines."""

from __future__ import annotations

import torch
from torch import nn

from metakern.learners import MAMLLearner
from metakern.tasks import Episodes, TaskDistribution


class TwoFamilies:
    """y = ±10x + b, b from U[-1, 1]; mode 0 rises, mode 1 falls."""

    def __init__(self, rising: float = 0.5, support: int = 5, query: int = 5) -> None:
        self.rising, self.support, self.query = rising, support, query

    def sample(self, num_tasks: int, generator: torch.Generator) -> Episodes:
        modes = (torch.rand(num_tasks, generator=generator) >= self.rising).long()
        x = torch.rand(num_tasks, self.support + self.query, 1, generator=generator) * 2 - 1
        b = torch.rand(num_tasks, 1, 1, generator=generator) * 2 - 1
        y = (10 - 20 * modes).view(-1, 1, 1) * x + b
        (support_x, query_x), (support_y, query_y) = (z.split([self.support, self.query], 1) for z in (x, y))
        return Episodes(support_x, support_y, query_x, query_y, modes)

    def split(self, name: str) -> TaskDistribution:
        return self


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_learner(steps: int = 1, lr: float = 0.1, seed: int = 0) -> MAMLLearner:
    """One weight, one bias, from a random start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MAMLLearner(nn.Sequential(nn.Linear(1, 1)), steps=steps, inner_lr=lr)


def agreement(labels: torch.Tensor, modes: torch.Tensor) -> float:
    """Share of tasks whose label matches their family, under the better of the two label assignments."""
    same = float((labels == modes).float().mean())
    return max(same, 1 - same)
