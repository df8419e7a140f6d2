"""An update rule as a meta-learner for the trainer.

By truncated backpropagation through time (Andrychowicz et al. 2016, arXiv 1606.04474, section 3): T problems are solved
side by side for some steps; after every ``unroll`` steps the rule's weights take an outer step on the losses of these
steps, and parameters and state are carried on, detached. Or by evolution strategies, which need no derivatives of the
rule and can be unbiased over unrolls of any length; see ``estimators``.

Axis legend: T problems; a coordinatewise rule takes the step of all coordinates of all problems in one launch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from metakern.core.checks import check_count
from metakern.inner_loop.loop import InnerLoop
from metakern.inner_loop.updates import RuleUpdate
from metakern.learners.estimators import STRATEGIES, check_estimator
from metakern.learners.estimators.copies import flat_weights, learned_weights
from metakern.learners.estimators.pairs import Pairs
from metakern.learners.objectives import LOSS_DATA, check_objective
from metakern.learners.starts import starting_params
from metakern.learners.unroll import Optimized, Unrolled, check_held_out
from metakern.rules.protocol import detached
from metakern.rules.registry import make
from metakern.tasks import OptimizeeBatch

#: log 1e6, the largest "relative" measure.
_WORST = math.log(1e6)


class RuleLearner(nn.Module):
    """A rule that is meta-trained on problems of one kind, or of several at once (:class:`MixedOptimizees`).

    Args:
        rule: an update rule: ``init_state(params)`` and ``forward(params, grads, state)``, where params are a tree of
            tensors [T, *shape] or, for a mixture, a tuple of such trees; see :class:`metakern.tasks.OptimizeeBatch`. Or
            the name of a new one with its default options, as for :func:`metakern.rules.make`, which learns ``lr`` if
            the rule has no weights
        steps: inner steps of an episode
        unroll: inner steps between two outer steps; divides ``steps``
        objective: one of :data:`metakern.learners.objectives.OBJECTIVES`
        second_order: also differentiate through the gradients that the rule receives
        loss_on: "train": the objective is taken on the minibatches that the rule sees next; "held-out": on samples
            that it never sees, which the problems must have (:meth:`NetworkProblem.hold_out`)
        estimator: "tbptt" backpropagates through each unroll; "es", "pes" and "noise-reuse" are evolution strategies,
            which take one outer step per meta-batch, a truncation of ``unroll`` steps; ``steps`` is then the longest
            life of a problem, and each meta-batch holds the problems that replace those that end. Their problems must
            derive from :class:`metakern.tasks.ProblemBatch`. They count the losses before each update
        sigma: standard deviation of their perturbations of the weights; default 0.01
        min_steps: shortest life of their problems; lengths are log-uniform; default: ``unroll``
        max_difference: their largest difference between the losses of a pair, in size; default: no limit

    Raises:
        TypeError, ValueError: for settings out of range.

    Example:
        >>> learner = RuleLearner(CoordinatewiseLSTM())
        >>> optimizer = torch.optim.Adam(learner.parameters(), 1e-2)
        >>> for losses in learner.meta_losses(DigitsMLP().sample(8, torch.Generator())):
        ...     optimizer.zero_grad()
        ...     losses.mean().backward()
        ...     optimizer.step()
    """

    def __init__(
        self,
        rule: nn.Module | str,
        *,
        steps: int = 100,
        unroll: int = 20,
        objective: str = "log",
        second_order: bool = False,
        loss_on: str = "train",
        estimator: str = "tbptt",
        sigma: float | None = None,
        min_steps: int | None = None,
        max_difference: float | None = None,
    ) -> None:
        super().__init__()
        steps, unroll = check_count("steps", steps), check_count("unroll", unroll)
        if estimator == "tbptt" and steps % unroll:
            raise ValueError(f"unroll must divide steps, {steps}, got {unroll}")
        if loss_on not in LOSS_DATA:
            raise ValueError(f"loss_on must be one of {', '.join(LOSS_DATA)}, got {loss_on!r}")
        self._objective = check_objective(objective, unroll)
        rule = make(rule, learned=True) if isinstance(rule, str) else rule
        self.rule: Any = rule
        self.loss_on = loss_on
        self.steps, self.unroll, self.objective, self.second_order = steps, unroll, objective, second_order
        self.estimator = estimator
        options = check_estimator(
            estimator,
            second_order=second_order,
            unroll=unroll,
            steps=steps,
            sigma=sigma,
            min_steps=min_steps,
            max_difference=max_difference,
        )
        self.pairs: Pairs | None = None
        if options is not None:
            learned_weights(rule)  # raises for a rule without any
            options |= {"unroll": unroll, "steps": steps, "objective": self._objective}
            self.pairs = Pairs(STRATEGIES[estimator], held_out=loss_on == "held-out", **options)
        self._tasks: Any = None
        self._calls: int | None = None  # of meta_losses since on_iteration, None before it

    def __repr__(self) -> str:
        settings = f"steps={self.steps}, unroll={self.unroll}, objective={self.objective!r}"
        return f"RuleLearner({type(self.rule).__name__}, {settings}, estimator={self.estimator!r})"

    def on_iteration(self, iteration: int, tasks: Any, generator: torch.Generator) -> None:
        """Called by the trainer before each meta-batch: remembers the distribution of the problems in flight."""
        del iteration, generator
        self._tasks, self._calls = tasks, 0

    def meta_losses(self, batch: OptimizeeBatch) -> Iterator[Tensor]:
        """Yields losses [T], averaged over the steps of an unroll.

        "tbptt" solves the problems once, and yields after every unroll; the others yield once. For every objective the
        values are those of f; the gradient of their mean is that of the objective's mean over problems and steps. The
        caller may change the weights between tensors.

        Raises:
            ValueError: for problems without the held-out samples asked for; for evolution strategies also for another
                number of problems than before, and if the trainer computes a meta-batch in parts (``batch_parts``)
            TypeError: for problems that evolution strategies cannot keep
        """
        if self.loss_on == "held-out":
            check_held_out(batch)
        yield from self._backpropagated(batch) if self.pairs is None else self._estimated(self.pairs, batch)

    def _estimated(self, pairs: Pairs, batch: OptimizeeBatch) -> Iterator[Tensor]:
        if self._calls is not None:
            self._calls += 1
            if self._calls > 1:
                raise ValueError(
                    f"batch_parts must be 1 with estimator {self.estimator!r}, which keeps a problem for every task of "
                    "a meta-batch, got more parts"
                )
        losses, gradients = pairs.estimate(self.rule, batch, self._tasks)
        surrogate = (gradients * flat_weights(self.rule)).sum(1)
        yield losses + (surrogate - surrogate.detach())

    def _backpropagated(self, batch: OptimizeeBatch) -> Iterator[Tensor]:
        update = RuleUpdate(self.rule, redraws=True)
        loop = InnerLoop(update, [not self.second_order] * self.unroll)
        # The objective "last" counts the loss before the last update. For the others θ_0 does not count: what the rule
        # does begins with θ_1.
        points = range(self.unroll - 1, self.unroll) if self._objective.last else range(1, self.unroll + 1)
        params, first = starting_params(self.rule, batch), None
        state = update.init_state(params)
        for _ in range(self.steps // self.unroll):
            unrolled = Unrolled(batch, self._objective, points, held_out=self.loss_on == "held-out", first=first)
            params, state, _ = loop.run(unrolled, params, state)
            if self.unroll in points:
                unrolled.gradients(update.points(params, state), self.unroll, not self.second_order)
            first = unrolled.first
            yield unrolled.losses()
            params, state = detached(params), detached(state)

    @torch.no_grad()
    def evaluate(self, batch: OptimizeeBatch) -> dict[str, Tensor]:
        """Losses [T] of the problems on all their data after ``steps`` steps of the rule, as "loss".

        With the objective "relative-log" also "relative", log(f/(f_0 + 1e-6) + 1e-6), at most log 1e6, also for
        problems that diverge: a measure for mixtures, whose mean loss is that of their largest problems.
        """
        params, update = starting_params(self.rule, batch), RuleUpdate(self.rule, redraws=True)
        first = batch.full_loss(params) if self._objective.relative else None
        loop = InnerLoop(update, [True] * self.steps)
        params, _, _ = loop.run(Optimized(batch), params, update.init_state(params))
        losses = batch.full_loss(params)
        if first is None:
            return {"loss": losses}
        return {"loss": losses, "relative": self._objective.value(losses, first).nan_to_num(_WORST).clamp(max=_WORST)}

    # ------------------------------------------------------------------------------ problems in flight, by process

    def set_process(self, rank: int, world: int) -> None:
        """Called by the trainer: this process and their number. Each keeps the problems of its share of the tasks."""
        if self.pairs is not None:
            self.pairs.set_process(rank, world)

    def process_state(self) -> dict[str, Any] | None:
        """What only this process knows, as plain data; the trainer collects it for checkpoints."""
        return None if self.pairs is None else self.pairs.process_state()

    def set_process_states(self, states: list[Any]) -> None:
        """What all processes know."""
        if self.pairs is not None:
            self.pairs.set_process_states(states)

    def without_process_states(self, state: dict[str, Any]) -> dict[str, Any]:
        """A ``state_dict()`` of this learner without problems in flight."""
        return state if self.pairs is None else {**state, "pairs._extra_state": {"shares": []}}
