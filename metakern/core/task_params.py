"""Parameters of many tasks at once: a tree of tensors [T, *shape], and how its tensors belong together.

A tree is a tensor, or a dict or list of tensors (nested at will), all with the task axis first. A tuple is several
groups of tasks, one after the other: each entry is a tree of its own, and the groups may differ in their tensors and in
the number of their tasks. Axis legend: T tasks of a group, P parameters of one task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metakern.core.torch_private import pytree


def task_groups(params: Any) -> list[list[Tensor]]:
    """The tensors of every group of tasks, in the order of ``torch.utils._pytree``.

    Raises:
        TypeError: for anything but tensors in the tree
        ValueError: for tensors of one group that do not share the task axis
    """
    if type(params) is tuple:
        return [group for part in params for group in task_groups(part)]
    tensors = pytree.tree_leaves(params)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"params must hold tensors only, got {type(tensor).__name__} among them")
        if tensor.shape[:1] != tensors[0].shape[:1] or not tensor.ndim:
            shapes = ", ".join(str(list(each.shape)) for each in tensors)
            raise ValueError(
                f"params of one group of tasks must have the same task axis first, got shapes {shapes}; groups that "
                "differ in their number of tasks are the entries of a tuple"
            )
    return [tensors]


def join_tasks(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors of a group as one, [T, P]; a single tensor is not copied."""
    rows = [tensor.reshape(len(tensor), -1) for tensor in tensors]
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def num_tasks(params: Any) -> int:
    """T of all groups together."""
    return sum(len(tensors[0]) for tensors in task_groups(params))
