"""lstm_step: one step of the coordinatewise LSTM optimizer for every coordinate at once.

Andrychowicz et al. 2016, arXiv 1606.04474. The definition is :mod:`metakern.reference.lstm_step`.

Axis legend: N coordinates, F features (1 or 2), H hidden units, L layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from metakern import _backend
from metakern.ops.lstm_state import MAX_HIDDEN, MAX_LAYERS, LSTMState, check_layout, pack_state, tiles, unpack_state
from metakern.reference import lstm_step as reference

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: Bounds of the preprocessing's scale p: e^p and 1/p stay finite in float32.
MIN_SCALE, MAX_SCALE = 1e-6, 88.0

_PREPROCESS_INDEX = {name: index for index, name in enumerate(reference.PREPROCESS)}


def lstm_step(
    params: Tensor,
    grads: Tensor,
    state: LSTMState,
    weights: Sequence[Tensor],
    *,
    preprocess: str = "log_sign",
    preprocess_scale: float = 10.0,
    output_scale: float = 0.1,
    backend: str | None = None,
) -> tuple[Tensor, LSTMState]:
    """Update parameters with a coordinatewise LSTM: preprocessing, L stacked cells, linear head, scaled update.

    θ' = θ + output_scale · (w · h'_L + b), gates never leave registers. Differentiable once through ``params``,
    ``grads``, ``state`` and every weight; backward recomputes the gates from the incoming (h, c). Works under
    ``torch.compile(fullgraph=True)``, ``torch.func.grad`` and ``torch.func.vmap``; compiling a ``torch.func.grad`` of
    it fails in torch itself (pytorch issue 170834).

    Args:
        params: θ, N coordinates in any shape; float32, bfloat16, float16 or float64.
        grads: gradients of the shape and dtype of ``params``. One that is not finite makes its coordinate's new
            parameter and state NaN and leaves all others alone.
        state: the packed (h, c) of N coordinates, float64 for float64 params and float32 otherwise.
        weights: in the order of ``nn.LSTM`` and ``nn.Linear``: per layer weight_ih [4H, F or H], weight_hh [4H, H],
            bias_ih [4H], bias_hh [4H]; then the head's weight [1, H] and bias [1]; dtype of the state.
        preprocess: ``"log_sign"``, ``"log_and_clip"`` (F = 2) or ``"none"`` (F = 1).
        preprocess_scale: p of the preprocessing, positive.
        output_scale: factor of the head's output.
        backend: ``"auto"``, ``"cpp"`` or ``"reference"``; None is ``"auto"``.

    Returns:
        The new parameters, like ``params``, and the new state.

    Raises:
        ValueError: for shapes, sizes, counts or option values that do not fit.
        TypeError: for dtypes or types that do not fit.
        RuntimeError: for a backend that cannot run, and for a second derivative of a kernel.

    Example:
        >>> lstm, head = torch.nn.LSTM(2, 20, num_layers=2), torch.nn.Linear(20, 1)
        >>> weights = [*lstm.parameters(), *head.parameters()]
        >>> params, state = torch.randn(1000), LSTMState.zeros(1000)
        >>> params, state = lstm_step(params, 2 * params, state, weights)
    """
    options = _checked(params, grads, state, weights, preprocess, preprocess_scale, output_scale)
    if _backend.resolve(backend, params.device) == "reference":
        return _reference_step(params, grads, state, weights, preprocess, preprocess_scale, output_scale)
    new_params, new_state = _call(params, grads, state.data, weights, options)
    return new_params, LSTMState(new_state, state.num_coordinates)


@torch.no_grad()
def lstm_step_(
    params: Tensor,
    grads: Tensor,
    state: LSTMState,
    weights: Sequence[Tensor],
    *,
    preprocess: str = "log_sign",
    preprocess_scale: float = 10.0,
    output_scale: float = 0.1,
    backend: str | None = None,
) -> None:
    """:func:`lstm_step` in place, without a graph: overwrites ``params`` and ``state.data``, which are contiguous.

    ``params`` and ``grads`` may be one tensor; ``state`` shares no memory with them.
    For training with a finished optimizer: it saves the allocation of a new state, 320 bytes a
    coordinate in float32 with H = 20 and L = 2.
    Arguments and errors are those of :func:`lstm_step`.
    """
    options = _checked(params, grads, state, weights, preprocess, preprocess_scale, output_scale)
    for name, tensor in (("params", params), ("state.data", state.data)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous to be updated in place, got strides {tensor.stride()}")
    if _backend.resolve(backend, params.device) == "reference":
        new_params, new_state = _reference_step(
            params, grads, state, weights, preprocess, preprocess_scale, output_scale
        )
        params.copy_(new_params)
        state.data.copy_(new_state.data)
        return
    torch.ops.metakern.lstm_step_.default(params, grads, state.data, weights, *options)
    if not torch.compiler.is_compiling():  # a graph that saved the old values must notice
        torch.autograd.graph.increment_version((params, state.data))


def _call(params: Tensor, grads: Tensor, state: Tensor, weights: Sequence[Tensor], options: tuple[Any, ...]) -> Any:
    """The operator, by the way that serves the caller.

    The formula registered with the operator is the one that torch.compile traces. torch.func does not get through it
    (pytorch issue 170834), and in eager mode it costs 40 µs more a call than the same formula as a Function.
    """
    if torch.compiler.is_compiling():
        return torch.ops.metakern.lstm_step.default(params, grads, state, weights, *options)
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (params, grads, state, *weights))
    if transformed or recorded:
        function = _Step if transformed else _EagerStep
        return function.apply(params, grads, state, *options, *weights)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.metakern.lstm_step.default(params, grads, state, weights, *options)


def _reference_step(
    params: Tensor,
    grads: Tensor,
    state: LSTMState,
    weights: Sequence[Tensor],
    preprocess: str,
    preprocess_scale: float,
    output_scale: float,
) -> tuple[Tensor, LSTMState]:
    device = params.device.type
    # Under autocast the kernels keep their precision, and so does the reference.
    no_autocast = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with no_autocast:
        new_params, h, c = reference.lstm_step(
            params.reshape(-1),
            grads.reshape(-1),
            *unpack_state(state),
            weights,
            preprocess=preprocess,
            preprocess_scale=preprocess_scale,
            output_scale=output_scale,
        )
    return new_params.view(params.shape), pack_state(h, c)


# ------------------------------------------------------------------------------------------------ argument checks


def _checked(
    params: Tensor,
    grads: Tensor,
    state: LSTMState,
    weights: Sequence[Tensor],
    preprocess: str,
    preprocess_scale: float,
    output_scale: float,
) -> tuple[int, float, float]:
    """The options as the operator takes them; raises for whatever does not fit."""
    if not isinstance(preprocess, str) or preprocess not in _PREPROCESS_INDEX:
        raise ValueError(f"preprocess must be one of {', '.join(reference.PREPROCESS)}, got {preprocess!r}")
    check_scales(preprocess_scale, output_scale)
    for name, x in (("params", params), ("grads", grads)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    dtype, device = params.dtype, params.device
    if dtype not in PARAM_DTYPES:
        raise TypeError(f"params must be float32, bfloat16, float16 or float64, got {dtype}")
    if params.layout != torch.strided or grads.layout != torch.strided:
        raise TypeError(f"params and grads must be dense tensors, got layouts {params.layout} and {grads.layout}")
    if grads.shape != params.shape:
        raise ValueError(f"grads must have the shape of params, {list(params.shape)}, got {list(grads.shape)}")
    if grads.dtype != dtype:
        raise TypeError(f"grads must have the dtype of params, {dtype}, got {grads.dtype}")
    if grads.device != device:
        raise ValueError(f"grads must be on the device of params, {device}, got {grads.device}")
    check_layout(state)
    if state.num_coordinates != params.numel():
        raise ValueError(
            f"state must hold as many coordinates as params, {params.numel()}, got {state.num_coordinates}"
        )
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if state.data.dtype != state_dtype:
        raise TypeError(f"state must be {state_dtype} for {dtype} params, got {state.data.dtype}")
    if state.data.device != device:
        raise ValueError(f"state must be on the device of params, {device}, got {state.data.device}")
    _check_weights(weights, state, preprocess, state_dtype, device)
    return _PREPROCESS_INDEX[preprocess], float(preprocess_scale), float(output_scale)


def check_scales(preprocess_scale: Any, output_scale: Any) -> None:
    """Raise TypeError for scales that are no numbers, ValueError for those that no float32 arithmetic can follow."""
    for name, value in (("preprocess_scale", preprocess_scale), ("output_scale", output_scale)):
        if type(value) is float:
            continue
        if not isinstance(value, (float, int)) and (isinstance(value, str) or not hasattr(value, "__float__")):
            raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
        if isinstance(value, Tensor) and (value.numel() != 1 or value.requires_grad):  # no gradient flows to it
            raise TypeError(
                f"{name} must be a number, got a tensor of shape {list(value.shape)} with "
                f"requires_grad={value.requires_grad}"
            )
    if not MIN_SCALE <= preprocess_scale <= MAX_SCALE:
        raise ValueError(f"preprocess_scale must be {MIN_SCALE} to {MAX_SCALE}, got {preprocess_scale}")
    if not -math.inf < output_scale < math.inf:
        raise ValueError(f"output_scale must be finite, got {output_scale}")


def _weight_specs(layers: int, hidden: int, inputs: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Name and shape of every weight, in order."""
    specs: list[tuple[str, tuple[int, ...]]] = []
    for layer in range(layers):
        specs += [
            (f"weight_ih_l{layer}", (4 * hidden, hidden if layer else inputs)),
            (f"weight_hh_l{layer}", (4 * hidden, hidden)),
            (f"bias_ih_l{layer}", (4 * hidden,)),
            (f"bias_hh_l{layer}", (4 * hidden,)),
        ]
    return (*specs, ("head.weight", (1, hidden)), ("head.bias", (1,)))


#: For every count of layers, hidden units and features that is served: making them takes longer than the other checks.
_WEIGHT_SPECS = {
    sizes: _weight_specs(*sizes)
    for sizes in itertools.product(range(1, MAX_LAYERS + 1), range(1, MAX_HIDDEN + 1), (1, 2))
}


def _check_weights(
    weights: Sequence[Tensor], state: LSTMState, preprocess: str, dtype: torch.dtype, device: torch.device
) -> None:
    _, layers, _, hidden, _ = state.data.shape
    specs = _WEIGHT_SPECS[layers, hidden, reference.num_features(preprocess)]
    if not hasattr(weights, "__len__"):
        raise TypeError(f"weights must be a sequence of tensors, got {type(weights).__name__}")
    if len(weights) != len(specs):
        raise ValueError(
            f"weights must hold 4 tensors a layer and 2 of the head, {len(specs)} for the state's "
            f"{layers} layers, got {len(weights)}"
        )
    for index, (weight, (name, shape)) in enumerate(zip(weights, specs, strict=True)):
        if not isinstance(weight, Tensor) or weight.layout != torch.strided:
            got = f"layout {weight.layout}" if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"weights[{index}] ({name}) must be a dense tensor, got {got}")
        if weight.shape != shape:
            raise ValueError(f"weights[{index}] ({name}) must have shape {list(shape)}, got {list(weight.shape)}")
        if weight.dtype != dtype:
            raise TypeError(f"weights[{index}] ({name}) must be {dtype} like the state, got {weight.dtype}")
        if weight.device != device:
            raise ValueError(f"weights[{index}] ({name}) must be on {device}, got {weight.device}")


# ------------------------------------------------------------------------- tracing, autograd and batching formulas


def _fake(params: Tensor, grads: Tensor, state: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return params.new_empty(params.shape), state.new_empty(state.shape)


def _fake_inplace(*_: Any) -> None:
    return None


def _fake_backward(
    grad_params: Tensor, grad_state: Tensor, grads: Tensor, state: Tensor, weights: Sequence[Tensor], *_: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return grads.new_empty(grads.shape), state.new_empty(state.shape), [w.new_empty(w.shape) for w in weights]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, grads, state, weights, *options = inputs
    ctx.save_for_backward(grads, state, *weights)
    ctx.options = options


def _backward(ctx: Any, grad_params: Tensor, grad_state: Tensor) -> tuple[Any, ...]:
    grads, state, *weights = ctx.saved_tensors
    grad_grads, grad_state, grad_weights = torch.ops.metakern.lstm_step_backward.default(
        grad_params, grad_state, grads, state, weights, *ctx.options
    )
    return grad_params, grad_grads, grad_state, grad_weights, None, None, None


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "lstm_step provides no second derivative of its own; backend='reference' does (a second derivative of the "
        "optimizee needs none: it flows through `grads`)"
    )


class _Step(torch.autograd.Function):
    """lstm_step with its formula for torch.func; the weights travel one by one."""

    @staticmethod
    def forward(
        params: Tensor, grads: Tensor, state: Tensor, index: int, p: float, scale: float, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        new_params, new_state = torch.ops.metakern.lstm_step.default(params, grads, state, weights, index, p, scale)
        return new_params, new_state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        params, grads, state, index, p, scale, *weights = inputs
        _setup_context(ctx, (params, grads, state, weights, index, p, scale), output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        grads, state, *weights = ctx.saved_tensors
        grad_params, grad_new_state = grad_outputs
        grad_grads, grad_state, grad_weights = _call_backward(
            grad_params, grad_new_state, grads, state, weights, *ctx.options
        )
        return grad_params, grad_grads, grad_state, None, None, None, *grad_weights

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _batched(info, (*in_dims[:3], in_dims[6:]), *args[:3], list(args[6:]), *args[3:6])


class _EagerStep(torch.autograd.Function):
    """The same for eager mode: with a setup_context of its own, apply() would inspect signatures for 40 µs a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        _Step.setup_context(ctx, inputs, None)
        with torch._C._AutoDispatchBelowAutograd():
            return _Step.forward(*inputs)

    backward = _Step.backward


def _call_backward(
    grad_params: Tensor, grad_state: Tensor, grads: Tensor, state: Tensor, weights: Sequence[Tensor], *options: Any
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """lstm_step_backward; where a graph of it is recorded, using that graph raises."""
    if torch.is_grad_enabled():
        grad_grads, grad_state, *grad_weights = _StepBackward.apply(
            grad_params, grad_state, grads, state, *options, *weights
        )
        return grad_grads, grad_state, grad_weights
    with torch._C._AutoDispatchBelowAutograd():
        result: tuple[Tensor, Tensor, Sequence[Tensor]] = torch.ops.metakern.lstm_step_backward.default(
            grad_params, grad_state, grads, state, weights, *options
        )
    return result


class _StepBackward(torch.autograd.Function):
    """lstm_step_backward, whose own derivative raises."""

    @staticmethod
    def forward(
        grad_params: Tensor,
        grad_state: Tensor,
        grads: Tensor,
        state: Tensor,
        index: int,
        p: float,
        scale: float,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        grad_grads, grad_state, grad_weights = torch.ops.metakern.lstm_step_backward.default(
            grad_params, grad_state, grads, state, weights, index, p, scale
        )
        return grad_grads, grad_state, *grad_weights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept: there is no derivative."""

    backward = staticmethod(_no_second_derivative)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        first, weights, options = args[:4], list(args[7:]), args[4:7]
        (grad_grads, grad_state, grad_weights), (grads_dim, state_dim, weight_dims) = _batched_backward(
            info, (*in_dims[:4], in_dims[7:]), *first, weights, *options
        )
        return (grad_grads, grad_state, *grad_weights), (grads_dim, state_dim, *weight_dims)


def _batched(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """torch.func.vmap of lstm_step: one launch over all coordinates unless each element has weights of its own."""
    if any(dim is not None for dim in in_dims[3]):
        return _looped(lambda p, g, s, w, *options: _call(p, g, s, w, options), info, in_dims, *args)
    batch = info.batch_size
    params, grads, state = (
        x.unsqueeze(0).expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(args[:3], in_dims, strict=False)
    )
    n = math.prod(params.shape[1:])
    padded = tiles(n) * state.shape[-1]
    flat_params, flat_grads = (F.pad(x.reshape(batch, n), (0, padded - n)).view(-1) for x in (params, grads))
    new_params, new_state = _call(flat_params, flat_grads, state.flatten(0, 1), args[3], args[4:])
    new_params = new_params.view(batch, padded)[:, :n].reshape(params.shape)
    return (new_params, new_state.view(state.shape)), (0, 0)


def _batched_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    return _looped(_call_backward, info, in_dims, *args)


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


if _backend.is_compiled():
    torch.library.register_fake("metakern::lstm_step", _fake)
    torch.library.register_fake("metakern::lstm_step_", _fake_inplace)
    torch.library.register_fake("metakern::lstm_step_backward", _fake_backward)
    torch.library.register_autograd("metakern::lstm_step", _backward, setup_context=_setup_context)
    torch.library.register_autograd("metakern::lstm_step_backward", _no_second_derivative)
    torch.library.register_vmap("metakern::lstm_step", _batched)
    torch.library.register_vmap("metakern::lstm_step_backward", _batched_backward)
