"""Where the params of an episode start."""

from __future__ import annotations

from typing import Any

from metakern.core.task_params import flat_params
from metakern.inner_loop.updates import learned_start
from metakern.rules.protocol import named_leaves
from metakern.tasks import OptimizeeBatch


def starting_params(rule: Any, batch: OptimizeeBatch) -> Any:
    """Starting points of a batch's problems: the initial parameters that the rule learns, else those that it draws.

    Learned ones are expanded to all tasks, with their graph, so that the first unroll trains them.

    Args:
        rule: the rule that will step them
        batch: T problems

    Returns:
        params, [T, *shape] each; a tuple of such trees for a mixture, whose groups must all have the learned shapes

    Raises:
        ValueError: for a rule that learns a start for other parameters
    """
    params = batch.init_params()
    return tuple(_started(rule, group) for group in params) if isinstance(params, tuple) else _started(rule, params)


def _started(rule: Any, params: Any) -> Any:
    leaves = named_leaves(params)
    start = learned_start(
        rule, {name: p.new_empty(p.shape[1:]) for name, p in leaves.items()}, "make the rule for these problems"
    )
    if start is None:
        return params
    _, rebuild = flat_params(params)
    return rebuild(start[name].to(p).expand(p.shape) for name, p in leaves.items())
