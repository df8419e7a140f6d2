"""Meta-training with and without clusters: learners, ways, and one run with its curve of held-out meta-losses.

The meta-loss of a task is the mean over the steps 1 to K of an episode of log(f + 1e-3), f the loss on the minibatch
that the rule sees next: what meta-training minimises. Axis legend: T tasks, C clusters, K inner steps.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.paper import tasks as work
from bench.runs import Advance
from metakern.inner_loop.loop import InnerLoop
from metakern.inner_loop.updates import RuleUpdate
from metakern.learners import ClusteredLearner, RuleLearner, ScaledRuleLearner
from metakern.learners.scaled import kinds_by_shape, one_cluster
from metakern.learners.starts import starting_params
from metakern.learners.unroll import Optimized
from metakern.rules import CoordinatewiseLSTM, HierarchicalRNN
from metakern.training.averaging import start_anew

RULES: dict[str, Callable[[], Any]] = {"lstm": CoordinatewiseLSTM, "hrnn": HierarchicalRNN}

#: Added to losses under the logarithm, as in the objective "log".
OFFSET = 1e-3

#: Points of a probe along the gradient, and their distance.
PROBES, PROBE_LENGTH = 3, 0.1


class PaperLearner(RuleLearner):
    """A RuleLearner that measures meta-losses, and the losses that assign tasks to clusters.

    Args:
        rule: see :class:`RuleLearner`, likewise the other options
        support_steps: steps of the episode that tells which rule serves a task best
    """

    def __init__(self, rule: Any, *, support_steps: int = 20, **options: Any) -> None:
        super().__init__(rule, **options)
        self.support_steps = support_steps

    def evaluate(self, batch: Any) -> dict[str, Tensor]:
        """Measures of :func:`measured`."""
        return measured(self, batch)

    def support_losses(self, batch: Any) -> Tensor:
        """Meta-losses [T] of a short episode."""
        return (episode(self.rule, batch, self.support_steps)[0] + OFFSET).log().mean(0)

    def approach(self, batch: Any) -> None:
        """A restarted rule stays the copy that it is."""


class ScaledPaperLearner(ScaledRuleLearner):
    """A ScaledRuleLearner that measures meta-losses."""

    def evaluate(self, batch: Any) -> dict[str, Tensor]:
        """Measures of :func:`measured`."""
        self.rule.labels = self.label(batch)
        return measured(self, batch)


def measured(learner: RuleLearner, batch: Any) -> dict[str, Tensor]:
    """The meta-losses [T] as "loss", and the losses [T] on all data after the episode as "final"."""
    values, params = episode(learner.rule, batch, learner.steps)
    return {"loss": (values + OFFSET).log().mean(0), "final": batch.full_loss(params)}


@torch.no_grad()
def episode(rule: Any, batch: Any, steps: int) -> tuple[Tensor, Any]:
    """Losses [K, T] after each step, and the last params; the batch's draws stay where they were."""
    batch, update = batch.select(slice(None)), RuleUpdate(rule, redraws=True)
    params, recorded = starting_params(rule, batch), _Recorded(batch)
    params, state, _ = InnerLoop(update, [True] * steps).run(recorded, params, update.init_state(params))
    recorded.gradients(update.points(params, state), steps, True)
    return torch.stack(recorded.losses[1:]), params


class _Recorded(Optimized):
    def __init__(self, batch: Any) -> None:
        super().__init__(batch)
        self.losses: list[Tensor] = []

    def gradients(self, params: Any, step: int, first_order: bool) -> tuple[Tensor, Any]:
        losses, grads = super().gradients(params, step, first_order)
        self.losses.append(losses.detach())
        return losses, grads


# ----------------------------------------------------------------------------------------------------------- embeddings


def first_steps(batch: Any) -> Tensor:
    """[T, 2 * PROBES]: log10 of losses and gradient norms at points along gradient descent of fixed length."""
    return torch.cat([_probes(group)[0] for group in batch.select(slice(None)).groups])


def shapes(batch: Any) -> Tensor:
    """[T, 4]: log10 of all coordinates, number of tensors, their largest rank, log10 of the largest tensor."""
    found = []
    for group in batch.groups:
        sizes = [shape.numel() for shape in group.problem.shapes.values()]
        ranks = [len(shape) for shape in group.problem.shapes.values()]
        row = [math.log10(sum(sizes)), float(len(sizes)), float(max(ranks)), math.log10(max(sizes))]
        found.append(torch.tensor(row).expand(group.num_tasks, -1))
    return torch.cat(found)


def curvature(batch: Any) -> Tensor:
    """[T, 4 + 2 * PROBES + 1]: shapes, probes, and log10 of the curvature along the gradient."""
    probed = [_probes(group) for group in batch.select(slice(None)).groups]
    return torch.cat([shapes(batch), *(torch.cat(x) for x in zip(*probed, strict=True))], 1)


def _probes(group: Any) -> tuple[Tensor, Tensor]:
    params, figures, curved = group.init_params(), [], None
    before: tuple[Tensor, Tensor] | None = None
    for _ in range(PROBES):
        params = {name: p.detach().requires_grad_() for name, p in params.items()}
        with torch.enable_grad():
            losses = group.loss(params)
            grads = torch.autograd.grad(losses.sum(), list(params.values()))
        flat = torch.cat([g.flatten(1) for g in grads], 1)
        norms = flat.norm(dim=1).clamp(min=1e-6)
        figures += [losses.detach().clamp(min=1e-6).log10(), norms.log10()]
        if before is not None and curved is None:
            norm, direction = before
            curved = ((norm - (flat * direction).sum(1)).abs() / PROBE_LENGTH).clamp(min=1e-6).log10()
        direction = flat / norms.unsqueeze(1)
        before = norms, direction
        steps = direction.split([g[0].numel() for g in grads], 1)
        params = {n: p - PROBE_LENGTH * d.view(p.shape) for (n, p), d in zip(params.items(), steps, strict=True)}
    assert curved is not None
    return torch.stack(figures, 1), curved.unsqueeze(1)


# ------------------------------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        title: in words
        options: of ClusteredLearner, numbers of iterations as shares of the run; None: one rule
        clusters: C
        scales: "kinds" or "one": output scales of clusters, or a single one as a control, with shared weights
        rate: factor of the outer learning rate for the output scales
    """

    title: str
    options: Mapping[str, Any] | None = None
    clusters: int | None = 4
    scales: str = ""
    rate: float = 10.0


_FOUND = {"assign": "embedding", "embedding": first_steps, "dim": 2 * PROBES, "warmup": 0.3}
_SHAPES = {"assign": "embedding", "embedding": shapes, "dim": 4, "warmup": 0.3}
_CURVED = {"assign": "embedding", "embedding": curvature, "dim": 5 + 2 * PROBES, "warmup": 0.3}
_LOSSES = {
    "assign": "losses",
    "embedding": first_steps,
    "dim": 2 * PROBES,
    "warmup": 0.3,
    "begin": 0.1,
    "least_share": 0.0,
}

WAYS = {
    "plain": Way("one rule"),
    "told": Way("a rule per kind, which is told", {"assign": "modes", "warmup": 0.3}),
    "told-early": Way("a rule per kind, which is told, from the start", {"assign": "modes"}),
    "told-late": Way("a rule per kind, which is told, after 60 %", {"assign": "modes", "warmup": 0.6}),
    "first": Way("clusters of first losses and gradients", _FOUND),
    "shapes": Way("clusters of the params' shapes", _SHAPES),
    "shapes-late": Way("clusters of the params' shapes, after 60 %", {**_SHAPES, "warmup": 0.6}),
    "curvature": Way("clusters of shapes, first losses and curvature", _CURVED),
    "losses": Way("clusters by the adapted loss under each rule", _LOSSES),
    "soft": Way("softly by the adapted loss", {**_LOSSES, "temperature": 0.1}),
    "scales": Way("one rule, an output scale per cluster of shapes", scales="kinds"),
    "scale": Way("one rule with a learned output scale", scales="one", clusters=1),
}


#: Ways in the table: one rule, the control of scales, the proposed one, and a rule for each cluster.
REPORTED = ("plain", "scale", "scales", "shapes")


@dataclass(frozen=True)
class Plan:
    """Size of the runs."""

    iterations: int = 60
    tasks: int = 8  # of an iteration
    steps: int = 60
    unroll: int = 20
    points: int = 12  # on a curve
    outer_lr: Mapping[str, float] = field(default_factory=lambda: {"lstm": 1e-2, "hrnn": 1e-2})
    seeds: int = 5


def make(rule_name: str, way: Way, seed: int, plan: Plan) -> Any:
    """A fresh learner; the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rule = RULES[rule_name]()
    options = {"steps": plan.steps, "unroll": plan.unroll}
    if way.scales:
        label = kinds_by_shape if way.scales == "kinds" else one_cluster
        return ScaledPaperLearner(rule, way.clusters or 1, label=label, rate=way.rate, **options)
    learner: Any = PaperLearner(rule, **options)
    if way.options is not None:
        counts = {k: math.ceil(v * plan.iterations) for k, v in way.options.items() if k in ("warmup", "begin")}
        more = {"pool": 64, "refresh": max(1, plan.iterations // 6), "seed": seed}
        learner = ClusteredLearner(learner, way.clusters, **{**more, **way.options, **counts})
    return learner


def told(batch: Any) -> Any:
    """The batch with the kinds of its networks as modes, for learners that are told them."""
    changed = copy.copy(batch)
    changed.modes = kinds_by_shape(batch)
    return changed


def train(rule_name: str, way_name: str, seed: int, plan: Plan, advance: Advance, *, test: bool) -> dict[str, Any]:
    """One run: its curve on validation tasks, and with ``test`` its final figures on the test tasks."""
    way = WAYS[way_name]
    learner, generator = make(rule_name, way, seed, plan), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(learner.parameters(), plan.outer_lr[rule_name])
    source, curve, seconds = Told(work.mixture()), [], 0.0
    every = max(1, plan.iterations // plan.points)
    for iteration in range(plan.iterations + 1):
        if iteration % every == 0:
            found = learner.evaluate(told(work.validation_tasks()))
            curve.append({"iteration": iteration, "seconds": seconds, **{k: float(v.mean()) for k, v in found.items()}})
            advance(iteration / plan.iterations)
        if iteration == plan.iterations:
            break
        began = time.thread_time()
        if isinstance(learner, ClusteredLearner):
            start_anew(learner.on_iteration(iteration, source, generator), optimizer, None)
        for losses in learner.meta_losses(source.sample(plan.tasks, generator)):
            optimizer.zero_grad()
            losses.mean().backward()
            if all(p.grad is None or bool(p.grad.isfinite().all()) for p in learner.parameters()):
                optimizer.step()
        seconds += time.thread_time() - began
    result = {"rule": rule_name, "way": way_name, "seed": seed, "curve": curve, "seconds": seconds}
    if isinstance(learner, ClusteredLearner) and learner.num_active:
        batch = told(work.validation_tasks())
        table = torch.zeros(int(learner.num_active), 4, dtype=torch.int64)
        table.index_put_((learner.assign(batch), batch.modes), torch.ones((), dtype=torch.int64), accumulate=True)
        result["clusters_by_kind"] = table.tolist()
    if way.scales:
        result["scales"] = learner.factors().tolist()
    if test:
        found = learner.evaluate(told(work.held_out_tasks()))
        result["test"] = {name: float(values.mean()) for name, values in found.items()}
        result["test_of_tasks"] = found["loss"].tolist()
    return result


class Told:
    """A mixture whose batches name kinds by the params' shapes."""

    def __init__(self, tasks: Any) -> None:
        self.tasks = tasks

    def sample(self, num_tasks: int, generator: torch.Generator) -> Any:
        """Draw tasks."""
        return told(self.tasks.sample(num_tasks, generator))

    def split(self, name: str) -> Told:
        """The same mixture of another split."""
        return Told(self.tasks.split(name))


def kept(folder: Path | None, rule: str, way: str, seed: int, plan: Plan, advance: Advance) -> dict[str, Any]:
    """A run, from its file if it was made with the same settings; ways in the table are tested."""
    path = None if folder is None else folder / f"{rule}-{way}-{seed}.json"
    settings = json.loads(json.dumps([asdict(WAYS[way]), {**asdict(plan), "seeds": 0}], default=lambda f: f.__name__))
    if path is not None and path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        if found["settings"] == settings:
            return found
    found = train(rule, way, seed, plan, advance, test=way in REPORTED) | {"settings": settings}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(found))
        path.with_suffix(".part").replace(path)
    return found
