"""Handwritten inner loop, one task and one step at a time: the reference for every engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metakern.inner_loop.arguments import Call, adapted_names
from metakern.rules.rates import learning_rates


def by_hand(call: Call) -> tuple[dict[str, Tensor], Tensor | None]:
    """Adapted parameters, [T, *shape] each, and query losses [T], if there are query sets."""
    tasks = [_task(call, task) for task in range(len(call.support[0]))]
    params = {name: torch.stack([adapted[name] for adapted, _ in tasks]) for name in tasks[0][0]}
    return params, None if call.query is None else torch.stack([loss for _, loss in tasks])


def _task(call: Call, task: int) -> tuple[dict[str, Tensor], Any]:
    options, model = call.options, call.options.model
    names = adapted_names(model, options.parameters)
    params: dict[str, Tensor] = dict(model.named_parameters())
    rule = options.rule
    start = rule.initialisation() if rule is not None and hasattr(rule, "initialisation") else None
    params |= start or {}
    state = None if rule is None else rule.init_state({name: params[name].unsqueeze(0) for name in names}, tasks=True)
    total: Any = 0.0
    for step in range(options.steps):
        x, y = (tensor[task, step] if options.support_per_step else tensor[task] for tensor in call.support)
        mask = (
            None
            if call.masks[0] is None
            else call.masks[0][task, step]
            if options.support_per_step
            else call.masks[0][task]
        )
        loss = _loss(call, params, x, y, mask)
        orders = options.first_order
        first_order = orders if isinstance(orders, bool) else orders[step]
        wanted = [params[name] for name in names]
        grads = torch.autograd.grad(loss, wanted, create_graph=not first_order, retain_graph=True)
        if options.clip_norm is not None:
            norm = torch.cat([g.flatten() for g in grads]).norm()
            grads = tuple(g * (options.clip_norm / norm if norm > options.clip_norm else 1.0) for g in grads)
        if rule is None:
            new = {name: params[name] - _rate(call, name, step) * g for name, g in zip(names, grads, strict=True)}
        else:
            new, state = _rule_step(rule, names, params, grads, state, loss.detach() if first_order else loss)
        params = {**params, **new}
        if call.step_weights is not None:
            total = total + call.step_weights[step] * _query_loss(call, params, task)
    adapted = {name: params[name] for name in names}
    if call.query is None:
        return adapted, None
    return adapted, _query_loss(call, params, task) if call.step_weights is None else total


def _rule_step(rule: Any, names: list[str], params: dict[str, Tensor], grads: Any, state: Any, loss: Tensor) -> Any:
    of_one = {name: params[name].unsqueeze(0) for name in names}
    by_name = {name: g.unsqueeze(0) for name, g in zip(names, grads, strict=True)}
    new, state = rule(of_one, by_name, state, loss=loss.unsqueeze(0))
    return {name: p.squeeze(0) for name, p in new.items()}, state


def _rate(call: Call, name: str, step: int) -> Any:
    """α of a parameter at a step."""
    options = call.options
    names = adapted_names(options.model, options.parameters)
    own = dict(options.model.named_parameters())
    rates = learning_rates(options.lr, {n: own[n] for n in names}, options.steps)
    rate: Any = rates.values[names.index(name)] if isinstance(rates.values, list) else rates.values
    return rate[step] if rates.per_step else rate


def _query_loss(call: Call, params: dict[str, Tensor], task: int) -> Tensor:
    mask = None if call.masks[1] is None else call.masks[1][task]
    return _loss(call, params, call.query[0][task], call.query[1][task], mask)


def _loss(call: Call, params: dict[str, Tensor], x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """The loss of one task's samples without padding."""
    if mask is not None:
        x, y = x[mask], y[mask]
    model: nn.Module = call.options.model
    loss: Tensor = call.options.loss(functional_call(model, params, (x,)), y)
    return loss
