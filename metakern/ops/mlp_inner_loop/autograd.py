"""The operators of mlp_inner_loop and mlp_meta_loss: shapes and gradients, shared by all implementations.

Axis legend: T tasks, K inner steps, P parameters of a task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metakern.core.memo import constant
from metakern.core.torch_private import below_autograd
from metakern.core.transforms import is_transformed_or_dual, wants_gradient
from metakern.ops.core.define_op import Gradient, define_op
from metakern.ops.mlp_inner_loop import reference
from metakern.ops.mlp_inner_loop.batching import batched, batched_backward

_TASK_LANES = 16

#: Device of the operators' constants, whatever device the tasks are on.
_CPU = torch.device("cpu")


class Problem(NamedTuple):
    """The operators' scalars: see :func:`metakern.ops.mlp_inner_loop.mlp_inner_loop`."""

    rate: float
    steps: int
    per_step: bool
    adapted: int  # bit i: whether params[i] is
    activation: tuple[int, ...]  # of every hidden layer
    loss: int
    checkpoint_every: int
    second_order: tuple[bool, ...]
    slopes: tuple[float, ...]  # of leaky_relu, for every hidden layer; empty where no layer has one
    clip_norm: float | None

    @property
    def scalars(self) -> tuple[Any, ...]:
        """The scalars that every operator takes, in order."""
        return *self[:4], list(self.activation), *self[5:7]

    @property
    def options(self) -> tuple[list[float], float | None]:
        """The last arguments of every operator: slopes and clip_norm."""
        return list(self.slopes), self.clip_norm


# ------------------------------------------------------------------------------------------------------------ calls

_requires_grad = attrgetter("requires_grad")


def _is_wanted(params: Sequence[Tensor], lr: Sequence[Tensor]) -> bool:
    """Whether a gradient of params or rates is required."""
    if not torch.is_grad_enabled():
        return False
    wanted = wants_gradient if is_transformed_or_dual() else _requires_grad
    return any(map(wanted, params)) or any(map(wanted, lr))


def adapt_call(
    implementation: str,
    problem: Problem,
    params: Sequence[Tensor],
    lr: Sequence[Tensor],
    support: tuple[Tensor, Tensor, Tensor | None],
) -> list[Tensor]:
    """New parameters, [T, *shape] each; ``support`` is x, y and mask."""
    keep = _is_wanted(params, lr)
    # Without a backward a single segment suffices: the kernels reserve memory for the start of each further one.
    every = problem.checkpoint_every if keep else problem.steps
    second_order = constant(problem.second_order, torch.bool, _CPU)
    arguments = (list(params), *support, list(lr), *problem.scalars[:-1], every, keep, second_order, *problem.options)
    adapted: list[Tensor] = adapt.kernel(implementation).call(arguments)
    return adapted


def _meta_loss_arguments(
    problem: Problem,
    params: Sequence[Tensor],
    lr: Sequence[Tensor],
    data: tuple[Tensor | None, ...],
    weights: tuple[float, ...],
    keep: bool,
) -> tuple[Any, ...]:
    second_order = constant(problem.second_order, torch.bool, _CPU)
    step_weights = constant(weights, _arithmetic(params[0]), _CPU)
    every = problem.checkpoint_every if keep else problem.steps
    scalars = problem.scalars[:-1]
    return (list(params), *data, list(lr), *scalars, every, second_order, step_weights, keep, *problem.options)


def meta_loss_call(
    implementation: str,
    problem: Problem,
    params: Sequence[Tensor],
    lr: Sequence[Tensor],
    support: tuple[Tensor, Tensor, Tensor | None],
    query: tuple[Tensor, Tensor, Tensor | None],
    weights: tuple[float, ...],
) -> Tensor:
    """Weighted query losses [T]; ``support`` and ``query`` are x, y and mask."""
    data, keep = (*support, *query), _is_wanted(params, lr)
    losses: Tensor = meta_loss.kernel(implementation).call(
        _meta_loss_arguments(problem, params, lr, data, weights, keep)
    )
    return losses


def meta_backward_call(
    implementation: str,
    problem: Problem,
    params: Sequence[Tensor],
    support: tuple[Tensor, Tensor, Tensor | None],
    query: tuple[Tensor, Tensor, Tensor | None],
    weights: tuple[float, ...],
    gradient: Tensor | None,
) -> tuple[Tensor, Sequence[Tensor]]:
    """Weighted query losses [T] and gradients of params, without a graph; outside all transforms.

    ``gradient`` [T] is the gradient of the objective by the losses; None stands for their mean.
    """
    arguments = _meta_loss_arguments(problem, params, (), (*support, *query), weights, True)
    with below_autograd():
        losses, task_grads = meta_loss.kernel(implementation).overload(*arguments)
        if gradient is None:
            gradient = torch.full_like(losses, 1 / len(losses))
        options = problem.steps, problem.per_step, problem.loss
        found, _ = meta_loss_backward.kernel(implementation).overload(
            gradient, task_grads, arguments[0], *support[:2], [], *options
        )
    return losses, found


# ----------------------------------------------------------------------------------------------------------- shapes


def _arithmetic(like: Tensor) -> torch.dtype:
    """Dtype of the arithmetic and of internal buffers."""
    return torch.promote_types(like.dtype, torch.float32)


def _padded(num_tasks: int) -> int:
    return (num_tasks + _TASK_LANES - 1) // _TASK_LANES * _TASK_LANES


def _task_elements(params: Sequence[Tensor]) -> int:
    return sum(math.prod(p.shape[-2:]) if i % 2 == 0 else p.shape[-1] for i, p in enumerate(params))


def _adapted_shapes(a: Any) -> tuple[list[Tensor], Tensor]:
    num_tasks = a.x.shape[0]
    results = [p.new_empty((num_tasks, *p.shape[(-2 if i % 2 == 0 else -1) :])) for i, p in enumerate(a.params)]
    kept = -(-a.steps // a.checkpoint_every) * _task_elements(a.params) if a.keep else 0
    return results, a.params[0].new_empty(_padded(num_tasks) * kept, dtype=_arithmetic(a.params[0]))


def _loss_shapes(a: Any) -> tuple[Tensor, Tensor]:
    flat = _task_elements(a.params) + sum(r.numel() for r in a.lr) if a.with_grads else 0
    num_tasks = a.x.shape[0]
    return a.x.new_empty(num_tasks), a.x.new_empty(_padded(num_tasks) * flat, dtype=_arithmetic(a.x))


def _gradient_shapes(a: Any) -> tuple[list[Tensor], list[Tensor]]:
    return [p.new_empty(p.shape) for p in a.params], [r.new_empty(r.shape) for r in a.lr]


# -------------------------------------------------------------------------------------------------------- operators

_SCALARS = "float rate, int steps, bool per_step, int adapted, int[1] activation, int loss, int checkpoint_every"

#: Last in the schemas, as the dispatcher omits trailing arguments equal to their defaults.
_OPTIONS = "float[] slopes=[], float? clip_norm=None"

_SHARED: dict[str, Any] = {
    "title": "the fused inner loop",
    "backends": ("cpp", "cuda", "triton"),
    "triton": "metakern.ops.mlp_inner_loop.triton",
}

adapt_backward = define_op(
    "mlp_inner_loop_backward(Tensor[] grad_adapted, Tensor trajectory, Tensor[] params, Tensor x, Tensor y, "
    f"Tensor? mask, Tensor[] lr, {_SCALARS}, Tensor second_order, {_OPTIONS}) -> (Tensor[], Tensor[])",
    results=("grad_params", "grad_lr"),
    shapes=_gradient_shapes,
    batching=batched_backward,
    constants=("second_order",),
    family="mlp_inner_loop",
    **_SHARED,
)

meta_loss_backward = define_op(
    "mlp_meta_loss_backward(Tensor grad_losses, Tensor task_grads, Tensor[] params, Tensor x, Tensor y, Tensor[] lr, "
    "int steps, bool per_step, int loss) -> (Tensor[], Tensor[])",
    results=("grad_params", "grad_lr"),
    shapes=_gradient_shapes,
    batching=batched_backward,
    family="mlp_meta_loss",
    **_SHARED,
)

adapt = define_op(
    f"mlp_inner_loop(Tensor[] params, Tensor x, Tensor y, Tensor? mask, Tensor[] lr, {_SCALARS}, bool keep, "
    f"Tensor second_order, {_OPTIONS}) -> (Tensor[], Tensor)",
    results=("adapted", "trajectory"),
    shapes=_adapted_shapes,
    gradient=Gradient(
        adapt_backward,
        of=("params", "lr"),
        saves=("params", "x", "y", "mask", "lr", "second_order", "trajectory"),
        private=("trajectory",),
    ),
    batching=batched,
    constants=("second_order",),
    reference=reference.mlp_inner_loop,
    **_SHARED,
)

meta_loss = define_op(
    "mlp_meta_loss(Tensor[] params, Tensor x, Tensor y, Tensor? mask, Tensor query_x, Tensor query_y, "
    f"Tensor? query_mask, Tensor[] lr, {_SCALARS}, Tensor second_order, Tensor step_weights, bool with_grads, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
    results=("losses", "task_grads"),
    shapes=_loss_shapes,
    gradient=Gradient(
        meta_loss_backward,  # the forward computed the gradients, one per task
        of=("params", "lr"),
        saves=("task_grads",),
        shapes=("params", "x", "y", "lr"),
        private=("task_grads",),
    ),
    batching=batched,
    constants=("second_order", "step_weights"),
    reference=reference.mlp_inner_loop,
    **_SHARED,
)
