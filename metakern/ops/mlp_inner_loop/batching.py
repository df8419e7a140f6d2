"""torch.func.vmap of mlp_inner_loop's operators: a batch becomes more tasks, or is taken one element after another.

Axis legend: B elements of the batch, T tasks, ``*shape`` the shape of one parameter tensor of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metakern.core.torch_private import pytree
from metakern.ops.inner_update.autograd import leading

#: Some of an operator's tensors, None among them; or their batch axes, None where there is none.
Tensors = Sequence[Any]


def batched(
    forward: Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensor]],
    batch: int,
    dims: tuple[Tensors, Tensors, Tensors],
    tensors: tuple[Tensors, Tensors, Tensors],
    folds: bool,
) -> tuple[list[Tensor], Tensor]:
    """The results [B, T, ...], and [B, ...] what the way back needs.

    B·T tasks are one call, but where rates are batched, or are to have gradients of their own for every element: the
    kernels have one set of rates, and sum its gradient over all tasks.

    Args:
        forward: takes params, data and rates, as :meth:`metakern.ops.mlp_inner_loop.autograd.Run.forward`
        batch: B
        dims: where the batch axis is in ``tensors``
        tensors: params, data (x first) and rates
        folds: whether no gradient of rates is wanted
    """
    _check(batch)
    if not folds or _any(dims[2]):
        rows = [forward(*_elements(tensors, dims, index)) for index in range(batch)]
        columns = zip(*(results for results, _ in rows), strict=True)
        return [torch.stack(column) for column in columns], torch.stack([kept for _, kept in rows])
    params, data, lr = tensors
    num_tasks = _num_tasks(data, dims[1])
    folded = [
        p if dim is None and _is_shared(p, dim, i) else _fold_param(p, dim, i, batch, num_tasks)
        for i, (p, dim) in enumerate(zip(params, dims[0], strict=True))
    ]
    results, kept = forward(folded, _fold(data, dims[1], batch), lr)
    # What is kept of all elements has no batch axis: batched_backward takes any one of these, which are all the same.
    return [r.unflatten(0, (batch, num_tasks)) for r in results], kept.unsqueeze(0).expand(batch, *kept.shape)


def batched_backward(
    backward: Callable[..., Sequence[Tensor]],
    batch: int,
    dims: tuple[Tensors, ...],
    tensors: tuple[Tensors, ...],
    folds: bool,
) -> list[Tensor]:
    """Gradients [B, ...] of params, and of rates where they are wanted.

    Args:
        backward: takes grads, what was kept as a list of one, params, data and rates
        batch: B
        dims: where the batch axis is in ``tensors``
        tensors: of the same kinds
        folds: as for :func:`batched`
    """
    _check(batch)
    (kept_dim,) = dims[1]
    if not folds or kept_dim is None or _any(dims[4]):  # else the forward had no batch, or was not folded
        rows = [backward(*_elements(tensors, dims, index)) for index in range(batch)]
        return [torch.stack(column) for column in zip(*rows, strict=True)]
    grads, (kept,), params, data, lr = tensors
    num_tasks = _num_tasks(data, dims[3])
    own = [_fold_param(p, dim, i, batch, num_tasks) for i, (p, dim) in enumerate(zip(params, dims[2], strict=True))]
    found = backward(_fold(grads, dims[0], batch), [kept.select(kept_dim, 0)], own, _fold(data, dims[3], batch), lr)
    unfolded = [g.unflatten(0, (batch, num_tasks)) for g in found]
    shared = [_is_shared(p, dim, i) for i, (p, dim) in enumerate(zip(params, dims[2], strict=True))]
    return [g.sum(1) if one else g for g, one in zip(unfolded, shared, strict=True)]


def forward_rule(operator: Callable[..., Any], num_data: int, keep: int) -> Callable[..., Any]:
    """The batching rule of mlp_inner_loop or mlp_meta_loss; argument ``keep`` says whether a gradient is wanted."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        end = num_data + 1
        if _any(pytree.tree_leaves(in_dims[end + 1 :])):
            raise ValueError("second_order and step_weights must be the same for all elements of a vmap")

        def forward(params: Tensors, data: Tensors, lr: Tensors) -> tuple[Tensors, Tensor]:
            results, kept = operator(params, *data, lr, *args[end + 1 :])
            return [results] if isinstance(results, Tensor) else results, kept

        dims, tensors = ((x[0], x[1:end], x[end]) for x in (in_dims, args))
        results, kept = batched(forward, info.batch_size, dims, tensors, not (args[keep] and args[end]))
        if num_data == 3:
            return (results, kept), ([0] * len(results), 0)
        return (results[0], kept), (0, 0)

    return rule


def backward_rule(operator: Callable[..., Any], num_data: int) -> Callable[..., Any]:
    """The batching rule of mlp_inner_loop_backward or mlp_meta_loss_backward."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        end, count = num_data + 3, len(args[2])

        def backward(grads: Tensors, kept: Tensors, params: Tensors, data: Tensors, lr: Tensors) -> list[Tensor]:
            first = grads[0] if isinstance(args[0], Tensor) else grads
            found, rates = operator(first, *kept, params, *data, lr, *args[end + 1 :])
            return [*found, *rates]

        def split(values: Any) -> tuple[Any, ...]:
            first = [values[0]] if isinstance(args[0], Tensor) else values[0]
            return first, values[1:2], values[2], values[3:end], values[end]

        found = batched_backward(backward, info.batch_size, split(in_dims), split(args), not args[end])
        return (found[:count], found[count:]), ([0] * count, [0] * (len(found) - count))

    return rule


def _check(batch: int) -> None:
    if batch == 0:
        raise ValueError("the fused inner loop under vmap needs at least one element, got 0")


def _any(dims: Tensors) -> bool:
    return any(dim is not None for dim in dims)


def _elements(tensors: tuple[Tensors, ...], dims: tuple[Tensors, ...], index: int) -> list[list[Any]]:
    return [
        [x if dim is None else x.select(dim, index) for x, dim in zip(xs, ds, strict=True)]
        for xs, ds in zip(tensors, dims, strict=True)
    ]


def _num_tasks(data: Tensors, dims: Tensors) -> int:
    x, dim = data[0], dims[0]
    return int(x.shape[0] if dim is None else x.movedim(dim, 0).shape[1])


def _fold(tensors: Tensors, dims: Tensors, batch: int) -> list[Any]:
    """Tensors [T, ...] of every element as [B·T, ...]."""
    pairs = zip(tensors, dims, strict=True)
    return [None if x is None else leading(x, dim, batch).flatten(0, 1) for x, dim in pairs]


def _is_shared(p: Tensor, dim: int | None, index: int) -> bool:
    """Whether the tasks of an element share a parameter tensor, weight or bias by its index."""
    return p.dim() - (dim is not None) == 2 - index % 2


def _fold_param(p: Tensor, dim: int | None, index: int, batch: int, num_tasks: int) -> Tensor:
    """[B·T, *shape], one for each task."""
    own = leading(p, dim, batch)
    if _is_shared(p, dim, index):
        own = own.unsqueeze(1).expand(batch, num_tasks, *own.shape[1:])
    return own.flatten(0, 1)
