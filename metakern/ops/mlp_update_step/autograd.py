"""The operators mlp_update_step and mlp_update_step_backward: gradient formula and batching rule.

Axis legend: M tensors, T tasks, n coordinates of a segment, W hidden units; see reference.py.
"""

from __future__ import annotations

from typing import Any

from metakern.ops.core.batching import Batch, looped
from metakern.ops.core.define_op import Gradient, define_op
from metakern.ops.mlp_update_step import reference

_BACKENDS: dict[str, Any] = {"backends": ("cpp", "triton"), "triton": "metakern.ops.mlp_update_step.triton"}

_LISTS = ("params", "grads", "m", "v", "r", "c")
_BY_SEGMENT = ("rates", "keep")
_TENSORS = ", ".join(f"Tensor[] {name}" for name in _LISTS)
_REST = "Tensor[] weights, Tensor decays, Tensor rates, Tensor keep, Tensor steps, float exp_mult"
_RESULTS = ("new_params", "new_m", "new_v", "new_r", "new_c")


def _batched(batch: Batch) -> tuple[Any, Any]:
    """The batch becomes more tasks, unless what the tasks share is batched."""
    if batch.has_axis("weights") or batch.has_axis("decays"):
        return looped(batch)
    batch.check_not_empty()
    steps = batch.leading("steps")
    tasks = tuple(steps.shape)
    lists = {name: [x.flatten(0, 1) for x in batch.leading(name)] for name in _LISTS}
    by_segment = {name: batch.leading(name).movedim(0, 1).flatten(1, 2) for name in _BY_SEGMENT}  # [M, B T]
    new = batch.call(*batch.arguments._replace(**lists, **by_segment, steps=steps.flatten()))
    split = [[x.unflatten(0, tasks) for x in xs] if isinstance(xs, list) else xs.unflatten(1, tasks) for xs in new]
    return split, [[0] * len(xs) if isinstance(xs, list) else 1 for xs in new]


def _like(xs: Any) -> list[Any]:
    return [x.new_empty(x.shape) for x in xs]


step_backward = define_op(
    f"mlp_update_step_backward({', '.join(f'Tensor[] grad_{name}' for name in _RESULTS)}, {_TENSORS}, "
    f"Tensor[] new_r, Tensor[] new_c, Tensor norms, {_REST}) -> "
    "(Tensor[], Tensor[], Tensor[], Tensor[], Tensor[], Tensor[], Tensor[], Tensor, Tensor, Tensor)",
    results=tuple(f"grad_{name}" for name in (*_LISTS, "weights", "decays", *_BY_SEGMENT)),
    shapes=lambda a: (
        *(_like(getattr(a, name)) for name in (*_LISTS, "weights")),
        *_like((a.decays, a.rates, a.keep)),
    ),
    family="mlp_update_step",
    way_out="backend='reference' does (a second derivative of the optimizee needs none: it flows through `grads`)",
    **_BACKENDS,
)

step = define_op(
    f"mlp_update_step({_TENSORS}, {_REST}) -> (Tensor[], Tensor[], Tensor[], Tensor[], Tensor[], Tensor)",
    results=(*_RESULTS, "norms"),
    shapes=lambda a: (
        *(_like(getattr(a, name)) for name in ("params", "m", "v", "r", "c")),
        a.rates.new_empty(*a.rates.shape, reference.TENSOR_FEATURES),
    ),
    gradient=Gradient(
        step_backward,  # recomputes all but the new factors and the features' norms
        of=(*_LISTS, "weights", "decays", *_BY_SEGMENT),
        saves=(*_LISTS, "weights", "decays", *_BY_SEGMENT, "steps", "new_r", "new_c", "norms"),
        private=("norms",),
    ),
    batching=_batched,
    reference=reference.mlp_update_step,
    **_BACKENDS,
)
