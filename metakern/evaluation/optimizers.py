"""Evaluation of learned optimizers on unseen networks: training curves, tuned baselines, speed."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metakern.core.renamed import renamed
from metakern.core.torch_private import pytree
from metakern.inner_loop.loop import InnerLoop
from metakern.inner_loop.updates import RuleUpdate
from metakern.learners import RuleLearner
from metakern.learners.starts import starting_params
from metakern.learners.unroll import Optimized
from metakern.rules import Rule
from metakern.tasks import OptimizeeBatch, Optimizees

OptimizerFactory = Callable[[list[Tensor]], torch.optim.Optimizer]

#: Grid of learning rates for the baselines: 10^-4 to 10^1.5, four per decade.
LEARNING_RATES = tuple(10 ** (k / 4) for k in range(-16, 7))

#: Baseline optimizers by name, as functions of the learning rate.
BASELINES: dict[str, Callable[[float], OptimizerFactory]] = {
    "SGD": lambda lr: lambda params: torch.optim.SGD(params, lr),
    "Momentum 0.9": lambda lr: lambda params: torch.optim.SGD(params, lr, momentum=0.9),
    "RMSprop": lambda lr: lambda params: torch.optim.RMSprop(params, lr),
    "Adam": lambda lr: lambda params: torch.optim.Adam(params, lr),
}


@dataclass(frozen=True)
class Curve:
    """Training losses of one optimizer on T networks.

    Attributes:
        name: the optimizer's name
        losses: full training loss before every step and after the last, [steps + 1, T]
        lr: learning rate of a baseline, chosen on the validation split

    Example:
        >>> curve = Curve("Adam", torch.rand(101, 64), lr=0.1)
    """

    name: str
    losses: Tensor
    lr: float | None = None

    @property
    def final(self) -> Tensor:
        """Losses [T] after the last step."""
        return self.losses[-1]

    @property
    def mean(self) -> float:
        """Mean loss after the last step; infinity if any network diverged to NaN or infinity."""
        mean = self.final.mean().item()
        return mean if math.isfinite(mean) else math.inf

    def summary(self) -> dict[str, float | str | list[float] | None]:
        """Plain figures for JSON."""
        return {
            "optimizer": self.name,
            "lr": self.lr,
            "final_loss_mean": self.final.mean().item(),
            "final_loss_std": self.final.std(correction=0).item(),
            "final_loss_median": self.final.median().item(),
            "final_loss_max": self.final.max().item(),
            "curve_mean": self.losses.mean(1).tolist(),
            "curve_std": self.losses.std(1, correction=0).tolist(),
        }


def training_curve(
    factory: OptimizerFactory, problems: Optimizees, *, num_tasks: int, steps: int, seed: int, every_step: bool = True
) -> Tensor:
    """Train ``num_tasks`` fresh networks; the same seed gives the same networks and minibatches.

    The optimizers are coordinatewise, so all T networks train at once: every tensor [T, *shape] is one parameter.

    Returns:
        full training losses, [steps + 1, T]; without ``every_step`` only the last, [1, T]

    Example:
        >>> adam = BASELINES["Adam"](1e-2)
        >>> training_curve(adam, DigitsMLP(), num_tasks=4, steps=3, seed=0).shape
        torch.Size([4, 4])
    """
    batch = problems.sample(num_tasks, torch.Generator().manual_seed(seed))
    params = pytree.tree_map(Tensor.requires_grad_, batch.init_params())
    leaves = pytree.tree_leaves(params)
    optimizer = factory(leaves)
    losses = []
    for _ in range(steps):
        if every_step:
            with torch.no_grad():
                losses.append(batch.full_loss(params))
        for leaf, grad in zip(leaves, torch.autograd.grad(batch.loss(params).sum(), leaves), strict=True):
            leaf.grad = grad
        optimizer.step()
    with torch.no_grad():
        losses.append(batch.full_loss(params))
    return torch.stack(losses)


class _Traced(Optimized):
    """Problems that record their full losses at the start and after every step."""

    def __init__(self, batch: OptimizeeBatch, start: Any) -> None:
        super().__init__(batch)
        self.losses = [batch.full_loss(start)]

    def stepped(self, params: Any, step: int) -> None:
        """Record the losses [T] of the new params."""
        self.losses.append(self.batch.full_loss(params))


@torch.no_grad()
def rule_curve(rule: Rule, problems: Optimizees, *, num_tasks: int, steps: int, seed: int) -> Tensor:
    """:func:`training_curve` of any rule, which sees the task axis and gets the losses.

    A rule that learns initial parameters starts from those.

    Returns:
        full training losses, [steps + 1, T]

    Example:
        >>> rule_curve(metakern.rules.load("digits_lstm"), DigitsMLP(), num_tasks=4, steps=3, seed=0).shape
        torch.Size([4, 4])
    """
    batch = problems.sample(num_tasks, torch.Generator().manual_seed(seed))
    update, params = RuleUpdate(rule), starting_params(rule, batch)
    traced = _Traced(batch, params)
    InnerLoop(update, [True] * steps).run(traced, params, update.init_state(params))
    return torch.stack(traced.losses)


#: Trainings per comparison: one of the learned optimizer; per baseline, one per learning rate and a final one.
TRAININGS = 1 + len(BASELINES) * (len(LEARNING_RATES) + 1)

#: Progress callback: description of a finished training, and whether it is a curve of the comparison.
Advance = Callable[[str, bool], object]


def tune(
    name: str, problems: Optimizees, *, num_tasks: int, steps: int, seed: int, advance: Advance | None = None
) -> float:
    """Find the learning rate of :data:`LEARNING_RATES` with the lowest mean final loss for a baseline.

    ``advance`` is called after every rate.

    Example:
        >>> tune("Adam", Quadratics(), num_tasks=4, steps=2, seed=0) in LEARNING_RATES
        True
    """

    def final(lr: float) -> float:
        losses = training_curve(
            BASELINES[name](lr), problems, num_tasks=num_tasks, steps=steps, seed=seed, every_step=False
        )
        if advance is not None:
            advance(f"{name}, learning rate {lr:.3g}", False)
        return Curve(name, losses, lr).mean

    return min(LEARNING_RATES, key=final)


def compare_optimizers(
    rule: Rule,
    problems: Optimizees,
    *,
    num_tasks: int = 64,
    steps: int = 100,
    seed: int = 1000,
    advance: Advance | None = None,
) -> Iterable[Curve]:
    """Train the same fresh networks by the learned optimizer, then by every baseline at its best learning rate.

    Learning rates are tuned on the validation split, which also selected the rule's weights; the curves are of
    networks trained on the test split. ``advance`` is called :data:`TRAININGS` times.

    Example:
        >>> rule = metakern.rules.load("digits_lstm")
        >>> learned, *baselines = compare_optimizers(rule, DigitsMLP(), num_tasks=2, steps=2)
        >>> learned.losses.shape, [curve.name for curve in baselines]
        (torch.Size([3, 2]), ['SGD', 'Momentum 0.9', 'RMSprop', 'Adam'])
    """
    test, valid = problems.split("test"), problems.split("valid")

    def told(name: str, losses: Tensor, lr: float | None = None) -> Curve:
        if advance is not None:
            advance(name, True)
        return Curve(name, losses, lr)

    sizes: dict[str, Any] = {"num_tasks": num_tasks, "steps": steps, "seed": seed}
    yield told(rule.title, rule_curve(rule, test, **sizes))
    for name, baseline in BASELINES.items():
        lr = tune(name, valid, num_tasks=num_tasks, steps=steps, seed=seed + 1, advance=advance)
        yield told(name, training_curve(baseline(lr), test, **sizes), lr)


#: Largest relative difference between the meta-gradients of the fused and the plain rule. Both are float32; rounding
#: grows along the unroll: about 3e-7 with fresh weights, 1e-4 with trained ones.
SPEED_TOLERANCE = 5e-3


@dataclass(frozen=True)
class SpeedComparison:
    """Seconds of one meta-iteration (an episode with all its outer steps), fused and plain, medians of ``repeats``.

    ``difference`` is the relative difference of the two meta-gradients of one unroll on the same draws.

    Example:
        >>> found = compare_speed(CoordinatewiseLSTM(), DigitsMLP(), num_tasks=2, steps=2, unroll=2, repeats=1)
        >>> isinstance(found, SpeedComparison), found.coordinates
        (True, 3020)
    """

    fused_seconds: float
    plain_seconds: float
    repeats: int
    coordinates: int
    difference: float
    tolerance: float = SPEED_TOLERANCE

    @property
    def ratio(self) -> float:
        """How many times faster the fused rule is."""
        return self.plain_seconds / self.fused_seconds


@renamed(lr="outer_lr")
def compare_speed(
    rule: Rule,
    problems: Optimizees,
    *,
    num_tasks: int = 8,
    steps: int = 100,
    unroll: int = 20,
    outer_lr: float = 1e-2,
    repeats: int = 3,
) -> SpeedComparison:
    """Time meta-iterations of the fused rule and of the same rule in plain PyTorch, alternating, on the same draws.

    Both are trained by Adam from ``rule``'s weights; ``rule`` itself does not change.

    Args:
        rule: the rule
        problems: the distribution, of which the "train" split is used
        num_tasks: T, problems per meta-iteration
        steps: inner steps of a meta-iteration
        unroll: inner steps between two outer steps
        outer_lr: Adam's
        repeats: timed meta-iterations of each

    Raises:
        ValueError: for a rule without a kernel, and so without a plain form to compare with
        RuntimeError: if the meta-gradients differ by more than :data:`SPEED_TOLERANCE`

    Example:
        >>> found = compare_speed(CoordinatewiseLSTM(), DigitsMLP(), num_tasks=2, steps=2, unroll=2, repeats=1)
        >>> ratio = found.plain_seconds / found.fused_seconds
    """
    peer = rule.plain()
    if peer is None:
        raise ValueError(f"rule must have a kernel and a plain form to compare with, got {type(rule).__name__}")
    runs = [
        _MetaTraining(RuleLearner(each, steps=steps, unroll=unroll), problems.split("train"), num_tasks, outer_lr)
        for each in (copy.deepcopy(rule), peer)
    ]
    fused, plain = (run.meta_gradient() for run in runs)
    difference = ((fused - plain).norm() / plain.norm()).item()
    if not difference <= SPEED_TOLERANCE:
        raise RuntimeError(
            f"the meta-gradients of the fused and the plain rule differ by {difference:.1e} relative, allowed are "
            f"{SPEED_TOLERANCE}: a ratio of their times would mean nothing"
        )
    for run in runs:  # warm up
        run.iterate()
    seconds = [[run.iterate() for run in runs] for _ in range(repeats)]
    batch = problems.sample(num_tasks, torch.Generator().manual_seed(0))
    return SpeedComparison(
        fused_seconds=statistics.median(row[0] for row in seconds),
        plain_seconds=statistics.median(row[1] for row in seconds),
        repeats=repeats,
        coordinates=sum(leaf.numel() for leaf in pytree.tree_leaves(batch.init_params())),
        difference=difference,
    )


class _MetaTraining:
    """The timed outer loop: fresh problems, Adam, clipped gradients."""

    def __init__(self, learner: RuleLearner, problems: Optimizees, num_tasks: int, lr: float) -> None:
        self.learner, self.problems, self.num_tasks = learner, problems, num_tasks
        self.weights = list(learner.parameters())
        self.optimizer = torch.optim.Adam(self.weights, lr)
        self.generator = torch.Generator().manual_seed(0)

    def meta_gradient(self) -> Tensor:
        """Meta-gradient of the first unroll on fresh problems, as one vector; weights do not change."""
        losses = next(iter(self.learner.meta_losses(self.problems.sample(self.num_tasks, self.generator))))
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(losses.mean(), self.weights)])

    def iterate(self) -> float:
        """Run a meta-iteration, one episode with an outer step after every unroll; returns its seconds."""
        start = time.perf_counter()
        for losses in self.learner.meta_losses(self.problems.sample(self.num_tasks, self.generator)):
            self.optimizer.zero_grad()
            losses.mean().backward()
            nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
        return time.perf_counter() - start
