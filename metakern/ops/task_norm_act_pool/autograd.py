"""The operator task_norm_act_pool, its backward and the backward of that, each in one launch: formulas and batching.

Per channel, with m the mean over its n values and P(u) = u - m(u) - x̂ m(u x̂), which is its own adjoint:
gz, the gradient of γ x̂ + β, is that of y at the place that won its window, times the activation's slope there;
grad_x = γ r P(gz), grad_gamma = Σ gz x̂, grad_beta = Σ gz, with r = 1 / √(var + eps).

Axis legend: T tasks, S samples, C channels, [H, W] the images of x, [Ho, Wo] those of y.
"""

from __future__ import annotations

from typing import Any

import torch

from metakern.ops.core.batching import Batch
from metakern.ops.core.define_op import Gradient, define_op
from metakern.ops.core.functions import Backward
from metakern.ops.task_norm_act_pool import reference

_SHARED: dict[str, Any] = {
    "family": "task_norm_act_pool",
    "backends": ("cpp", "triton"),
    "triton": "metakern.ops.task_norm_act_pool.triton",
}

_OPTIONS = "int statistics, float eps, int activation, float slope, bool pool"
_SAVED = f"Tensor grad_y, Tensor x, Tensor? gamma, Tensor mean, Tensor var, Tensor index, {_OPTIONS}"


def _gradients(backward: Backward) -> dict[str, Any]:
    a, results = backward.arguments, backward.results
    statistics = results.mean, results.var, results.index
    grads = backward.call(norm_backward, backward.grads.y, a.x, a.gamma, *statistics, *a[5:])
    return _wanted(backward, ("x", "gamma", "beta"), grads)


def _second_gradients(backward: Backward) -> dict[str, Any]:
    g = backward.grads
    grads = backward.call(norm_backward_backward, g.grad_x, g.grad_gamma, g.grad_beta, *backward.arguments)
    return _wanted(backward, ("grad_y", "x", "gamma"), grads)


def _wanted(backward: Backward, names: tuple[str, ...], grads: Any) -> dict[str, Any]:
    wants = backward.wants
    return {name: grad for name, grad in zip(names, grads, strict=True) if name in wants}


def _batched(batch: Batch) -> tuple[Any, Any]:
    """The batch becomes more tasks."""
    batch.check_not_empty()
    given = [name for name in batch.arguments._fields if isinstance(getattr(batch.arguments, name), torch.Tensor)]
    tensors = {name: batch.leading(name) for name in given}
    tasks = tensors["x"].shape[:2]
    merged = batch.call(*batch.arguments._replace(**{name: x.flatten(0, 1) for name, x in tensors.items()}))
    return [y.unflatten(0, tasks) for y in merged], [0] * len(merged)


def _shapes(a: Any) -> tuple[Any, ...]:
    pool = bool(a.pool)
    y = (*a.x.shape[:3], *(reference.output_size(size, pool) for size in a.x.shape[3:]))
    return (
        a.x.new_empty(y),
        *(a.x.new_empty((a.x.shape[0], a.x.shape[2])) for _ in range(2)),
        a.x.new_empty(y, dtype=torch.uint8),
    )


def _backward_shapes(a: Any) -> tuple[Any, ...]:
    channels = (a.x.shape[0], a.x.shape[2])
    return a.x.new_empty(a.x.shape), a.x.new_empty(channels), a.x.new_empty(channels)


def _second_shapes(a: Any) -> tuple[Any, ...]:
    channels = (a.x.shape[0], a.x.shape[2])
    return a.x.new_empty(a.grad_y.shape), a.x.new_empty(a.x.shape), a.x.new_empty(channels)


norm_backward_backward = define_op(
    f"task_norm_act_pool_backward_backward(Tensor grad_x, Tensor? grad_gamma, Tensor? grad_beta, {_SAVED}) "
    "-> (Tensor, Tensor, Tensor)",
    results=("grad_of_grad_y", "grad_of_x", "grad_of_gamma"),
    shapes=_second_shapes,
    batching=_batched,
    title="task_norm_act_pool's backward",
    **_SHARED,
)

norm_backward = define_op(
    f"task_norm_act_pool_backward({_SAVED}) -> (Tensor, Tensor, Tensor)",
    results=("grad_x", "grad_gamma", "grad_beta"),
    shapes=_backward_shapes,
    gradient=Gradient(
        _second_gradients,
        of=("grad_y", "x", "gamma"),
        saves=("grad_y", "x", "gamma", "mean", "var", "index"),
    ),
    batching=_batched,
    **_SHARED,
)

norm = define_op(
    "task_norm_act_pool(Tensor x, Tensor? gamma, Tensor? beta, Tensor? running_mean, Tensor? running_var, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    results=("y", "mean", "var", "index"),
    shapes=_shapes,
    gradient=Gradient(
        _gradients,
        of=("x", "gamma", "beta"),
        saves=("x", "gamma", "mean", "var", "index"),
        private=("index",),
        constant=("mean", "var"),
    ),
    batching=_batched,
    reference=reference.task_norm_act_pool,
    **_SHARED,
)
