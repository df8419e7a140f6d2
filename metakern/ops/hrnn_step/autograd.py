"""The operators hrnn_step and hrnn_step_backward: gradient formula and batching rule.

Axis legend: M tensors, T tasks, n coordinates of a segment, H hidden units, R = 11 + H rows; see reference.py.
"""

from __future__ import annotations

from typing import Any

from metakern.ops.core.batching import Batch, looped
from metakern.ops.core.define_op import Gradient, define_op
from metakern.ops.core.functions import Backward
from metakern.ops.hrnn_step import reference

_BACKENDS: dict[str, Any] = {"backends": ("cpp", "triton"), "triton": "metakern.ops.hrnn_step.triton"}

_SEGMENTS = "Tensor biases, Tensor mean_rate, Tensor[] weights"


def _gradients(backward: Backward) -> dict[str, Any]:
    """The new params and the attended points are params minus something that does not depend on them."""
    a, results, grads = backward.arguments, backward.results, backward.grads
    grad_attended = list(grads.attended)
    found = backward.call(
        step_backward,
        *(list(grads.new_params), list(grads.new_states), grads.means, grad_attended),
        *(a.grads, a.states, results.steps, results.rms, a.biases, a.mean_rate, a.weights),
    )
    grad_params = list(grads.new_params)
    if grad_attended and "params" in backward.wants:
        grad_params = [x + y for x, y in zip(grad_params, grad_attended, strict=True)]
    names = ("grads", "states", "biases", "mean_rate", "weights")
    return {"params": grad_params, **dict(zip(names, found, strict=True))}


def _shapes(a: Any) -> tuple[Any, ...]:
    hidden, attention = a.biases.shape[-1] // 3, a.weights[2].shape[0] == len(reference.READOUTS)
    segments = a.biases.shape[:2]
    return (
        [p.new_empty(p.shape) for p in a.params],
        [x.new_empty(x.shape) for x in a.states],
        a.biases.new_empty(*segments, hidden + reference.FEATURES + 1),
        [p.new_empty(p.shape) for p in a.params] if attention else [],
        [x.new_empty(x.shape[0], 1 + attention, x.shape[2]) for x in a.states],
        a.biases.new_empty(*segments, 1 + attention),
    )


def _batched(batch: Batch) -> tuple[Any, Any]:
    """The batch becomes more tasks, unless the weights are batched."""
    if batch.has_axis("weights"):
        return looped(batch)
    batch.check_not_empty()
    mean_rate = batch.leading("mean_rate")
    tasks = tuple(mean_rate.shape)
    lists = {name: [x.flatten(0, 1) for x in batch.leading(name)] for name in ("params", "grads", "states")}
    biases = batch.leading("biases").movedim(0, 1).flatten(1, 2)  # [M, B T, 3H]
    new = batch.call(*batch.arguments._replace(**lists, biases=biases, mean_rate=mean_rate.flatten()))
    split = [[x.unflatten(0, tasks) for x in xs] if isinstance(xs, list) else xs.unflatten(1, tasks) for xs in new]
    return split, [[0] * len(xs) if isinstance(xs, list) else 1 for xs in new]


step_backward = define_op(
    "hrnn_step_backward(Tensor[] grad_new_params, Tensor[] grad_new_states, Tensor grad_means, "
    "Tensor[] grad_attended, Tensor[] grads, Tensor[] states, Tensor[] steps, Tensor rms, "
    f"{_SEGMENTS}) -> (Tensor[], Tensor[], Tensor, Tensor, Tensor[])",
    results=("grad_grads", "grad_states", "grad_biases", "grad_mean_rate", "grad_weights"),
    shapes=lambda a: (
        [g.new_empty(g.shape) for g in a.grads],
        [x.new_empty(x.shape) for x in a.states],
        a.biases.new_empty(a.biases.shape),
        a.mean_rate.new_empty(a.mean_rate.shape),
        [w.new_empty(w.shape) for w in a.weights],
    ),
    family="hrnn_step",
    way_out="backend='reference' does (a second derivative of the optimizee needs none: it flows through `grads`)",
    **_BACKENDS,
)

step = define_op(
    f"hrnn_step(Tensor[] params, Tensor[] grads, Tensor[] states, {_SEGMENTS}) -> "
    "(Tensor[], Tensor[], Tensor, Tensor[], Tensor[], Tensor)",
    results=("new_params", "new_states", "means", "attended", "steps", "rms"),
    shapes=_shapes,
    gradient=Gradient(
        _gradients,
        of=("params", "grads", "states", "biases", "mean_rate", "weights"),
        saves=("grads", "states", "biases", "mean_rate", "weights", "steps", "rms"),
        private=("steps", "rms"),
    ),
    batching=_batched,
    reference=reference.hrnn_step,
    **_BACKENDS,
)
