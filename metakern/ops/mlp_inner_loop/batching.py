"""torch.func.vmap of mlp_inner_loop's operators: the batch becomes more tasks, or a loop over elements.

The kernels take one set of rates and sum its gradient over all tasks. So where rates are batched, or need a gradient
per element, the rule loops over the elements.

Axis legend: B elements of the batch, T tasks, ``*shape`` the shape of one parameter tensor of the model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metakern.ops.core.batching import Batch, leading, looped

#: Names of the arguments with a task axis; each operator has some of them.
_DATA = ("x", "y", "mask", "query_x", "query_y", "query_mask", "grad_adapted", "grad_losses")

_CONSTANTS = ("second_order", "step_weights")


def batched(batch: Batch) -> tuple[Any, Any]:
    """Batching rule of mlp_inner_loop and mlp_meta_loss."""
    a = batch.arguments
    if any(batch.has_axis(name) for name in _CONSTANTS if name in a._fields):
        raise ValueError("second_order and step_weights must be the same for all elements of a vmap")
    batch.check_not_empty()
    keeps = a.keep if "keep" in a._fields else a.with_grads
    if batch.has_axis("lr") or (keeps and a.lr and "lr" in batch.wants):
        return looped(batch)
    num_tasks = _num_tasks(batch)
    folded = [
        p if dim is None and _is_shared(p, dim, i) else _fold_param(p, dim, i, batch.size, num_tasks)
        for i, (p, dim) in enumerate(zip(a.params, batch.dims.params, strict=True))
    ]
    results, kept = batch.call(*a._replace(params=folded, **_folded(batch)))
    # The kept tensor covers all elements, without a batch axis; expanded, every element holds the same whole tensor,
    # and batched_backward takes any of them.
    same = kept.unsqueeze(0).expand(batch.size, *kept.shape)
    if isinstance(results, Tensor):
        return (results.unflatten(0, (batch.size, num_tasks)), same), (0, 0)
    return ([r.unflatten(0, (batch.size, num_tasks)) for r in results], same), ([0] * len(results), 0)


def batched_backward(batch: Batch) -> tuple[Any, Any]:
    """Batching rule of their backward operators."""
    batch.check_not_empty()
    a, dims = batch.arguments, batch.dims.params
    name = "trajectory" if "trajectory" in a._fields else "task_grads"
    # A kept tensor without a batch axis comes from an unbatched forward.
    if not batch.has_axis(name) or batch.has_axis("lr") or (a.lr and "lr" in batch.wants):
        return looped(batch)
    num_tasks = _num_tasks(batch)
    own = [_fold_param(p, dim, i, batch.size, num_tasks) for i, (p, dim) in enumerate(zip(a.params, dims, strict=True))]
    kept = getattr(a, name).select(getattr(batch.dims, name), 0)
    found, rates = batch.call(*a._replace(params=own, **{name: kept}, **_folded(batch)))
    unfolded = [g.unflatten(0, (batch.size, num_tasks)) for g in found]
    shared = [_is_shared(p, dim, i) for i, (p, dim) in enumerate(zip(a.params, dims, strict=True))]
    grads = [g.sum(1) if one else g for g, one in zip(unfolded, shared, strict=True)]
    return (grads, rates), ([0] * len(grads), [None] * len(rates))


def _num_tasks(batch: Batch) -> int:
    x, dim = batch.arguments.x, batch.dims.x
    return int(x.shape[0] if dim is None else x.movedim(dim, 0).shape[1])


def _folded(batch: Batch) -> dict[str, Any]:
    """Tensors [T, ...] of all elements as [B·T, ...], by argument name."""

    def fold(x: Any) -> Any:
        if isinstance(x, list):
            return list(map(fold, x))
        return None if x is None else x.flatten(0, 1)

    return {name: fold(batch.leading(name)) for name in _DATA if name in batch.arguments._fields}


def _is_shared(p: Tensor, dim: int | None, index: int) -> bool:
    """Whether an element's tasks share a parameter tensor; ``index`` tells weight (even) from bias (odd)."""
    return p.dim() - (dim is not None) == 2 - index % 2


def _fold_param(p: Tensor, dim: int | None, index: int, batch: int, num_tasks: int) -> Tensor:
    """The parameter tensor as [B·T, *shape], one entry per task."""
    own = leading(p, dim, batch)
    if _is_shared(p, dim, index):
        own = own.unsqueeze(1).expand(batch, num_tasks, *own.shape[1:])
    return own.flatten(0, 1)
