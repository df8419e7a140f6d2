"""The operators lstm_step, lstm_step_ and lstm_step_backward: gradient formula and batching rules.

Axis legend: N coordinates, F features (1 or 2), H hidden units, L layers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.core.torch_private import forward_mode_is_active, func_is_active
from metakern.ops.core.batching import Batch, looped
from metakern.ops.core.define_op import Gradient, Kernel, Operator, define_op
from metakern.ops.lstm_step import reference
from metakern.ops.lstm_step.state import tiles

_OPTIONS = "Tensor[] weights, int preprocess, float preprocess_scale, float output_scale, int precision"

_WAY_OUT = "backend='reference' does (a second derivative of the optimizee needs none: it flows through `grads`)"

#: Bytes of gates that a call keeps for backward; larger calls recompute them. 10,464 coordinates with H = 20, L = 2.
MAX_GATES = 8 * 2**20

_BACKENDS: dict[str, Any] = {"backends": ("cpp", "cuda", "triton"), "triton": "metakern.ops.lstm_step.triton"}


def _gradient_shapes(a: Any) -> tuple[Any, ...]:
    return a.grads.new_empty(a.grads.shape), a.state.new_empty(a.state.shape), [w.new_empty(w.shape) for w in a.weights]


def empty_gates(state: Tensor) -> Tensor:
    """What the CPU's forward can keep for backward: 5 numbers for each hidden unit of a coordinate."""
    count, layers, _, hidden, lanes = state.shape
    return state.new_empty(count, layers, 5, hidden, lanes)


def call_keeping_gates(
    kernel: Kernel, with_gates: Operator, state: Tensor, arguments: tuple[Any, ...]
) -> tuple[Any, ...]:
    """The results of ``kernel``, by the operator that keeps gates for backward where autograd records and it pays.

    That is on the CPU, up to :data:`MAX_GATES`. torch.compile and torch.func get the operator without gates. The
    results have the same bits.

    Args:
        kernel: of the operator without gates
        with_gates: the operator of the same arguments whose last result, a private one, are the gates
        state: the LSTM's packed state
        arguments: the operators'
    """
    is_recorded = _may_keep_gates(kernel, state) and kernel.operator.is_recorded(arguments)
    if is_recorded:
        kernel = with_gates.kernel(kernel.implementation)
    results: tuple[Any, ...] = kernel.call(arguments, is_recorded=is_recorded or None)
    return results


def _may_keep_gates(kernel: Kernel, state: Tensor) -> bool:
    if kernel.implementation != "compiled" or state.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return (
        5 * state.numel() * state.element_size() <= 2 * MAX_GATES
        and not func_is_active()
        and not forward_mode_is_active()
    )


def _batched(batch: Batch) -> tuple[Any, Any]:
    """One launch over all coordinates, unless the weights are batched."""
    if batch.has_axis("weights"):
        return looped(batch)
    params, grads, state = (batch.leading(name) for name in ("params", "grads", "state"))
    n = math.prod(params.shape[1:])
    padded = tiles(n) * state.shape[-1]
    flat_params, flat_grads = (F.pad(x.reshape(batch.size, n), (0, padded - n)).reshape(-1) for x in (params, grads))
    flat = batch.arguments._replace(params=flat_params, grads=flat_grads, state=state.flatten(0, 1))
    new = batch.call(*flat)
    new_params = new.new_params.view(batch.size, padded)[:, :n].reshape(params.shape)
    return (new_params, new.new_state.view(state.shape)), (0, 0)


step_backward = define_op(
    f"lstm_step_backward(Tensor grad_new_params, Tensor grad_new_state, Tensor grads, Tensor state, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor[])",
    results=("grad_grads", "grad_state", "grad_weights"),
    shapes=_gradient_shapes,
    family="lstm_step",
    way_out=_WAY_OUT,
    **_BACKENDS,
)

step = define_op(
    f"lstm_step(Tensor params, Tensor grads, Tensor state, {_OPTIONS}) -> (Tensor, Tensor)",
    results=("new_params", "new_state"),
    shapes=lambda a: (a.params.new_empty(a.params.shape), a.state.new_empty(a.state.shape)),
    gradient=Gradient(
        step_backward,  # recomputes the gates from the incoming state
        of=("params", "grads", "state", "weights"),
        saves=("grads", "state", "weights"),
        passes={"params": "new_params"},
    ),
    batching=_batched,
    reference=reference.lstm_step,
    **_BACKENDS,
)

step_with_gates_backward = define_op(
    "lstm_step_with_gates_backward(Tensor grad_new_params, Tensor grad_new_state, Tensor grads, Tensor state, "
    f"Tensor gates, {_OPTIONS}) -> (Tensor, Tensor, Tensor[])",
    results=("grad_grads", "grad_state", "grad_weights"),
    shapes=_gradient_shapes,
    family="lstm_step",
    way_out=_WAY_OUT,
)

#: :data:`step` that also returns what backward would recompute, [tiles, L, 5, H, 32]; for the CPU alone.
step_with_gates = define_op(
    f"lstm_step_with_gates(Tensor params, Tensor grads, Tensor state, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    results=("new_params", "new_state", "gates"),
    shapes=lambda a: (a.params.new_empty(a.params.shape), a.state.new_empty(a.state.shape), empty_gates(a.state)),
    gradient=Gradient(
        step_with_gates_backward,
        of=("params", "grads", "state", "weights"),
        saves=("grads", "state", "weights", "gates"),
        private=("gates",),
        passes={"params": "new_params"},
    ),
    family="lstm_step",
)

step_ = define_op(
    f"lstm_step_(Tensor(a!) params, Tensor grads, Tensor(b!) state, {_OPTIONS}) -> ()",
    shapes=lambda a: None,
    family="lstm_step",
    **_BACKENDS,
)
