"""Tracing and autograd formulas of mlp_inner_loop's operators, the same for every implementation.

Axis legend: T tasks, K inner steps, P parameters of a task.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_TASK_LANES = 16

_ONCE = (
    "meta-gradients of the fused inner loop cannot be differentiated again; backend='reference' takes plain PyTorch, "
    "which can"
)


class Problem(NamedTuple):
    """The operators' scalars: see :func:`metakern.ops.mlp_inner_loop.mlp_inner_loop`."""

    rate: float
    steps: int
    per_step: bool
    adapted: int  # bit i: whether params[i] is
    activation: int
    loss: int
    checkpoint_every: int
    second_order: tuple[bool, ...]

    @property
    def scalars(self) -> tuple[Any, ...]:
        """Those that every operator takes, in order."""
        return self[:7]


class Operators:
    """One implementation's operators. They travel through autograd as one opaque argument."""

    def __init__(self, suffix: str) -> None:
        """The operators mlp_inner_loop<suffix>, mlp_meta_loss<suffix> and their _backward, given their formulas."""
        names = [f"mlp_inner_loop{suffix}", f"mlp_meta_loss{suffix}"]
        names += [f"{name}_backward" for name in names]
        operators: list[Callable[..., Any]] = [getattr(torch.ops.metakern, name).default for name in names]
        self.adapt, self.meta_loss, self.adapt_backward, self.meta_loss_backward = operators
        self._register(*(f"metakern::{name}" for name in names))

    def _register(self, adapt: str, meta_loss: str, adapt_backward: str, meta_loss_backward: str) -> None:
        def backward(ctx: Any, grad_adapted: Any, _: Any) -> Any:
            x, y, mask, second_order, trajectory, *tensors = ctx.saved_tensors
            params, lr = list(tensors[: ctx.counts[0]]), list(tensors[ctx.counts[0] :])
            arguments = (trajectory, params, x, y, mask, lr, *ctx.scalars, second_order)
            found, rates = self.adapt_backward(list(grad_adapted), *arguments)
            return found, None, None, None, rates, *(None,) * 9

        def backward_meta_loss(ctx: Any, grad: Tensor, _: Any) -> Any:
            x, y, task_grads, *tensors = ctx.saved_tensors
            params, lr = list(tensors[: ctx.count]), list(tensors[ctx.count :])
            found, rates = self.meta_loss_backward(grad, task_grads, params, x, y, lr, *ctx.options)
            return found, *(None,) * 6, rates, *(None,) * (ctx.arguments - 8)

        library = torch.library
        library.register_fake(adapt, _fake)
        library.register_fake(meta_loss, _fake_meta_loss)
        library.register_autograd(adapt, backward, setup_context=_setup)
        library.register_autograd(meta_loss, backward_meta_loss, setup_context=_setup_meta_loss)
        library.register_fake(adapt_backward, _fake_backward)
        library.register_fake(meta_loss_backward, _fake_meta_loss_backward)
        library.register_autograd(adapt_backward, _no_second_derivative)
        library.register_autograd(meta_loss_backward, _no_second_derivative)


def _constant(values: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of a few constants; made once for each, but while a graph is traced."""
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype)
    return _cached_constant(values, dtype)


@functools.lru_cache(256)
def _cached_constant(values: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype)


def _wants_gradient(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def adapt_call(
    operators: Operators,
    problem: Problem,
    params: Sequence[Tensor],
    lr: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    mask: Tensor | None,
) -> list[Tensor]:
    """New parameters, [T, *shape] each."""
    keep = _wants_gradient([*params, *lr])
    second_order = _constant(problem.second_order, torch.bool)
    if torch.compiler.is_compiling() or not keep:
        results: list[Tensor] = operators.adapt(
            list(params), x, y, mask, list(lr), *problem.scalars, keep, second_order
        )[0]
        return results
    return list(_Adapt.apply(operators, problem, x, y, mask, second_order, len(params), *params, *lr))


def meta_loss_call(
    operators: Operators,
    problem: Problem,
    params: Sequence[Tensor],
    lr: Sequence[Tensor],
    support: tuple[Tensor, Tensor],
    query: tuple[Tensor, Tensor],
    support_mask: Tensor | None,
    query_mask: Tensor | None,
    weights: tuple[float, ...],
) -> Tensor:
    """Weighted query losses [T]."""
    with_grads = _wants_gradient([*params, *lr])
    sets = (*support, support_mask, *query, query_mask)
    constants = _constant(problem.second_order, torch.bool), _constant(weights, params[0].dtype)
    if torch.compiler.is_compiling() or not with_grads:
        losses: Tensor = operators.meta_loss(list(params), *sets, list(lr), *problem.scalars, *constants, with_grads)[0]
        return losses
    result: Tensor = _MetaLoss.apply(operators, problem, sets, constants, len(params), *params, *lr)
    return result


# ------------------------------------------------------------------------------------------------------ eager mode


class _Adapt(torch.autograd.Function):
    """mlp_inner_loop; the tensors that receive gradients travel one by one."""

    @staticmethod
    def forward(ctx: Any, operators: Operators, problem: Problem, x: Tensor, y: Tensor, *rest: Any) -> Any:
        mask, second_order, count, *tensors = rest
        params, lr = list(tensors[:count]), list(tensors[count:])
        with torch._C._AutoDispatchBelowAutograd():
            results, trajectory = operators.adapt(params, x, y, mask, lr, *problem.scalars, True, second_order)
        ctx.operators, ctx.problem, ctx.count = operators, problem, count
        ctx.save_for_backward(x, y, mask, second_order, trajectory, *tensors)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, y, mask, second_order, trajectory, *tensors = ctx.saved_tensors
        params, lr = tensors[: ctx.count], tensors[ctx.count :]
        arguments = (trajectory, params, x, y, mask, lr, *ctx.problem.scalars, second_order)
        operator = ctx.operators.adapt_backward
        return *(None,) * 7, *_once(lambda: operator(list(grads), *arguments), *grads, *tensors)


class _MetaLoss(torch.autograd.Function):
    """mlp_meta_loss: the gradient of every task is there after forward."""

    @staticmethod
    def forward(ctx: Any, operators: Operators, problem: Problem, sets: Any, constants: Any, *rest: Any) -> Any:
        count, *tensors = rest
        params, lr = list(tensors[:count]), list(tensors[count:])
        with torch._C._AutoDispatchBelowAutograd():
            losses, task_grads = operators.meta_loss(params, *sets, lr, *problem.scalars, *constants, True)
        ctx.operators, ctx.problem, ctx.count = operators, problem, count
        ctx.save_for_backward(sets[0], sets[1], task_grads, *tensors)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y, task_grads, *tensors = ctx.saved_tensors
        params, lr, problem = tensors[: ctx.count], tensors[ctx.count :], ctx.problem
        arguments = (task_grads, params, x, y, lr, problem.steps, problem.per_step, problem.loss)
        operator = ctx.operators.meta_loss_backward
        return *(None,) * 5, *_once(lambda: operator(grad, *arguments), grad, *tensors)


def _once(function: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of parameters and rates; where a graph of them is recorded, using that graph raises."""
    if torch.is_grad_enabled():
        recorded: tuple[Tensor, ...] = _Once.apply(function, *inputs)
        return recorded
    gradients: tuple[Tensor, ...] = _Once.forward(None, function)
    return gradients


class _Once(torch.autograd.Function):
    """Gradients that have no derivative."""

    @staticmethod
    def forward(ctx: Any, function: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            found, rates = function()
        return *found, *rates

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(_ONCE)


# --------------------------------------------------------------------------------------------- tracing and compiling


def _padded(num_tasks: int) -> int:
    return (num_tasks + _TASK_LANES - 1) // _TASK_LANES * _TASK_LANES


def _task_elements(params: Sequence[Tensor]) -> int:
    return sum(math.prod(p.shape[-2:]) if i % 2 == 0 else p.shape[-1] for i, p in enumerate(params))


def _fake(params: Any, x: Any, y: Any, mask: Any, lr: Any, rate: Any, steps: int, *rest: Any) -> Any:
    every, keep = rest[4], rest[5]
    num_tasks = x.shape[0]
    results = [p.new_empty((num_tasks, *p.shape[(-2 if i % 2 == 0 else -1) :])) for i, p in enumerate(params)]
    kept = -(-steps // every) * _task_elements(params) if keep else 0
    return results, params[0].new_empty(_padded(num_tasks) * kept)


def _fake_backward(grad_adapted: Any, trajectory: Any, params: Any, x: Any, y: Any, mask: Any, lr: Any, *_: Any) -> Any:
    return [p.new_empty(p.shape) for p in params], [r.new_empty(r.shape) for r in lr]


def _fake_meta_loss(params: Any, x: Any, *rest: Any) -> Any:
    lr, with_grads = rest[5], rest[-1]
    flat = _task_elements(params) + sum(r.numel() for r in lr) if with_grads else 0
    return x.new_empty(x.shape[0]), params[0].new_empty(_padded(x.shape[0]) * flat)


def _fake_meta_loss_backward(grad: Any, task_grads: Any, params: Any, x: Any, y: Any, lr: Any, *rest: Any) -> Any:
    return _fake_backward(grad, task_grads, params, x, y, None, lr, *rest)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    params, x, y, mask, lr, *scalars, _, second_order = inputs
    ctx.counts, ctx.scalars = (len(params), len(lr)), scalars
    ctx.save_for_backward(x, y, mask, second_order, output[1], *params, *lr)


def _setup_meta_loss(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    params, x, y, *_ = inputs
    lr, steps, per_step, loss = inputs[7], inputs[9], inputs[10], inputs[13]
    ctx.options, ctx.count, ctx.arguments = (steps, per_step, loss), len(params), len(inputs)
    ctx.save_for_backward(x, y, output[1], *params, *lr)


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(_ONCE)
