"""Tracing, autograd and batching formulas of lstm_step's operators, the same for every implementation.

Axis legend: N coordinates, F features (1 or 2), H hidden units, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from metakern.ops.core.devices import check_devices
from metakern.ops.lstm_step.state import tiles


class Options(NamedTuple):
    """The operators' scalars: index of the preprocessing, its scale p, factor of the output, index of the precision."""

    preprocess: int
    preprocess_scale: float
    output_scale: float
    precision: int


class Operators:
    """One implementation's operators: step, in place, backward. It travels through autograd as one opaque argument."""

    def __init__(self, name: str) -> None:
        """The operators torch.ops.metakern.<name>, <name>_ and <name>_backward, given their formulas."""
        self.step: Callable[..., Any] = getattr(torch.ops.metakern, name).default
        self.step_: Callable[..., Any] = getattr(torch.ops.metakern, f"{name}_").default
        self.backward: Callable[..., Any] = getattr(torch.ops.metakern, f"{name}_backward").default
        self._register(f"metakern::{name}")

    def _register(self, name: str) -> None:
        def backward(ctx: Any, grad_params: Tensor, grad_state: Tensor) -> tuple[Any, ...]:
            grads, state, *weights = ctx.saved_tensors
            arguments = (grad_params, grad_state, grads, state, weights, *ctx.options)
            return grad_params, *self.backward(*arguments), *(None,) * len(ctx.options)

        def batched(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
            return _batched(self, info, in_dims, *args)

        def batched_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
            return _batched_backward(self, info, in_dims, *args)

        torch.library.register_fake(name, _fake)
        torch.library.register_fake(f"{name}_", _fake_inplace)
        torch.library.register_fake(f"{name}_backward", _fake_backward)
        torch.library.register_autograd(name, backward, setup_context=_setup_context)
        torch.library.register_autograd(f"{name}_backward", _no_second_derivative)
        torch.library.register_vmap(name, batched)
        torch.library.register_vmap(f"{name}_backward", batched_backward)


def call(
    operators: Operators,
    params: Tensor,
    grads: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    options: Sequence[Any],
) -> tuple[Tensor, Tensor]:
    """The operator, by the way that serves the caller.

    The formula registered with the operator is the one that torch.compile traces. torch.func does not get through it
    (pytorch issue 170834), and in eager mode it costs 40 µs more a call than the same formula as a Function.
    """
    result: tuple[Tensor, Tensor]
    if torch.compiler.is_compiling():
        result = operators.step(params, grads, state, weights, *options)
        return result
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (params, grads, state, *weights))
    if transformed or recorded:
        function = _Step if transformed else _EagerStep
        result = function.apply(params, grads, state, operators, *options, *weights)
        return result
    with torch._C._AutoDispatchBelowAutograd():
        result = operators.step(params, grads, state, weights, *options)
    return result


# ------------------------------------------------------------------------------------------------- fake kernels


def _fake(params: Tensor, grads: Tensor, state: Tensor, weights: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    check_devices("params", params.device, grads=grads, state=state, weights=weights)
    return params.new_empty(params.shape), state.new_empty(state.shape)


def _fake_inplace(params: Tensor, grads: Tensor, state: Tensor, weights: Sequence[Tensor], *_: Any) -> None:
    check_devices("params", params.device, grads=grads, state=state, weights=weights)


def _fake_backward(
    grad_params: Tensor, grad_state: Tensor, grads: Tensor, state: Tensor, weights: Sequence[Tensor], *_: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    check_devices("grads", grads.device, grad_params=grad_params, grad_state=grad_state, state=state, weights=weights)
    return grads.new_empty(grads.shape), state.new_empty(state.shape), [w.new_empty(w.shape) for w in weights]


# ------------------------------------------------------------------------------------------------------ autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, grads, state, weights, *options = inputs
    ctx.save_for_backward(grads, state, *weights)
    ctx.options = options


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "lstm_step provides no second derivative of its own; backend='reference' does (a second derivative of the "
        "optimizee needs none: it flows through `grads`)"
    )


#: Where the options start and end among a Function's arguments: params, grads, state, operators, options, weights.
_OPTIONS = slice(4, 4 + len(Options._fields))


class _Step(torch.autograd.Function):
    """lstm_step with its formula for torch.func; the weights travel one by one."""

    @staticmethod
    def forward(params: Tensor, grads: Tensor, state: Tensor, operators: Operators, *rest: Any) -> Any:
        split = len(Options._fields)
        new_params, new_state = operators.step(params, grads, state, rest[split:], *rest[:split])
        return new_params, new_state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, grads, state, ctx.operators = inputs[:4]
        ctx.options = inputs[_OPTIONS]
        ctx.save_for_backward(grads, state, *inputs[_OPTIONS.stop :])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        grads, state, *weights = ctx.saved_tensors
        grad_params, grad_new_state = grad_outputs
        grad_grads, grad_state, grad_weights = _call_backward(
            ctx.operators, grad_params, grad_new_state, grads, state, weights, *ctx.options
        )
        return grad_params, grad_grads, grad_state, None, *(None,) * len(ctx.options), *grad_weights

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        dims = (*in_dims[:3], in_dims[_OPTIONS.stop :])
        return _batched(args[3], info, dims, *args[:3], list(args[_OPTIONS.stop :]), *args[_OPTIONS])


class _EagerStep(torch.autograd.Function):
    """The same for eager mode: with a setup_context of its own, apply() would inspect signatures for 40 µs a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        _Step.setup_context(ctx, inputs, None)
        with torch._C._AutoDispatchBelowAutograd():
            return _Step.forward(*inputs)

    backward = _Step.backward


def _call_backward(
    operators: Operators,
    grad_params: Tensor,
    grad_state: Tensor,
    grads: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    *options: Any,
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """lstm_step_backward; where a graph of it is recorded, using that graph raises."""
    if torch.is_grad_enabled():
        grad_grads, grad_state, *grad_weights = _StepBackward.apply(
            grad_params, grad_state, grads, state, operators, *options, *weights
        )
        return grad_grads, grad_state, grad_weights
    with torch._C._AutoDispatchBelowAutograd():
        result: tuple[Tensor, Tensor, Sequence[Tensor]] = operators.backward(
            grad_params, grad_state, grads, state, weights, *options
        )
    return result


class _StepBackward(torch.autograd.Function):
    """lstm_step_backward, whose own derivative raises. One tensor more than :class:`_Step` stands before operators."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        first, operators, rest = args[:4], args[4], args[5:]
        split = len(Options._fields)
        grad_grads, grad_state, grad_weights = operators.backward(*first, rest[split:], *rest[:split])
        return grad_grads, grad_state, *grad_weights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept: there is no derivative."""

    backward = staticmethod(_no_second_derivative)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        weights_at = _OPTIONS.stop + 1
        (grad_grads, grad_state, grad_weights), (grads_dim, state_dim, weight_dims) = _batched_backward(
            args[4], info, (*in_dims[:4], in_dims[weights_at:]), *args[:4], list(args[weights_at:]), *args[5:weights_at]
        )
        return (grad_grads, grad_state, *grad_weights), (grads_dim, state_dim, *weight_dims)


# ------------------------------------------------------------------------------------------------------ batching


def _batched(operators: Operators, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """torch.func.vmap of lstm_step: one launch over all coordinates unless each element has weights of its own."""
    if any(dim is not None for dim in in_dims[3]):
        return _looped(lambda p, g, s, w, *options: call(operators, p, g, s, w, options), info, in_dims, *args)
    batch = info.batch_size
    params, grads, state = (
        x.unsqueeze(0).expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(args[:3], in_dims, strict=False)
    )
    n = math.prod(params.shape[1:])
    padded = tiles(n) * state.shape[-1]
    flat_params, flat_grads = (F.pad(x.reshape(batch, n), (0, padded - n)).reshape(-1) for x in (params, grads))
    new_params, new_state = call(operators, flat_params, flat_grads, state.flatten(0, 1), args[3], args[4:])
    new_params = new_params.view(batch, padded)[:, :n].reshape(params.shape)
    return (new_params, new_state.view(state.shape)), (0, 0)


def _batched_backward(operators: Operators, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    return _looped(lambda *element: _call_backward(operators, *element), info, in_dims, *args)


def _looped(op: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    def element(x: Any, dim: Any, index: int) -> Any:
        if isinstance(x, (list, tuple)):
            return [element(y, d, index) for y, d in zip(x, dim, strict=True)]
        return x if dim is None else x.select(dim, index)

    if info.batch_size == 0:
        raise ValueError("lstm_step under vmap with a batch of weights or a gradient needs at least one element, got 0")
    in_dims = (*in_dims, *(None,) * (len(args) - len(in_dims)))  # the options are never batched
    rows = [op(*(element(x, d, i) for x, d in zip(args, in_dims, strict=True))) for i in range(info.batch_size)]
    columns = list(zip(*rows, strict=True))
    stacked = [
        [torch.stack(ws) for ws in zip(*column, strict=True)] if isinstance(column[0], list) else torch.stack(column)
        for column in columns
    ]
    return tuple(stacked), tuple([0] * len(s) if isinstance(s, list) else 0 for s in stacked)
