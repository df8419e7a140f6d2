"""An update rule as a meta-learner for the trainer, trained by truncated backpropagation through time.

Andrychowicz et al. 2016, arXiv 1606.04474, section 3: T problems are solved side by side for some steps; after every
``unroll`` steps the rule's weights take an outer step on the losses of these steps, and parameters and state are
carried on, detached.

Axis legend: T problems; a coordinatewise rule takes the step of all coordinates of all problems in one launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from metakern.core.checks import check_count
from metakern.core.task_params import flat_params, join_tasks, task_groups
from metakern.inner_loop.loop import InnerLoop, Problem, losses_and_gradients
from metakern.inner_loop.updates import RuleUpdate
from metakern.rules.protocol import detached
from metakern.tasks import OptimizeeBatch

#: Objectives of an unroll, summed over its steps: f, or log(f + 1e-3), which gives small, late losses more weight.
OBJECTIVES = ("sum", "log")
_LOG_OFFSET = 1e-3


class RuleLearner(nn.Module):
    """A rule that is meta-trained on problems of one kind, or of several at once (:class:`MixedOptimizees`).

    Args:
        rule: an update rule: ``init_state(params)`` and ``forward(params, grads, state)``, where params are a tree of
            tensors [T, *shape] or, for a mixture, a tuple of such trees; see :class:`metakern.tasks.OptimizeeBatch`
        steps: inner steps of an episode
        unroll: inner steps between two outer steps; divides ``steps``
        objective: one of :data:`OBJECTIVES`
        second_order: also differentiate through the gradients that the rule receives

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
        rule: nn.Module,
        *,
        steps: int = 100,
        unroll: int = 20,
        objective: str = "log",
        second_order: bool = False,
    ) -> None:
        super().__init__()
        steps, unroll = check_count("steps", steps), check_count("unroll", unroll)
        if steps % unroll:
            raise ValueError(f"unroll must divide steps, {steps}, got {unroll}")
        if objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
        self.rule: Any = rule
        self.steps, self.unroll, self.objective, self.second_order = steps, unroll, objective, second_order

    def __repr__(self) -> str:
        settings = f"steps={self.steps}, unroll={self.unroll}, objective={self.objective!r}"
        return f"RuleLearner({type(self.rule).__name__}, {settings})"

    def meta_losses(self, batch: OptimizeeBatch) -> Iterator[Tensor]:
        """Solve the problems once; yields losses [T] after every unroll, averaged over its steps.

        For either objective the values are those of f; the gradient of their mean is that of the objective's mean over
        problems and steps. The caller may change the weights between tensors.
        """
        params = batch.init_params()
        state = RuleUpdate(self.rule).init_state(params)
        for _ in range(self.steps // self.unroll):
            params, state, losses = self._unroll(batch, detached(params), detached(state))
            yield losses

    @torch.no_grad()
    def evaluate(self, batch: OptimizeeBatch) -> dict[str, Tensor]:
        """Losses [T] of the problems on all their data after ``steps`` steps of the rule, as "loss"."""
        params, update = batch.init_params(), RuleUpdate(self.rule)
        loop = InnerLoop(update, [True] * self.steps)
        params, _, _ = loop.run(_Visited(batch), params, update.init_state(params))
        return {"loss": batch.full_loss(params)}

    def _unroll(self, batch: OptimizeeBatch, params: Any, state: Any) -> tuple[Any, Any, Tensor]:
        """``unroll`` inner steps; returns new params and state, and the losses [T].

        The graph holds ∇f(θ_t)·θ_t, with ∇f as a constant, in place of f(θ_t): the rule needs ∇f anyway, the gradient
        is the same, and no minibatch is differentiated twice. Noise added to gradients enters it too, with mean zero.
        """
        first_order = not self.second_order
        visited = _Visited(batch, self.objective)
        loop = InnerLoop(RuleUpdate(self.rule), [first_order] * self.unroll)
        params, state, _ = loop.run(visited, params, state)
        visited.gradients(params, self.unroll, first_order)
        surrogate = torch.stack(visited.surrogates).mean(0)
        return params, state, torch.stack(visited.values).mean(0) + (surrogate - surrogate.detach())


class _Visited(Problem):
    """Problems for the inner loop that record their losses from θ_1 on; θ_0 does not depend on the rule.

    Args:
        batch: the problems
        objective: objective to record; None records nothing

    Attributes:
        values: losses [T] at each recorded point
        surrogates: [T] each, with the gradient of the objective at that point
    """

    def __init__(self, batch: OptimizeeBatch, objective: str | None = None) -> None:
        self.batch, self.objective = batch, objective
        self.values: list[Tensor] = []
        self.surrogates: list[Tensor] = []

    def gradients(self, params: Any, step: int, first_order: bool) -> tuple[Tensor, Any]:
        """Losses [T] on the next minibatches, and gradients like params."""
        leaves, rebuild = flat_params(params)
        losses, grads = losses_and_gradients(lambda at: self.batch.loss(rebuild(at)), leaves, first_order)
        if step and self.objective is not None:
            values = losses.detach()
            weight = 1.0 if self.objective == "sum" else 1 / (values + _LOG_OFFSET)
            self.surrogates.append(weight * _products(grads, params))
            self.values.append(values)
        return losses, rebuild(grads)


def _products(grads: Sequence[Tensor], params: Any) -> Tensor:
    """Inner products [T] of every problem's gradient, as a constant, and its params.

    ``grads`` has one tensor per tensor of ``params``, in their order.
    """
    rest, products = iter(grads), []
    for tensors in task_groups(params):
        constants = join_tasks([grad.detach() for grad in islice(rest, len(tensors))])
        products.append((constants * join_tasks(tensors)).sum(1))
    return products[0] if len(products) == 1 else torch.cat(products)
