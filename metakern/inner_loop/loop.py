"""The inner loop: K steps of any update rule on any problem with losses [T] of its params.

Finn et al. 2017, arXiv 1703.03400; with a learned rule, Andrychowicz et al. 2016, arXiv 1606.04474. ``adapt``,
``meta_loss``, ``meta_backward`` and ``RuleLearner`` run through :class:`InnerLoop`; autograd differentiates through it.

Axis legend: T tasks, K inner steps, ``*shape`` the shape of one parameter tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from metakern.inner_loop.recomputation import recomputed
from metakern.inner_loop.updates import Update


class Problem:
    """T tasks for the inner loop. Params are a pytree of tensors [T, *shape].

    A subclass defines :meth:`gradients`; if its results depend on further tensors, also :meth:`tensors` and
    :meth:`with_tensors`, which ``checkpoint_every`` needs. A problem belongs to one run of the loop, which may change
    it.
    """

    def gradients(self, params: Any, step: int, first_order: bool) -> tuple[Tensor, Any]:
        """Losses [T] before inner step ``step``, and their gradients, structured like ``params``.

        ``params`` are the points that the update chooses, which for a rule with attention are not its params. With
        ``first_order`` both are constants; see :func:`losses_and_gradients`.
        """
        raise NotImplementedError

    def stepped(self, params: Any, step: int) -> None:
        """Callback after inner step ``step``, with the new params."""

    def tensors(self) -> tuple[Any, Any]:
        """Pytrees of the tensors on which results depend: those that change from step to step, and the fixed ones."""
        return (), ()

    def with_tensors(self, changing: Any, fixed: Any, step: int) -> Self:
        """The same problem before inner step ``step``, with other :meth:`tensors`."""
        return self

    def lock(self) -> AbstractContextManager[Any]:
        """Lock to hold while the backward recomputes steps."""
        return nullcontext()


@dataclass(frozen=True)
class InnerLoop:
    """K inner steps.

    Attributes:
        update: the update rule: a rule, or gradient descent with given rates
        first_order: one bool per step, whether its gradient is a constant
        checkpoint_every: steps between two checkpoints for the backward; None keeps whole graphs
    """

    update: Update
    first_order: Sequence[bool]
    checkpoint_every: int | None = None

    @property
    def num_steps(self) -> int:
        """K."""
        return len(self.first_order)

    def run(self, problem: Problem, params: Any, state: Any) -> tuple[Any, Any, Problem]:
        """Take the steps.

        Args:
            problem: the tasks; do not use it again
            params: pytree of tensors [T, *shape]
            state: state of the update

        Returns:
            new params, new state, and the problem after the last step
        """
        with self.update.lock():  # another thread's backward may run such steps
            return self._run(problem, params, state)

    def _run(self, problem: Problem, params: Any, state: Any) -> tuple[Any, Any, Problem]:
        every = self.checkpoint_every
        if every is None or not self.num_steps or not torch.is_grad_enabled():
            params, state = self._steps(problem, None, params, state, range(self.num_steps))
            return params, state, problem
        self.update.check_recomputable(params, state)
        weights = self.update.weights
        for start in range(0, self.num_steps, every):
            steps = range(start, min(start + every, self.num_steps))
            changing, fixed = problem.tensors()
            arguments = (params, state, weights, changing, fixed)
            params, state, changing = recomputed(self._segment(problem, steps), arguments)
            problem = problem.with_tensors(changing, fixed, steps.stop)
        return params, state, problem

    def _steps(self, problem: Problem, weights: Any, params: Any, state: Any, steps: range) -> tuple[Any, Any]:
        for step in steps:
            points = self.update.points(params, state)
            losses, grads = problem.gradients(points, step, self.first_order[step])
            params, state = self.update.step(weights, params, grads, state, losses, step)
            problem.stepped(params, step)
        return params, state

    def _segment(self, problem: Problem, steps: range) -> Callable[..., Any]:
        """Some of the steps as a pure function of all tensors that they depend on."""

        def run(params: Any, state: Any, weights: Any, changing: Any, fixed: Any) -> Any:
            with problem.lock(), self.update.lock():  # the backward runs it again
                own = problem.with_tensors(changing, fixed, steps.start)
                params, state = self._steps(own, weights, params, state, steps)
                return params, state, own.tensors()[0]

        return run


def losses_and_gradients(
    losses_of: Callable[[list[Tensor]], Tensor], params: Sequence[Tensor], first_order: bool, names: str = "params"
) -> tuple[Tensor, list[Tensor]]:
    """Losses [T] and their gradients by autograd, one per tensor of ``params``; zeros for tensors without effect.

    Args:
        losses_of: maps params to losses [T]; the loss of a task depends on that task's params alone
        params: [T, *shape] each
        first_order: whether losses and gradients are constants; they always are if no graph is recorded, and for params
            that require no gradient
        names: name of ``params`` in messages

    Raises:
        RuntimeError: for losses that depend on none of ``params``
    """
    record = torch.is_grad_enabled() and not first_order and any(p.requires_grad for p in params)
    with torch.enable_grad():
        at = [p if record and p.requires_grad else p.detach().requires_grad_() for p in params]
        losses = losses_of(at)
        grads: list[Tensor | None] = [None] * len(at)
        if losses.requires_grad:
            # No two tasks' losses share a parameter, so the gradient of the sum holds each task's own gradient.
            grads = list(torch.autograd.grad(losses.sum(), at, create_graph=record, allow_unused=True))
    if all(g is None for g in grads):
        raise RuntimeError(f"loss must depend on the {names}; it depends on none")
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, at, strict=True)]
    return losses if record else losses.detach(), filled
