"""Cases of the cluster benchmark: problems, and ways to train on them.

Axis legend: T tasks, C clusters, K inner steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.learners import ClusteredLearner, MAMLLearner, RuleLearner
from metakern.models import mlp
from metakern.rules import CoordinatewiseLSTM
from metakern.tasks import ClassicFunction, Digits, MixedOptimizees, Quadratics, TaskDistribution, mixture

#: Domains of the digits.
DOMAINS = ("identity", "inverted", "blurred", "permuted")

#: Kinds of problems to optimise, the 10-dimensional quadratics first.
FUNCTIONS = ("rosenbrock", "ackley", "styblinski_tang")

#: Plain MAML, the baseline of every comparison, and the single learners that clusters are compared with.
PLAIN, SETTLED, WIDE = "plain", "plain-settled", "wide"
PEERS = (PLAIN, SETTLED, WIDE)


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        title: in words
        options: of :class:`metakern.learners.ClusteredLearner`; None: one learner. Numbers of iterations are given as
            shares of the run.
        clusters: C; None: as many as there are true modes
        settled: whether the learning rate falls to zero in the end and weights are averaged
        batches: of :class:`metakern.learners.clustering.ClusterSampler`
        by_loss: whether evaluation assigns tasks by support losses, even if training does not
        wide: one model with as many parameters as all clusters together
    """

    title: str
    options: Mapping[str, Any] | None = None
    clusters: int | None = None
    settled: bool = False
    batches: str = "uniform"
    by_loss: bool = False
    wide: bool = False

    @property
    def proposed(self) -> bool:
        """Whether it finds clusters itself; such a way is also run for equal time."""
        return self.options is not None and not self.by_loss and self.options.get("assign") != "modes"


@dataclass(frozen=True)
class Problem:
    """Tasks, the learner for them, and ways to train it.

    Attributes:
        title: in words
        settings: further figures that describe it
        tasks: the distribution
        fresh: a learner, or a wide one
        modes: true modes of the tasks
        measure: reported measure: "loss", "accuracy", or "log_loss", the mean log10 loss
        iterations: of training
        outer_lr: Adam's
        ways: by name, the first of them :data:`PLAIN`
    """

    title: str
    settings: Mapping[str, Any]
    tasks: Callable[[], TaskDistribution]
    fresh: Callable[[bool], nn.Module]
    modes: int
    measure: str
    iterations: int
    outer_lr: float
    ways: Mapping[str, Way]

    def described(self) -> dict[str, Any]:
        """The settings, for the results."""
        names = ("title", "modes", "measure", "iterations", "outer_lr")
        return {name: getattr(self, name) for name in names} | dict(self.settings)

    def learner(self, way: Way, seed: int, iterations: int) -> nn.Module:
        """A fresh learner; the same seed gives the same weights. Numbers of iterations are shares of the run."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            learner = self.fresh(way.wide)
        if way.options is None:
            return learner
        counts = {k: math.ceil(v * iterations) for k, v in way.options.items() if k in ("warmup", "begin", "anneal")}
        return ClusteredLearner(learner, way.clusters or self.modes, seed=seed, **{**way.options, **counts})


def _maml(
    title: str, tasks: Callable[[], TaskDistribution], widths: tuple[int, ...], wide: tuple[int, ...], **rest: Any
) -> Problem:
    """MAML learner on an MLP of ``widths``, the inputs first, or of ``wide``."""
    loss: Callable[..., Tensor] = F.mse_loss if rest["measure"] == "loss" else F.cross_entropy
    lr, steps = rest.pop("lr"), 5
    settings = {"widths": widths, "wide": wide, "steps": steps, "lr": lr}

    def fresh(is_wide: bool) -> nn.Module:
        return MAMLLearner(mlp(*(wide if is_wide else widths)), loss=loss, steps=steps, inner_lr=lr)

    return Problem(title, settings, tasks, fresh, outer_lr=1e-3, **rest)


#: Stages of clustering by loss, as shares of the run.
STAGES = {"warmup": 0.02, "begin": 0.02}

_PLAIN = {PLAIN: Way("MAML, uniform sampler"), SETTLED: Way("MAML, decay and averaging", settled=True)}
_WIDE = {WIDE: Way("MAML of as many parameters as the clusters, decay and averaging", settled=True, wide=True)}
_ORACLE = {
    "oracle": Way("a learner per true mode, decay and averaging", {"assign": "modes"}, settled=True, by_loss=True)
}
_SINGLE = _PLAIN | _WIDE | _ORACLE


def noise(batch: Any) -> Tensor:
    """A task embedding [T, 1] that is uninformative but deterministic."""
    sums: Tensor = batch.support_x.flatten(1).sum(1, keepdim=True)
    return (1e4 * sums).frac()


#: Control experiment: as many learners, with randomly assigned tasks.
_RANDOM = {"assign": "embedding", "embedding": noise}

#: Clusters by KMeans on support gradients alone.
_BY_EMBEDDING = {"assign": "embedding"}

#: Clusters for regressions: several per mode. The temperature of soft assignment was not tuned.
MANY = 12
CLUSTERED = {
    "few": Way("as many clusters as modes, by least loss", STAGES, settled=True),
    "clusters": Way("12 clusters, by least loss", STAGES, MANY, settled=True),
}
OTHERS = {
    "soft": Way("12 clusters, softly by loss", {**STAGES, "temperature": 0.1, "anneal": 0.6}, MANY, settled=True),
    "kmeans": Way("12 clusters, by KMeans of gradients alone", {**STAGES, **_BY_EMBEDDING}, MANY, settled=True),
    "random": Way("12 learners of tasks at random", {**STAGES, **_RANDOM}, MANY, settled=True, by_loss=True),
}

#: One learner for all clusters, which only shape its batches.
_BATCHES = {"assign": "embedding", "per_cluster": False}


def _shared(learner: str, number: int, options: Mapping[str, Any], clusters: int | None = None) -> dict[str, Way]:
    """One learner whose batches are shaped by this many clusters."""
    words = {"balanced": "balanced over", "one": "of one of"}
    return {
        batches: Way(
            f"one {learner}, batches {how} {number} clusters", options, clusters, settled=True, batches=batches
        )
        for batches, how in words.items()
    }


DIGITS_STAGES = {"warmup": 0.3, "begin": 0.05}
DIGITS_WAYS = _SINGLE | {
    "few": Way("4 clusters, by least loss", DIGITS_STAGES, settled=True),
    "clusters": Way("8 clusters, by least loss", DIGITS_STAGES, 8, settled=True),
    "kmeans": Way("8 clusters, by KMeans of gradients alone", {**DIGITS_STAGES, **_BY_EMBEDDING}, 8, settled=True),
    **_shared("learner", len(DOMAINS), _BATCHES),
    "random": Way("8 learners of tasks at random", {**DIGITS_STAGES, **_RANDOM}, 8, settled=True, by_loss=True),
}

#: Probe steps that describe a problem to optimise, and their length.
PROBES, PROBE_LENGTH = 3, 0.1


def first_steps(batch: Any) -> Tensor:
    """Problem embeddings [T, 2 * PROBES]: log10 of losses and gradient norms at a few points.

    The points follow gradient descent from the problem's own starting point.
    """
    described = []
    for group in batch.select(slice(None)).groups:
        x, figures = group.init_params()["x"], []
        for _ in range(PROBES):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                losses = group.loss({"x": x})
                (gradients,) = torch.autograd.grad(losses.sum(), x)
            norms = gradients.norm(dim=1).clamp(min=1e-6)
            figures += [losses.detach().clamp(min=1e-6).log10(), norms.log10()]
            x = x - PROBE_LENGTH * gradients / norms.unsqueeze(1)
        described.append(torch.stack(figures, 1))
    return torch.cat(described)


#: Clusters found among problems; of 4, 6 and 8 this number best separated the kinds of train tasks.
_FOUND = {"assign": "embedding", "embedding": first_steps, "dim": 2 * PROBES}
PROBLEM_CLUSTERS = 6

RULE_WAYS = {
    PLAIN: Way("one rule, uniform sampler"),
    SETTLED: Way("one rule, decay and averaging", settled=True),
    "oracle": Way(
        "a rule per kind, which is told, after a shared one", {"assign": "modes", "warmup": 0.3}, settled=True
    ),
    "clusters": Way(
        "6 clusters of first losses and gradients, after a shared rule",
        {**_FOUND, "warmup": 0.3},
        PROBLEM_CLUSTERS,
        settled=True,
    ),
    **_shared("rule", PROBLEM_CLUSTERS, {**_FOUND, "per_cluster": False}, PROBLEM_CLUSTERS),
}


def _regression(modes: int, iterations: int, ways: Mapping[str, Way]) -> Problem:
    return _maml(
        f"{modes}-mode regression, 10-shot",
        lambda: mixture(modes, support=10, query=10),
        (1, 40, 40, 1),
        (1, 144, 144, 1),
        lr=0.001,
        modes=modes,
        measure="loss",
        iterations=iterations,
        ways=ways,
    )


PROBLEMS = {
    "regression-3": _regression(3, 9000, _SINGLE | CLUSTERED | OTHERS),
    "regression-5": _regression(5, 4500, _PLAIN | _ORACLE | CLUSTERED),
    "digits": _maml(
        "5-way 1-shot digits in 4 domains",
        lambda: Digits(ways=5, support=1, query=10, domains=DOMAINS),
        (64, 64, 64, 5),
        (64, 230, 230, 5),
        lr=0.1,
        modes=len(DOMAINS),
        measure="accuracy",
        iterations=2000,
        ways=DIGITS_WAYS,
    ),
    "optimizees": Problem(
        "4 kinds of functions to minimise, 40 steps",
        {
            "kinds": ("quadratics", *FUNCTIONS),
            "steps": 40,
            "unroll": 20,
            "probes": PROBES,
            "probe_length": PROBE_LENGTH,
        },
        lambda: MixedOptimizees([Quadratics(10), *map(ClassicFunction, FUNCTIONS)]),
        lambda _: RuleLearner(CoordinatewiseLSTM(), steps=40, unroll=20),
        modes=1 + len(FUNCTIONS),
        measure="log_loss",
        iterations=400,
        outer_lr=1e-3,
        ways=RULE_WAYS,
    ),
}
