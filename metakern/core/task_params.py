"""Parameters of many tasks at once: trees of tensors [T, *shape], and groups of tasks.

A tree is a tensor, or a dict or list of tensors (nested at will), all with the task axis first. A tuple holds one tree
per group of tasks; groups may differ in their tensors and in their number of tasks. Axis legend: T tasks of a group,
P parameters of one task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from metakern.core.torch_private import pytree

#: Builds a tree of the same structure from new leaves.
Rebuild = Callable[[Iterable[Any]], Any]


def flat_params(params: Any) -> tuple[list[Any], Rebuild]:
    """The leaves of a tree in the order of ``torch.utils._pytree``, and a function that rebuilds it from new leaves.

    A tensor, a dict of tensors and a tuple of these skip pytree: every inner step flattens them, and pytree's cost for
    a dict is that of several torch operators.
    """
    if isinstance(params, Tensor):
        return [params], _only
    if type(params) is dict and all(isinstance(x, Tensor) for x in params.values()):
        names = list(params)
        return list(params.values()), lambda leaves: dict(zip(names, leaves, strict=True))
    if type(params) is not tuple:
        leaves, structure = pytree.tree_flatten(params)
        return leaves, lambda others: pytree.tree_unflatten(list(others), structure)
    parts = [flat_params(part) for part in params]

    def rebuild(leaves: Iterable[Any]) -> Any:
        rest = iter(leaves)
        return tuple(build(islice(rest, len(flat))) for flat, build in parts)

    return [leaf for flat, _ in parts for leaf in flat], rebuild


def _only(leaves: Iterable[Any]) -> Any:
    (leaf,) = leaves
    return leaf


def aligned_leaves(params: Any, others: Any) -> list[Tensor] | None:
    """The tensors of ``others`` if it has the structure of ``params`` (tensors, dicts and tuples only), else None."""
    if isinstance(params, Tensor):
        return [others] if isinstance(others, Tensor) else None
    if type(params) is not type(others) or type(params) not in (dict, tuple) or len(params) != len(others):
        return None
    if type(params) is dict:
        if list(params) != list(others):
            return None
        params, others = params.values(), others.values()
    parts = [aligned_leaves(one, other) for one, other in zip(params, others, strict=True)]
    return None if any(part is None for part in parts) else [leaf for part in parts if part for leaf in part]


def task_groups(params: Any) -> list[list[Tensor]]:
    """The tensors of every group of tasks, in the order of ``torch.utils._pytree``.

    Raises:
        TypeError: for a leaf that is no tensor
        ValueError: for tensors of one group that do not share the task axis
    """
    if type(params) is tuple:
        return [group for part in params for group in task_groups(part)]
    tensors, _ = flat_params(params)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"params must hold tensors only, got {type(tensor).__name__} among them")
        if not tensor.ndim or len(tensor) != len(tensors[0]):
            shapes = ", ".join(str(list(each.shape)) for each in tensors)
            raise ValueError(
                f"params of one group of tasks must have the same task axis first, got shapes {shapes}; groups that "
                "differ in their number of tasks are the entries of a tuple"
            )
    return [tensors]


def join_tasks(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate a group's tensors to one, [T, P]; a single tensor is not copied."""
    # A reshape to the same shape would still add a node to the graph.
    rows = [tensor if tensor.ndim == 2 else tensor.reshape(len(tensor), -1) for tensor in tensors]
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def num_tasks(params: Any) -> int:
    """T of all groups together."""
    return sum(len(tensors[0]) for tensors in task_groups(params))
