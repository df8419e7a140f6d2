"""The operators lstm_step, lstm_step_ and lstm_step_backward: gradient formula and batching rules.

Axis legend: N coordinates, F features (1 or 2), H hidden units, L layers.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F

from metakern.ops.core.batching import Batch, looped
from metakern.ops.core.define_op import Gradient, define_op
from metakern.ops.lstm_step import reference
from metakern.ops.lstm_step.state import tiles

_OPTIONS = "Tensor[] weights, int preprocess, float preprocess_scale, float output_scale, int precision"

_BACKENDS: dict[str, Any] = {"backends": ("cpp", "cuda", "triton"), "triton": "metakern.ops.lstm_step.triton"}


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
    shapes=lambda a: (
        a.grads.new_empty(a.grads.shape),
        a.state.new_empty(a.state.shape),
        [w.new_empty(w.shape) for w in a.weights],
    ),
    family="lstm_step",
    way_out="backend='reference' does (a second derivative of the optimizee needs none: it flows through `grads`)",
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

step_ = define_op(
    f"lstm_step_(Tensor(a!) params, Tensor grads, Tensor(b!) state, {_OPTIONS}) -> ()",
    shapes=lambda a: None,
    family="lstm_step",
    **_BACKENDS,
)
