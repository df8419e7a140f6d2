"""Problems for the inner loop that record what a meta-objective needs of an unroll.

Axis legend: T problems.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from metakern.core.task_params import flat_params, join_tasks, task_groups
from metakern.inner_loop.loop import Problem, losses_and_gradients
from metakern.learners.objectives import Objective


class Optimized(Problem):
    """Problems for the inner loop, with the losses of their next minibatches."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def gradients(self, params: Any, step: int, first_order: bool) -> tuple[Tensor, Any]:
        """Losses [T] on the next minibatches, and gradients like params."""
        leaves, rebuild = flat_params(params)
        losses, grads = losses_and_gradients(lambda at: self.batch.loss(rebuild(at)), leaves, first_order)
        return losses, rebuild(grads)


class Unrolled(Optimized):
    """Records losses of visited points, and the gradient of the objective at each.

    The graph holds ∇f(θ_t)·θ_t, with ∇f as a constant, in place of f(θ_t): the rule needs ∇f anyway, the gradient is
    the same, and no minibatch is differentiated twice. Noise added to gradients enters it too, with mean zero.

    Args:
        batch: the problems
        objective: objective to record
        points: the steps t whose θ_t count
        held_out: whether the objective is taken on held-out samples, which costs a further gradient for each point
        first: f_0, [T]; None: the loss at step 0

    Attributes:
        first: f_0 once step 0 is done
        values: losses [T] at each recorded point
        surrogates: [T] each, with the gradient of the objective at that point
    """

    def __init__(
        self, batch: Any, objective: Objective, points: Collection[int], *, held_out: bool, first: Tensor | None = None
    ) -> None:
        super().__init__(batch)
        self.objective, self.points, self.held_out, self.first = objective, points, held_out, first
        self.values: list[Tensor] = []
        self.surrogates: list[Tensor] = []

    def gradients(self, params: Any, step: int, first_order: bool) -> tuple[Tensor, Any]:
        """Losses [T] on the next minibatches, and gradients like params."""
        losses, grads = super().gradients(params, step, first_order)
        starts = self.first is None
        if step in self.points or (starts and self.objective.relative):
            measured, slopes = self._held_out_gradients(params) if self.held_out else (losses, flat_params(grads)[0])
            values = measured.detach()
            if starts:
                self.first = values
            if step in self.points:
                weight = self.objective.slope(values, values if self.first is None else self.first)
                self.surrogates.append(weight * products(slopes, params))
                self.values.append(values)
        return losses, grads

    def _held_out_gradients(self, params: Any) -> tuple[Tensor, list[Tensor]]:
        leaves, rebuild = flat_params(params)
        return losses_and_gradients(lambda at: self.batch.held_out_loss(rebuild(at)), leaves, True)

    def losses(self) -> Tensor:
        """Mean of the recorded losses, [T], with the gradient of the objective's mean."""
        surrogate = torch.stack(self.surrogates).mean(0)
        return torch.stack(self.values).mean(0) + (surrogate - surrogate.detach())


def products(grads: Sequence[Tensor], params: Any) -> Tensor:
    """Inner products [T] of every problem's gradient, as a constant, and its params.

    ``grads`` has one tensor per tensor of ``params``, in their order.
    """
    rest, found = iter(grads), []
    for tensors in task_groups(params):
        constants = join_tasks([grad.detach() for grad in islice(rest, len(tensors))])
        found.append((constants * join_tasks(tensors)).sum(1))
    return found[0] if len(found) == 1 else torch.cat(found)


def check_held_out(batch: Any) -> None:
    """Raise ValueError unless a batch has held-out samples."""
    if not getattr(batch, "has_held_out", False):
        raise ValueError(
            f"loss_on 'held-out' needs problems with held-out samples, as those of NetworkProblem.hold_out(0.25), got "
            f"{batch}"
        )
