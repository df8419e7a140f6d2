"""Where the params of an episode start."""

from __future__ import annotations

from typing import Any

from metakern.tasks import OptimizeeBatch


def starting_params(rule: Any, batch: OptimizeeBatch) -> Any:
    """Starting points of a batch's problems: those that the batch draws.

    Args:
        rule: the rule that will step them
        batch: T problems

    Returns:
        params, [T, *shape] each
    """
    del rule
    return batch.init_params()
