"""Contents of a batch of tasks as numbers, for comparison in tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metakern.core.task_params import join_tasks, task_groups
from metakern.tasks import Episodes


def gradients(batch: Any, params: Any, loss: str = "loss", **options: Any) -> tuple[Tensor, Any]:
    """Losses [T], and their gradients as params."""
    leaves, structure = pytree.tree_flatten(params)
    points = [leaf.detach().requires_grad_() for leaf in leaves]
    losses = getattr(batch, loss)(pytree.tree_unflatten(points, structure))
    grads = torch.autograd.grad(losses.sum(), points, **options)
    return losses, pytree.tree_unflatten(list(grads), structure)


def rows_of(params: Any) -> list[Tensor]:
    """The numbers [P] of every problem's params, in the order of the problems; groups differ in P."""
    return [row for group in task_groups(params) for row in join_tasks(group)]


def contents(batch: Any, steps: int = 2) -> Tensor:
    """Numbers [T, n] that distinguish tasks.

    For episodes all their data; for problems to optimise the losses and gradient norms along ``steps`` steps of
    gradient descent.
    """
    if isinstance(batch, Episodes):
        tensors = (batch.support_x, batch.support_y, batch.query_x, batch.query_y, batch.modes)
        return torch.cat([x.reshape(batch.num_tasks, -1).double() for x in tensors if x is not None], 1)
    params, met = batch.init_params(), []
    for _ in range(steps):
        losses, grads = gradients(batch, params)
        met += [losses.detach(), torch.stack([row.norm() for row in rows_of(grads)])]
        params = pytree.tree_map(lambda p, g: p - 0.01 * g, params, grads)
    return torch.stack([*met, batch.full_loss(params)], 1)
