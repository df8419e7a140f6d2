"""lstm_step: one step of the coordinatewise LSTM optimizer for every coordinate at once.

Andrychowicz et al. 2016, arXiv 1606.04474. The definition is :mod:`metakern.ops.lstm_step.reference`.

Axis legend: N coordinates, F features (1 or 2), H hidden units, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metakern.ops.core.checks import check_dense, check_dtype, check_like, check_same_device, check_shape
from metakern.ops.core.define_op import Kernel, Operator
from metakern.ops.core.devices import without_autocast
from metakern.ops.lstm_step import reference
from metakern.ops.lstm_step.autograd import call_keeping_gates, step, step_, step_backward, step_with_gates
from metakern.ops.lstm_step.state import (
    LAYOUT,
    LSTMState,
    check_layout,
    pack_state,
    unpack_state,
)

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: Bounds of the preprocessing's scale p: e^p and 1/p stay finite in float32.
MIN_SCALE, MAX_SCALE = 1e-6, 88.0

#: Names of the products' precisions; a kernel receives the index. Keep in step with csrc/lstm_step/problem.h.
PRECISIONS = ("highest", "high", "medium")

PRECISION_INDEX = {name: index for index, name in enumerate(PRECISIONS)}
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
    precision: str = "highest",
    backend: str | None = None,
) -> tuple[Tensor, LSTMState]:
    """Update parameters with a coordinatewise LSTM: preprocessing, L stacked cells, linear head, scaled update.

    θ' = θ + output_scale · (w · h'_L + b); gates stay in registers. Differentiable once through ``params``, ``grads``,
    ``state`` and every weight; backward recomputes the gates from the incoming (h, c). On the CPU, forward keeps them
    for backward instead while they take at most 8 MiB: 20·H·L bytes a coordinate in float32, so up to 10,464
    coordinates with H = 20 and L = 2; results are the same to the bit. Works under
    ``torch.compile(fullgraph=True)``, ``torch.func.grad`` and ``torch.func.vmap``; compiling a ``torch.func.grad`` of
    it fails in torch itself (pytorch issue 170834).

    Args:
        params: θ, N coordinates in any shape; float32, bfloat16, float16 or float64.
        grads: gradients of the shape and dtype of ``params``. A non-finite gradient makes its coordinate's new
            parameter and state NaN, and no other's.
        state: the packed (h, c) of N coordinates, float64 for float64 params and float32 otherwise; bfloat16 halves
            its memory on a GPU, the arithmetic stays float32.
        weights: in the order of ``nn.LSTM`` and ``nn.Linear``: per layer weight_ih [4H, F or H], weight_hh [4H, H],
            bias_ih [4H], bias_hh [4H]; then the head's weight [1, H] and bias [1]; float64 for float64 params and
            float32 otherwise.
        preprocess: ``"log_sign"``, ``"log_and_clip"`` (F = 2) or ``"none"`` (F = 1).
        preprocess_scale: p of the preprocessing, positive.
        output_scale: factor of the head's output.
        precision: of forward's products of weights and hidden states, named as in
            ``torch.set_float32_matmul_precision``: ``"highest"`` is float32, ``"high"`` TF32 and ``"medium"``
            bfloat16 on a GPU's tensor cores. Backward, and kernels without the faster product, use a more precise
            one.
        backend: ``"auto"``, ``"cpp"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None is ``"auto"``.

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
    options = check_options(preprocess, preprocess_scale, output_scale, precision)
    kernel = _chosen(step, params, grads, state, weights, preprocess, backend)
    if kernel is None:
        return _reference_step(params, grads, state, weights, preprocess, preprocess_scale, output_scale)
    arguments = (params, grads, state.data, weights, *options)
    new_params, new_state = call_keeping_gates(kernel, step_with_gates, state.data, arguments)
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
    precision: str = "highest",
    backend: str | None = None,
) -> None:
    """:func:`lstm_step` in place, without a graph: overwrites ``params`` and ``state.data``, both contiguous.

    ``params`` and ``grads`` may be the same tensor; ``state`` must share no memory with them.
    For training with a finished optimizer: saves the allocation of a new state, 320 bytes per
    coordinate in float32 with H = 20 and L = 2.
    Arguments and errors as for :func:`lstm_step`.

    Example:
        >>> lstm, head = torch.nn.LSTM(2, 20, num_layers=2), torch.nn.Linear(20, 1)
        >>> weights = [*lstm.parameters(), *head.parameters()]
        >>> params, state = torch.randn(1000), LSTMState.zeros(1000)
        >>> lstm_step_(params, 2 * params, state, weights)  # params and state have moved
    """
    options = check_options(preprocess, preprocess_scale, output_scale, precision)
    kernel = _chosen(step_, params, grads, state, weights, preprocess, backend)
    if not checks_itself(kernel):
        check_contiguous(params=params, **{"state.data": state.data})
        if not torch.compiler.is_compiling():
            check_memory(params, grads, state)
    if kernel is None:
        new_params, new_state = _reference_step(
            params, grads, state, weights, preprocess, preprocess_scale, output_scale
        )
        params.copy_(new_params)
        state.data.copy_(new_state.data)
        return
    kernel.call((params, grads, state.data, weights, *options))
    if not torch.compiler.is_compiling():  # autograd must detect that saved values were overwritten
        torch.autograd.graph.increment_version((params, state.data))


def _chosen(
    operator: Operator,
    params: Tensor,
    grads: Tensor,
    state: LSTMState,
    weights: Sequence[Tensor],
    preprocess: str,
    backend: str | None,
) -> Kernel | None:
    """The kernel that serves a call, None for the reference; checks the tensors unless the kernel does.

    Compiled kernels check shapes, dtypes and devices in a hundredth of the time that Python takes. What they cannot
    see is always checked here.
    """
    plain = is_plain(params, grads, state, weights)
    if not plain:
        _check(params, grads, state, weights, preprocess)
    kernel = operator.choose(backend, params.device, _NO_BFLOAT16 if state.data.dtype == torch.bfloat16 else None)
    if plain and not checks_itself(kernel):
        _check(params, grads, state, weights, preprocess)
    return kernel


_NO_BFLOAT16 = {"cpp": "the kernels for the CPU keep no bfloat16 state"}


def checks_itself(kernel: Kernel | None) -> bool:
    """Whether a compiled kernel, which checks its arguments, runs; under torch.compile its fake kernel does."""
    return kernel is not None and kernel.implementation == "compiled" and not torch.compiler.is_compiling()


def is_plain(params: Tensor, grads: Tensor, state: LSTMState, weights: Sequence[Tensor]) -> bool:
    """Whether the operators can check these arguments fully: a state of this layout and N, and only plain tensors."""
    if type(state) is not LSTMState or not hasattr(weights, "__len__"):
        return False
    for x in (params, grads, state.data, *weights):
        if not isinstance(x, Tensor) or x.is_meta:
            return False
    n = state.num_coordinates
    return state.layout == LAYOUT and type(n) is int and n == params.numel()


def _reference_step(
    params: Tensor,
    grads: Tensor,
    state: LSTMState,
    weights: Sequence[Tensor],
    preprocess: str,
    preprocess_scale: float,
    output_scale: float,
) -> tuple[Tensor, LSTMState]:
    with without_autocast(params.device):
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


def check_options(
    preprocess: str, preprocess_scale: float, output_scale: float, precision: str
) -> tuple[int, float, float, int]:
    """The options in the operators' form; raises for invalid ones."""
    if not isinstance(preprocess, str) or preprocess not in _PREPROCESS_INDEX:
        raise ValueError(f"preprocess must be one of {', '.join(reference.PREPROCESS)}, got {preprocess!r}")
    check_scales(preprocess_scale, output_scale)
    check_precision(precision)
    return _PREPROCESS_INDEX[preprocess], float(preprocess_scale), float(output_scale), PRECISION_INDEX[precision]


def _check(params: Tensor, grads: Tensor, state: LSTMState, weights: Sequence[Tensor], preprocess: str) -> None:
    """Check the tensors as csrc/lstm_step/arguments.h does."""
    for name, x in (("params", params), ("grads", grads)):
        check_dense(x, name)
    check_like(grads, "grads", params, "params")
    dtype = params.dtype
    if dtype not in PARAM_DTYPES:
        raise TypeError(f"params must be float32, bfloat16, float16 or float64, got {dtype}")
    check_layout(state)
    if state.num_coordinates != params.numel():
        raise ValueError(
            f"state must hold as many coordinates as params, {params.numel()}, got {state.num_coordinates}"
        )
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    state_dtype = state.data.dtype
    if state_dtype != compute_dtype and (state_dtype != torch.bfloat16 or dtype == torch.float64):
        raise TypeError(f"state must be {compute_dtype} for {dtype} params, got {state_dtype}")
    check_same_device(state.data, "state", params, "params")
    _check_weights(weights, state, preprocess, compute_dtype, params)


def check_contiguous(**tensors: Tensor) -> None:
    """Raise ValueError for a tensor that is not contiguous, so that it cannot be updated in place."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous to be updated in place, got strides {list(tensor.stride())}")


def check_memory(params: Tensor, grads: Tensor, state: LSTMState) -> None:
    """Raise RuntimeError where arguments overlap, so that one block's results would be another's input."""
    grads = grads.contiguous()  # a copy if it was not contiguous
    if overlap(params, state.data) or overlap(grads, state.data):
        raise RuntimeError("params, grads and state must not share memory")
    if overlap(params, grads) and params.data_ptr() != grads.data_ptr():
        raise RuntimeError("grads must not share a part of params' memory")


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors share memory."""
    first, second = a.data_ptr(), b.data_ptr()
    return first < second + b.nbytes and second < first + a.nbytes


def check_precision(precision: Any) -> None:
    """Raise ValueError unless ``precision`` is one of :data:`PRECISIONS`."""
    if not isinstance(precision, str) or precision not in PRECISION_INDEX:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def check_scales(
    preprocess_scale: Any, output_scale: Any, names: tuple[str, str] = ("preprocess_scale", "output_scale")
) -> None:
    """Raise TypeError for scales that are no numbers, ValueError for those out of float32's range."""
    for name, value in zip(names, (preprocess_scale, output_scale), strict=True):
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
        raise ValueError(f"{names[0]} must be {MIN_SCALE} to {MAX_SCALE}, got {preprocess_scale}")
    if not abs(output_scale) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{names[1]} must be finite in float32, got {output_scale}")


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


def _check_weights(
    weights: Sequence[Tensor], state: LSTMState, preprocess: str, dtype: torch.dtype, params: Tensor
) -> None:
    _, layers, _, hidden, _ = state.data.shape
    specs = _weight_specs(layers, hidden, reference.num_features(preprocess))
    if not hasattr(weights, "__len__"):
        raise TypeError(f"weights must be a sequence of tensors, got {type(weights).__name__}")
    if len(weights) != len(specs):
        raise ValueError(
            f"weights must hold 4 tensors a layer and 2 of the head, {len(specs)} for the state's "
            f"{layers} layers, got {len(weights)}"
        )
    for index, (weight, (name, shape)) in enumerate(zip(weights, specs, strict=True)):
        check_dense(weight, f"weights[{index}]")
        called = f"weights[{index}] ({name})"
        check_shape(weight, called, shape)
        check_dtype(weight, called, dtype)
        check_same_device(weight, called, params, "params")


def prepare(backend: str | None) -> None:
    """Import what ``backend`` needs ahead of the first call, as torch.compile cannot trace imports."""
    for operator in (step, step_, step_backward):
        operator.prepare(backend)
