"""lstm_step with other stages: features × LSTM cells × head, for other learned optimizers.

The stages are those of :data:`metakern.ops.lstm_step.reference.FEATURES` and ``HEADS``; the kernels are compiled for
the pairs of csrc/lstm_step/stages.h.

Axis legend: N coordinates, T tasks, F features, H hidden units, L layers, R outputs of the head, E rows of the stages'
own state, K task inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from metakern.ops.core.checks import (
    check_dense,
    check_dtype,
    check_like,
    check_same_device,
    check_shape,
    check_type,
    check_value,
)
from metakern.ops.core.define_op import Gradient, define_op
from metakern.ops.core.functions import Backward
from metakern.ops.lstm_step import reference
from metakern.ops.lstm_step.state import LSTMState, check_layout, pack_state, unpack_state

_TENSORS = "Tensor params, Tensor grads, Tensor state, Tensor stage_state, Tensor task_inputs, Tensor[] weights"
_OPTIONS = "int preprocess, int head, float preprocess_scale, float output_scale, int precision"

#: Pairs of stages with compiled kernels: plain features with every head, and the plain head with all features.
COMPILED = frozenset(
    (f, h) for f in reference.FEATURES for h in reference.HEADS if f in reference.PREPROCESS or h == "add"
)


def _per_task(gradient: Tensor, task_inputs: Tensor) -> Tensor:
    """Sum [K, N] over the coordinates of each task, to [T, K]."""
    tasks, count = task_inputs.shape
    return gradient.reshape(count, tasks, gradient.shape[1] // max(tasks, 1)).sum(-1).T


def _gradients(backward: Backward) -> dict[str, Any]:
    a, grads = backward.arguments, backward.grads
    *found, grad_tasks, grad_weights = backward.call(
        step_backward,
        *(grads.new_params, grads.new_state, grads.new_stage_state),
        *(a.params, a.grads, a.state, a.stage_state, a.task_inputs, a.weights),
        *(a.preprocess, a.head, a.preprocess_scale, a.output_scale, a.precision),
    )
    named = dict(zip(("params", "grads", "state", "stage_state"), found, strict=True))
    return named | {"task_inputs": _per_task(grad_tasks, a.task_inputs), "weights": grad_weights}


step_backward = define_op(
    "lstm_step_staged_backward(Tensor grad_new_params, Tensor grad_new_state, Tensor grad_new_stage_state, "
    f"{_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
    results=("grad_params", "grad_grads", "grad_state", "grad_stage_state", "grad_task_inputs", "grad_weights"),
    shapes=lambda a: (
        *(x.new_empty(x.shape) for x in (a.params, a.grads, a.state, a.stage_state)),
        a.task_inputs.new_empty(a.task_inputs.shape[1], a.params.numel()),
        [w.new_empty(w.shape) for w in a.weights],
    ),
    family="lstm_step_staged",
)

step = define_op(
    f"lstm_step_staged({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    results=("new_params", "new_state", "new_stage_state"),
    shapes=lambda a: tuple(x.new_empty(x.shape) for x in (a.params, a.state, a.stage_state)),
    gradient=Gradient(
        _gradients,
        of=("params", "grads", "state", "stage_state", "task_inputs", "weights"),
        saves=("params", "grads", "state", "stage_state", "task_inputs", "weights"),
    ),
    reference=reference.staged_step,
)


def lstm_step_staged(
    params: Tensor,
    grads: Tensor,
    state: LSTMState,
    weights: Sequence[Tensor],
    *,
    features: str,
    head: str,
    stage_state: Tensor | None = None,
    task_inputs: Tensor | None = None,
    features_scale: float = 10.0,
    head_scale: float = 0.1,
    backend: str | None = None,
) -> tuple[Tensor, LSTMState, Tensor]:
    """One step of a learned optimizer with LSTM cells and the given stages. Differentiable once.

    Args:
        params: θ, N coordinates in any shape; float32, bfloat16, float16 or float64.
        grads: gradients of the shape and dtype of ``params``.
        state: the packed (h, c) of N coordinates.
        weights: per layer weight_ih [4H, F or H], weight_hh [4H, H], bias_ih [4H], bias_hh [4H]; the head's weight
            [R, H] and bias [R]; then the stages' own weights, [number] each, if any: the features', then the head's.
        features: name of the features stage: ``"none"``, ``"log_sign"``, ``"log_and_clip"`` or ``"moments"``.
        head: name of the head stage: ``"add"`` or ``"gates"``.
        stage_state: [E, N], the stages' state per coordinate: first the features' rows, then the head's; in the dtype
            of the weights. None for stages without state.
        task_inputs: [T, K], inputs per task, in the order of the stages and in the dtype of the weights; task t
            has the coordinates t N / T to (t + 1) N / T. None for stages without task inputs.
        features_scale: scale of the features stage: p of the gradient preprocessing.
        head_scale: scale of the head stage: the factor of ``"add"``.
        backend: ``"auto"``, ``"cpp"`` or ``"reference"``; None is ``"auto"``.

    Returns:
        The new parameters, like ``params``, the new state, and the new stage state.

    Raises:
        ValueError: for shapes, counts or names that do not fit.
        TypeError: for dtypes or types that do not fit.
        RuntimeError: for a backend that cannot run, and for a second derivative of a kernel.
    """
    stages = _stages(features, head)
    check_dense(params, "params")
    dtype = torch.float64 if params.dtype == torch.float64 else torch.float32
    if stage_state is None:
        stage_state = params.new_zeros(0, params.numel(), dtype=dtype)
    if task_inputs is None:
        task_inputs = params.new_zeros(1, 0, dtype=dtype)
    _check(params, grads, state, stage_state, task_inputs, weights, stages)
    unserved = None
    if (features, head) not in COMPILED:
        unserved = {"cpp": f"the kernels are not compiled for features {features!r} with head {head!r}"}
    kernel = step.choose(backend, params.device, unserved)
    if kernel is None:
        repeated = task_inputs.repeat_interleave(params.numel() // max(len(task_inputs), 1), 0).T
        device = params.device.type
        # The reference ignores autocast, as the kernels do.
        available = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if available else nullcontext():
            new_params, h, c, new_stage_state = reference.staged_step(
                *(params.reshape(-1), grads.reshape(-1), *unpack_state(state), stage_state, repeated, weights),
                *(*stages, features_scale, head_scale),
            )
        return new_params.view(params.shape), pack_state(h, c), new_stage_state
    options = (list(reference.FEATURES).index(features), list(reference.HEADS).index(head), features_scale, head_scale)
    new_params, new_state, new_stage_state = kernel.call(
        (params, grads, state.data, stage_state, task_inputs, weights, *options, 0)
    )
    return new_params, LSTMState(new_state, state.num_coordinates), new_stage_state


def _stages(features: str, head: str) -> tuple[reference.FeaturesStage, reference.HeadStage]:
    for name, value, known in (("features", features, reference.FEATURES), ("head", head, reference.HEADS)):
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return reference.FEATURES[features], reference.HEADS[head]


def _check(
    params: Tensor,
    grads: Tensor,
    state: LSTMState,
    stage_state: Tensor,
    task_inputs: Tensor,
    weights: Sequence[Tensor],
    stages: tuple[reference.FeaturesStage, reference.HeadStage],
) -> None:
    """Check the tensors as csrc/lstm_step/arguments.h does."""
    first, last = stages
    floating = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    check_type(params.dtype in floating, "params must be float32, bfloat16, float16 or float64, got ", params.dtype)
    check_dense(grads, "grads")
    check_like(grads, "grads", params, "params")
    check_layout(state)
    n, hidden, layers, dtype = params.numel(), state.hidden_size, state.num_layers, state.compute_dtype
    check_value(
        state.num_coordinates == n,
        "state must hold as many coordinates as params, ",
        n,
        ", got ",
        state.num_coordinates,
    )
    named = [
        ("state", state.data, tuple(state.data.shape)),
        ("stage_state", stage_state, (first.states + last.states, n)),
    ]
    check_dense(task_inputs, "task_inputs")
    tasks = task_inputs.shape[0] if task_inputs.dim() else 0
    named.append(("task_inputs", task_inputs, (tasks, first.task_inputs + last.task_inputs)))
    shapes = [(4 * hidden, hidden), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)] * layers
    shapes[0] = (4 * hidden, first.inputs)
    shapes += [(last.outputs, hidden), (last.outputs,), *((s.weights,) for s in stages if s.weights)]
    check_value(len(weights) == len(shapes), "weights must hold ", len(shapes), " tensors, got ", len(weights))
    named += [(f"weights[{i}]", w, shape) for i, (w, shape) in enumerate(zip(weights, shapes, strict=True))]
    for name, x, shape in named:
        check_dense(x, name)
        check_shape(x, name, shape)
        check_dtype(x, name, torch.float64 if params.dtype == torch.float64 else dtype)
        check_same_device(x, name, params, "params")
    divides = n % tasks == 0 if tasks else n == 0
    check_value(
        divides,
        "task_inputs must have a row for each task, all of equal size: got ",
        tasks,
        " rows for ",
        n,
        " coordinates",
    )
