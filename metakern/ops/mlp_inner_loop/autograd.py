"""Tracing and autograd formulas of mlp_inner_loop's operators, the same for every implementation.

Axis legend: T tasks, K inner steps, P parameters of a task.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metakern.core.memo import constant
from metakern.core.torch_private import below_autograd
from metakern.core.transforms import is_transformed_or_dual, wants_gradient
from metakern.ops.core.devices import check_constants, check_devices
from metakern.ops.mlp_inner_loop.batching import backward_rule, batched, batched_backward, forward_rule

_TASK_LANES = 16

#: Where the operators read their constants, whatever device the tasks are on.
_CPU = torch.device("cpu")

_ONCE = (
    "meta-gradients of the fused inner loop cannot be differentiated again; backend='reference' takes plain PyTorch, "
    "which can"
)
_FORWARD = "the fused inner loop has no forward-mode derivative; backend='reference' takes plain PyTorch, which has"
_DATA = (
    "the fused inner loop differentiates by params and lr alone, but the samples require a gradient; "
    "backend='reference' takes plain PyTorch, which gives it"
)

#: Some of an operator's tensors, None among them.
Tensors = Sequence[Any]


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
        """Those that every operator takes, in order."""
        return *self[:4], list(self.activation), *self[5:7]

    @property
    def options(self) -> tuple[list[float], float | None]:
        """Those that every operator takes at the end."""
        return list(self.slopes), self.clip_norm


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
            found, rates = self.adapt_backward(list(grad_adapted), *arguments, *ctx.options)
            return found, None, None, None, rates, *_no_gradients(ctx.needs_input_grad[5:])

        def backward_meta_loss(ctx: Any, grad: Tensor, _: Any) -> Any:
            x, y, task_grads, *tensors = ctx.saved_tensors
            params, lr = list(tensors[: ctx.count]), list(tensors[ctx.count :])
            found, rates = self.meta_loss_backward(grad, task_grads, params, x, y, lr, *ctx.options)
            return found, *(None,) * 6, rates, *_no_gradients(ctx.needs_input_grad[8:])

        library = torch.library
        library.register_fake(adapt, _fake)
        library.register_fake(meta_loss, _fake_meta_loss)
        library.register_autograd(adapt, backward, setup_context=_setup)
        library.register_autograd(meta_loss, backward_meta_loss, setup_context=_setup_meta_loss)
        library.register_fake(adapt_backward, _fake_backward)
        library.register_fake(meta_loss_backward, _fake_meta_loss_backward)
        library.register_autograd(adapt_backward, _refuse_second_derivative)
        library.register_autograd(meta_loss_backward, _refuse_second_derivative)
        library.register_vmap(adapt, forward_rule(self.adapt, 3, keep=12))
        library.register_vmap(meta_loss, forward_rule(self.meta_loss, 6, keep=17))
        library.register_vmap(adapt_backward, backward_rule(self.adapt_backward, 3))
        library.register_vmap(meta_loss_backward, backward_rule(self.meta_loss_backward, 2))


@dataclass(slots=True)  # a frozen one takes 2 µs to make
class Run:
    """One of the two operators and its options, both ways; opaque to autograd, which looks into tuples.

    ``data`` are x, y and mask of the support sets, and of the query sets for mlp_meta_loss.

    Attributes:
        operators: of one implementation
        problem: the scalars
        weights: step_weights of mlp_meta_loss; None for mlp_inner_loop
        keep: whether a gradient is wanted
        rates: whether one of the rates is
    """

    operators: Operators
    problem: Problem
    weights: tuple[float, ...] | None
    keep: bool
    rates: bool

    def forward(self, params: Tensors, data: Tensors, lr: Tensors) -> tuple[list[Tensor], Tensor]:
        """Results [T, ...], and what the way back needs."""
        second_order = constant(self.problem.second_order, torch.bool, _CPU)
        problem = self.problem
        # Without a way back there is one segment of steps: the kernels reserve memory for the start of every other.
        every = problem.checkpoint_every if self.keep else problem.steps
        arguments, options = (list(params), *data, list(lr), *problem.scalars[:-1], every), problem.options
        if self.weights is None:
            results, kept = self.operators.adapt(*arguments, self.keep, second_order, *options)
            return results, kept
        weights = constant(self.weights, _arithmetic(params[0]), _CPU)
        losses, kept = self.operators.meta_loss(*arguments, second_order, weights, self.keep, *options)
        return [losses], kept

    def backward(self, grads: Tensors, kept: Tensor, params: Tensors, data: Tensors, lr: Tensors) -> list[Tensor]:
        """Gradients of params, and of the rates where they are wanted."""
        problem, lists = self.problem, (list(params), list(lr))
        if self.weights is None:
            second_order = constant(problem.second_order, torch.bool, _CPU)
            arguments = (lists[0], *data, lists[1], *problem.scalars, second_order, *problem.options)
            found, rates = self.operators.adapt_backward(list(grads), kept, *arguments)
        else:
            options = problem.steps, problem.per_step, problem.loss
            found, rates = self.operators.meta_loss_backward(grads[0], kept, lists[0], *data[:2], lists[1], *options)
        return [*found, *rates] if self.rates else list(found)

    def split(self, count: int, tensors: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        """params, data and lr, of which there are ``count`` params."""
        end = count + (3 if self.weights is None else 6)
        return tensors[:count], tensors[count:end], tensors[end:]


def _no_gradients(wanted: Sequence[Any]) -> list[Any]:
    """None for every argument, in the form that torch.library wants: a list of numbers that is empty is a list."""
    return [[] if isinstance(flag, list) else None for flag in wanted]


def _arithmetic(like: Tensor) -> torch.dtype:
    """Dtype of the arithmetic and of internal buffers."""
    return torch.promote_types(like.dtype, torch.float32)


def adapt_call(
    operators: Operators,
    problem: Problem,
    params: Sequence[Tensor],
    lr: Sequence[Tensor],
    support: tuple[Tensor, Tensor, Tensor | None],
) -> list[Tensor]:
    """New parameters, [T, *shape] each; ``support`` is x, y and mask."""
    return _call(operators, problem, None, params, support, lr)


def meta_loss_call(
    operators: Operators,
    problem: Problem,
    params: Sequence[Tensor],
    lr: Sequence[Tensor],
    support: tuple[Tensor, Tensor, Tensor | None],
    query: tuple[Tensor, Tensor, Tensor | None],
    weights: tuple[float, ...],
) -> Tensor:
    """Weighted query losses [T]; ``support`` and ``query`` are x, y and mask."""
    return _call(operators, problem, weights, params, (*support, *query), lr)[0]


def meta_backward_call(
    operators: Operators,
    problem: Problem,
    params: Sequence[Tensor],
    support: tuple[Tensor, Tensor, Tensor | None],
    query: tuple[Tensor, Tensor, Tensor | None],
    weights: tuple[float, ...],
    gradient: Tensor | None,
) -> tuple[Tensor, Sequence[Tensor]]:
    """Weighted query losses [T] and gradients of params, without a graph; outside of all transforms.

    ``gradient`` is that of what is minimised by the losses, [T]; None of their mean.
    """
    run, data = Run(operators, problem, weights, True, False), (*support, *query)
    with below_autograd():
        (losses,), kept = run.forward(params, data, ())
        if gradient is None:
            gradient = torch.full_like(losses, 1 / len(losses))
        return losses, run.backward((gradient,), kept, params, data, ())


def _call(
    operators: Operators,
    problem: Problem,
    weights: tuple[float, ...] | None,
    params: Sequence[Tensor],
    data: tuple[Tensor | None, ...],
    lr: Sequence[Tensor],
) -> list[Tensor]:
    """Results, by the way that serves the caller; see :func:`metakern.ops.lstm_step.autograd.call` for the ways."""
    rates = keep = False
    transformed = is_transformed_or_dual()
    if torch.is_grad_enabled():
        wanted = wants_gradient if transformed else _requires_grad
        rates = any(map(wanted, lr))
        keep = rates or any(map(wanted, params))
        if any(map(wanted, [x for x in data if x is not None])):
            raise RuntimeError(_DATA)
    run = Run(operators, problem, weights, keep, rates)
    if not transformed and keep:
        if weights is not None:
            return [_EagerMetaLoss.apply(run, data, len(params), *params, *lr)]
        return list(_Eager.apply(run, len(params), *params, *data, *lr))
    if transformed and not torch.compiler.is_compiling():
        return list(_Transformed.apply(run, len(params), *params, *data, *lr)[:-1])
    return run.forward(params, data, lr)[0]


_requires_grad = operator.attrgetter("requires_grad")


# ---------------------------------------------------------------------------------------- eager mode and torch.func


def _refuse_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(_ONCE)


def _refuse_forward_mode(ctx: Any, *_: Any) -> None:
    raise RuntimeError(_FORWARD)


class _Transformed(torch.autograd.Function):
    """One run with its formula for torch.func; the tensors travel one by one: params, data, lr."""

    @staticmethod
    def forward(run: Run, count: int, *tensors: Any) -> tuple[Tensor, ...]:
        with below_autograd():
            results, kept = run.forward(*run.split(count, tensors))
        return *results, kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.run, ctx.count, *tensors = inputs
        ctx.mark_non_differentiable(output[-1])
        ctx.save_for_backward(output[-1], *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        kept, *tensors = ctx.saved_tensors
        run, count = ctx.run, ctx.count
        wanted = grads[: count if run.weights is None else 1]  # none of what is kept
        params, data, lr = run.split(count, tensors)
        found = _backward(run, wanted, kept, params, data, lr)
        rates = found[count:] if run.rates else (None,) * len(lr)
        return None, None, *found[:count], *(None,) * len(data), *rates

    jvp = staticmethod(_refuse_forward_mode)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], run: Run, count: int, *tensors: Any) -> tuple[Any, Any]:
        def forward(params: Tensors, data: Tensors, lr: Tensors) -> tuple[Tensors, Tensor]:
            *results, kept = _Transformed.apply(run, count, *params, *data, *lr)
            return results, kept

        dims = run.split(count, in_dims[2:])
        results, kept = batched(forward, info.batch_size, dims, run.split(count, tensors), not run.rates)
        return (*results, kept), (0,) * (len(results) + 1)


class _Eager(torch.autograd.Function):
    """mlp_inner_loop in eager mode: with a setup_context of its own, apply() would inspect signatures for 40 µs."""

    @staticmethod
    def forward(ctx: Any, run: Run, count: int, *tensors: Any) -> tuple[Tensor, ...]:
        with below_autograd():
            results, kept = run.forward(*run.split(count, tensors))
        ctx.run, ctx.count = run, count
        ctx.save_for_backward(kept, *tensors)
        return tuple(results)

    backward = _Transformed.backward


class _EagerMetaLoss(torch.autograd.Function):
    """mlp_meta_loss in eager mode. Its gradients are there already, the way back asks the other tensors for shapes."""

    @staticmethod
    def forward(ctx: Any, run: Run, data: Tensors, count: int, *tensors: Tensor) -> Tensor:
        with below_autograd():
            (losses,), kept = run.forward(tensors[:count], data, tensors[count:])
        ctx.run, ctx.data, ctx.count, ctx.tensors = run, data, count, tensors
        ctx.save_for_backward(kept)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (kept,) = ctx.saved_tensors
        run, count, tensors = ctx.run, ctx.count, ctx.tensors
        found = _backward(run, (grad,), kept, tensors[:count], ctx.data, tensors[count:])
        rates = () if run.rates else (None,) * (len(tensors) - count)
        return None, None, None, *found, *rates


def _backward(run: Run, grads: Tensors, kept: Tensor, params: Tensors, data: Tensors, lr: Tensors) -> Sequence[Tensor]:
    """Gradients of params and rates; where a graph of them is recorded, using that graph raises."""
    if torch.is_grad_enabled() or is_transformed_or_dual():
        found: tuple[Tensor, ...] = _Backward.apply(run, len(params), len(grads), kept, *grads, *params, *data, *lr)
        return found
    with below_autograd():
        return run.backward(grads, kept, params, data, lr)


class _Backward(torch.autograd.Function):
    """Gradients that have no derivative; grads, params, data and lr travel one by one."""

    @staticmethod
    def forward(run: Run, count: int, num_grads: int, kept: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        with below_autograd():
            return tuple(run.backward(tensors[:num_grads], kept, *run.split(count, tensors[num_grads:])))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept: there is no derivative."""

    backward = staticmethod(_refuse_second_derivative)
    jvp = staticmethod(_refuse_forward_mode)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], run: Run, count: int, num_grads: int, *tensors: Any) -> Any:
        def backward(grads: Tensors, kept: Tensors, params: Tensors, data: Tensors, lr: Tensors) -> Any:
            return _Backward.apply(run, count, num_grads, *kept, *grads, *params, *data, *lr)

        def split(values: Any) -> Any:
            return values[1 : num_grads + 1], values[:1], *run.split(count, values[num_grads + 1 :])

        found = batched_backward(backward, info.batch_size, split(in_dims[3:]), split(tensors), not run.rates)
        return tuple(found), (0,) * len(found)


# --------------------------------------------------------------------------------------------- tracing and compiling


def _padded(num_tasks: int) -> int:
    return (num_tasks + _TASK_LANES - 1) // _TASK_LANES * _TASK_LANES


def _task_elements(params: Sequence[Tensor]) -> int:
    return sum(math.prod(p.shape[-2:]) if i % 2 == 0 else p.shape[-1] for i, p in enumerate(params))


def _fake(
    params: Any, x: Any, y: Any, mask: Any, lr: Any, rate: Any, steps: int, *rest: Any
) -> tuple[list[Tensor], Tensor]:
    every, keep, second_order = rest[4:7]
    _check_fake(params, second_order, support_x=x, support_y=y, support_mask=mask, lr=lr)
    num_tasks = x.shape[0]
    results = [p.new_empty((num_tasks, *p.shape[(-2 if i % 2 == 0 else -1) :])) for i, p in enumerate(params)]
    kept = -(-steps // every) * _task_elements(params) if keep else 0
    return results, params[0].new_empty(_padded(num_tasks) * kept, dtype=_arithmetic(params[0]))


def _fake_backward(
    grad_adapted: Any, trajectory: Any, params: Any, x: Any, y: Any, mask: Any, lr: Any, *rest: Any
) -> tuple[list[Tensor], list[Tensor]]:
    _check_fake(params, rest[7], trajectory=trajectory, support_x=x, support_y=y, support_mask=mask, lr=lr)
    check_devices("params", params[0].device, grad_adapted=grad_adapted)
    return _fake_gradients(params, lr)


def _fake_meta_loss(
    params: Any, x: Any, y: Any, mask: Any, query_x: Any, query_y: Any, query_mask: Any, lr: Any, *rest: Any
) -> tuple[Tensor, Tensor]:
    second_order, weights, with_grads = rest[7:10]
    _check_fake(params, second_order, support_x=x, support_y=y, support_mask=mask, lr=lr)
    check_devices("params", params[0].device, query_x=query_x, query_y=query_y, query_mask=query_mask)
    check_constants(params[0].device, step_weights=weights)
    flat = _task_elements(params) + sum(r.numel() for r in lr) if with_grads else 0
    return x.new_empty(x.shape[0]), x.new_empty(_padded(x.shape[0]) * flat, dtype=_arithmetic(x))


def _fake_meta_loss_backward(
    grad: Any, task_grads: Any, params: Any, x: Any, y: Any, lr: Any, *_: Any
) -> tuple[list[Tensor], list[Tensor]]:
    device = params[0].device
    check_devices("params", device, params=params, grad=grad, task_grads=task_grads, support_x=x, support_y=y, lr=lr)
    return _fake_gradients(params, lr)


def _fake_gradients(params: Any, lr: Any) -> tuple[list[Tensor], list[Tensor]]:
    return [p.new_empty(p.shape) for p in params], [r.new_empty(r.shape) for r in lr]


def _check_fake(params: Any, second_order: Tensor, **arguments: Any) -> None:
    device = params[0].device
    check_devices("params", device, params=params, **arguments)
    check_constants(device, second_order=second_order)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    params, x, y, mask, lr, *scalars, _, second_order, slopes, clip_norm = inputs
    ctx.counts, ctx.scalars, ctx.options = (len(params), len(lr)), scalars, (slopes, clip_norm)
    ctx.save_for_backward(x, y, mask, second_order, output[1], *params, *lr)


def _setup_meta_loss(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    params, x, y, *_ = inputs
    lr, steps, per_step, loss = inputs[7], inputs[9], inputs[10], inputs[13]
    ctx.options, ctx.count = (steps, per_step, loss), len(params)
    ctx.save_for_backward(x, y, output[1], *params, *lr)
