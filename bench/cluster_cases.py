"""What training in clusters is measured on: problems, and ways to train on them.

Axis legend: T tasks, C clusters, K inner steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.inner_loop_cases import mlp
from metakern.learners import ClusteredLearner, MAMLLearner
from metakern.tasks import Digits, TaskDistribution, mixture

#: Domains that the digits are seen through.
DOMAINS = ("identity", "inverted", "blurred", "permuted")


@dataclass(frozen=True)
class Problem:
    """Tasks, and the model that adapts to them.

    Attributes:
        title: in words
        tasks: the distribution
        widths: of the MLP, inputs first
        loss: of one task
        steps: K
        lr: α
        modes: true modes of the tasks
        measure: what is reported: "loss" or "accuracy"
    """

    title: str
    tasks: Callable[[], TaskDistribution]
    widths: tuple[int, ...]
    loss: Callable[..., Tensor]
    steps: int
    lr: float
    modes: int
    measure: str

    def described(self) -> dict[str, Any]:
        """The settings, for the results."""
        names = ("title", "widths", "steps", "lr", "modes", "measure")
        return {name: getattr(self, name) for name in names}

    def learner(self, seed: int, rates: str) -> MAMLLearner:
        """A fresh one; the same weights for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = mlp(*self.widths)
        return MAMLLearner(model, loss=self.loss, steps=self.steps, lr=self.lr, rates=rates)


def _regression(modes: int) -> Problem:
    return Problem(
        f"{modes}-mode regression, 10-shot",
        lambda: mixture(modes, support=10, query=10),
        (1, 40, 40, 1),
        F.mse_loss,
        steps=5,
        lr=0.001,
        modes=modes,
        measure="loss",
    )


PROBLEMS = {
    "regression-3": _regression(3),
    "regression-5": _regression(5),
    "digits": Problem(
        "5-way 1-shot digits in 4 domains",
        lambda: Digits(ways=5, support=1, query=10, domains=DOMAINS),
        (64, 64, 64, 5),
        F.cross_entropy,
        steps=5,
        lr=0.1,
        modes=len(DOMAINS),
        measure="accuracy",
    ),
}


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        title: in words
        options: of :class:`metakern.learners.ClusteredLearner`; None: one learner
        clusters: C; None: as many as there are true modes
        settled: whether the learning rate falls to zero along a cosine and weights are averaged (:data:`AVERAGING`)
        rates: of :class:`metakern.learners.MAMLLearner`
        batches: of :class:`metakern.clustering.ClusterSampler`
    """

    title: str
    options: dict[str, Any] | None = None
    clusters: int | None = None
    settled: bool = False
    rates: str = "fixed"
    batches: str = "uniform"

    def learner(self, problem: Problem, seed: int, iterations: int) -> nn.Module:
        """A fresh one. Options that are iterations are shares of the whole run."""
        learner = problem.learner(seed, self.rates)
        if self.options is None:
            return learner
        counts = {k: round(v * iterations) for k, v in self.options.items() if k in ("warmup", "begin", "anneal")}
        return ClusteredLearner(learner, self.clusters or problem.modes, seed=seed, **{**self.options, **counts})


#: Every way to train, MAML as published first.
WAYS = {
    "plain": Way("MAML, uniform sampler"),
    "plain-settled": Way("MAML, decay and averaging", settled=True),
    "oracle": Way("one learner per true mode", {"assign": "modes"}),
    "oracle-settled": Way("one learner per true mode, decay and averaging", {"assign": "modes"}, settled=True),
    "clusters": Way("6 clusters by least loss", {"begin": 0.02, "warmup": 0.02}, clusters=6, settled=True),
}

#: Single learners that clusters are held against.
PEERS = ("plain", "plain-settled")
