"""The engine for any model and any rule: plain PyTorch, all tasks at once by torch.vmap or one after another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metakern.core import backend as _backend
from metakern.core.exclusive import exclusive
from metakern.core.transforms import is_transformed
from metakern.inner_loop.arguments import (
    Call,
    SampleSets,
    adapted_names,
    check_step_weights,
    first_order_steps,
    sample_sets,
)
from metakern.inner_loop.failures import Instead
from metakern.inner_loop.loop import InnerLoop
from metakern.inner_loop.task_loss import TaskLoss
from metakern.inner_loop.task_model import TaskModel, TaskProblem
from metakern.inner_loop.updates import Descent, RuleUpdate, Update, learned_start


class _Plan(NamedTuple):
    """A checked call in the form that the inner loop takes."""

    model: TaskModel
    loop: InnerLoop
    start: Mapping[str, Tensor] | None
    support: SampleSets
    query: SampleSets | None
    step_weights: Any

    def run(self, call: Call, instead: Instead) -> tuple[dict[str, Tensor], TaskProblem]:
        """Adapted parameters, and the problem after the last step; ``instead`` replaces some samples and targets."""
        options, steps = call.options, self.loop.num_steps
        wanted = None if self.step_weights is None or self.query is None else self.query.replaced(instead)
        support = self.support.replaced(instead)
        problem = TaskProblem(self.model, support, wanted, self.step_weights, options.accumulate)
        params = self.model.expand(self.support.num_tasks, self.start)
        parts = problem.recomputes_parts and not all(self.loop.first_order)
        if torch.is_grad_enabled() and steps and (options.checkpoint_every is not None or parts):
            name = "accumulate" if options.checkpoint_every is None else "checkpoint_every"
            problem.check_captured(name, params)
        params, _, last = self.loop.run(problem, params, self.loop.update.init_state(params) if steps else ())
        assert isinstance(last, TaskProblem)
        return params, last


class GenericEngine:
    """See :class:`metakern.inner_loop.engines.protocol.Engine`."""

    name = "generic path"

    def serves(self, call: Call) -> str | None:
        """None, as it serves every call, unless another backend was requested by name."""
        options, reasons = call.options, "; ".join(call.reasons)
        if options.steps and _backend.requested(options.backend) not in ("auto", "reference"):
            return f"backend {options.backend!r} is another engine's"
        if options.steps and is_transformed() and (options.checkpoint_every is not None or not options.vectorize):
            raise RuntimeError(
                "checkpoint_every and vectorize=False do not work in torch.compile and torch.func where the fused "
                f"inner loop does not serve: {reasons}"
            )
        call.prepared[self.name] = _plan(call)
        return None

    def adapt(self, call: Call) -> dict[str, Tensor]:
        """Adapted parameters by name, [T, *shape] each."""
        plan: _Plan = call.prepared[self.name]
        return plan.model.vectorization.run(lambda instead: plan.run(call, instead)[0], plan.support.named)

    def meta_loss(self, call: Call) -> Tensor:
        """Query losses [T]; updates the model's running statistics if ``call.moves_statistics``."""
        plan: _Plan = call.prepared[self.name]
        assert plan.query is not None
        model, query = plan.model, plan.query

        def evaluate(instead: Instead) -> tuple[Tensor | None, dict[str, Tensor]]:
            params, problem = plan.run(call, instead)
            if plan.step_weights is not None:
                return problem.total, problem.statistics
            shared = problem.shared
            return model.losses(params, shared, query.replaced(instead)), model.gathered(shared)

        losses, statistics = model.vectorization.run(evaluate, {**plan.support.named, **query.named})
        if losses is None:
            raise ValueError(f"step_weights must not all be zero, got {call.step_weights}")
        if call.moves_statistics:
            model.store(statistics)
        return losses

    def meta_backward(self, call: Call, gradient: Tensor | None) -> Tensor | None:
        """None: this engine always needs autograd."""
        return None

    def described(self, call: Call) -> str:
        """Sizes, how the tasks are evaluated, and why no other engine serves."""
        plan: _Plan = call.prepared[self.name]
        how, layers = "one task after another", ""
        if plan.model.vectorization.at_once:
            how, layers = "all tasks at once by torch.vmap", plan.model.layers.described()
        elif plan.model.vectorization.slower:
            how += ", which is faster for convolutions of this size"
        support = plan.support
        return (
            f"T={support.num_tasks}, S={support.num_samples}, K={plan.loop.num_steps}: generic path, {how}; "
            f"{layers}{'; ' if layers else ''}"
            f"the fused inner loop does not serve: {'; '.join(call.reasons)}"
        )

    def missed(self, call: Call, cause: str) -> None:
        """No warning: this engine is never faster than the others."""


def task_model(call: Call) -> TaskModel:
    """The checked TaskModel of a call."""
    options = call.options
    task_loss = TaskLoss(options.loss, call.is_masked or options.accumulate > 1)
    with exclusive(options.model):
        names = adapted_names(options.model, options.parameters)
        model = TaskModel(options.model, task_loss, names, options.vectorize, options.backend)
    if model.max_steps is not None and options.steps > model.max_steps:
        raise ValueError(
            f"steps must be at most {model.max_steps}, for which the model has batch norm, got {options.steps}"
        )
    return model


def _plan(call: Call) -> _Plan:
    options, weights = call.options, call.step_weights
    if weights is not None:
        weights = check_step_weights(weights, options.steps)
    model = task_model(call)
    update, start = _update(call, model)
    orders = first_order_steps(options.first_order, options.steps)
    loop = InnerLoop(update, orders, options.checkpoint_every)
    steps = options.steps if options.support_per_step else None
    support = sample_sets("support", call.support, call.masks[0], model.loss, steps=steps)
    query = None
    if call.name != "adapt":
        query = sample_sets("query", call.query, call.masks[1], model.loss, support.num_tasks)
    return _Plan(model, loop, start, support, query, weights)


def _update(call: Call, model: TaskModel) -> tuple[Update, Mapping[str, Tensor] | None]:
    """The update rule, and its learned initial parameters, or None to start at the model's."""
    options = call.options
    if options.is_descent:
        return Descent(options.learning_rates(model.initial), options.largest_norm), None
    start = learned_start(options.rule, model.initial, "name those in parameters=, or make the rule for this model")
    return RuleUpdate(options.rule, options.clip_norm), start
