"""An update rule as a meta-learner for the trainer, trained by truncated backpropagation through time.

Andrychowicz et al. 2016, arXiv 1606.04474, section 3: T problems are solved side by side for some steps; every
``unroll`` steps the rule's weights take a step of their own along the gradient of the losses met on the way, and
parameters and state are carried on, detached.

Axis legend: T problems, P parameters of one problem; all coordinates of all problems take their step in one launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metakern.core.checks import check_count
from metakern.tasks import OptimizeeBatch

#: What an unroll minimises, summed over its steps: f, or log(f + 1e-3), which weighs the small losses at the end up.
OBJECTIVES = ("sum", "log")
_LOG_OFFSET = 1e-3


class RuleLearner(nn.Module):
    """A rule that is meta-trained on problems of one kind, or of several at once (:class:`MixedOptimizees`).

    Args:
        rule: an update rule: ``init_state(params)`` and ``forward(params, grads, state)``, where params are a tensor
            [T, P] or, for a mixture, a tuple of such
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
        """Solve the problems once: after every unroll their losses [T], meaned over its steps.

        The values are those of f, for either objective; the gradient of their mean is that of the objective's mean over
        problems and steps. Weights may be changed before the next tensor is asked for.
        """
        params = batch.init_params()
        state = self.rule.init_state(params)
        for _ in range(self.steps // self.unroll):
            params, state, losses = self._unroll(batch, _detached(params), _detached(state))
            yield losses

    @torch.no_grad()
    def evaluate(self, batch: OptimizeeBatch) -> dict[str, Tensor]:
        """Losses [T] of the problems on all their data after ``steps`` steps of the rule, as "loss"."""
        params = batch.init_params()
        state = self.rule.init_state(params)
        for _ in range(self.steps):
            _, grads = self._gradients(batch, params)
            params, state = self.rule(params, grads, state)
        return {"loss": batch.full_loss(params)}

    def _unroll(self, batch: OptimizeeBatch, params: Any, state: Any) -> tuple[Any, Any, Tensor]:
        """``unroll`` inner steps; returns new params and state, and the losses [T].

        The graph is not of f(θ_t), but of the gradient of f at θ_t, which the rule needs anyway, times θ_t: its
        gradient is the same, and no minibatch is differentiated twice. Noise that is added to gradients is in it
        too, of mean zero.
        """
        values, surrogates = [], []
        for step in range(self.unroll + 1):
            losses, grads = self._gradients(batch, params)
            if step:  # θ_0 does not depend on the rule
                weight = 1.0 if self.objective == "sum" else 1 / (losses + _LOG_OFFSET)
                surrogates.append(weight * _products(grads, params))
                values.append(losses)
            if step < self.unroll:
                params, state = self.rule(params, grads, state)
        surrogate = torch.stack(surrogates).mean(0)
        return params, state, torch.stack(values).mean(0) + (surrogate - surrogate.detach())

    @torch.enable_grad()
    def _gradients(self, batch: OptimizeeBatch, params: Any) -> tuple[Tensor, Any]:
        """Losses [T], without a graph, and gradients like params, with one if second order is asked for."""
        leaves, structure = pytree.tree_flatten(params)
        second_order = self.second_order and all(leaf.requires_grad for leaf in leaves)
        points = leaves if second_order else [leaf.detach().requires_grad_() for leaf in leaves]
        losses = batch.loss(pytree.tree_unflatten(points, structure))
        grads = torch.autograd.grad(losses.sum(), points, create_graph=second_order)
        return losses.detach(), pytree.tree_unflatten(list(grads), structure)


def _detached(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, tree)


def _products(grads: Any, params: Any) -> Tensor:
    """The inner product of every problem's gradient, taken as a constant, and its params, [T]."""
    pairs = zip(pytree.tree_leaves(grads), pytree.tree_leaves(params), strict=True)
    return torch.cat([(grad.detach() * leaf).sum(1) for grad, leaf in pairs])
