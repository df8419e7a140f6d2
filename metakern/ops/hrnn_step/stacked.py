"""hrnn_step with weights of every task's own, in one launch without a gradient.

Axis legend: T tasks; the rest as in ``__init__.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metakern.ops.core.define_op import define_op
from metakern.ops.core.stacking import count_copies, kernel_of_copies
from metakern.ops.hrnn_step import COMPILED_HIDDEN, hrnn_step, reference
from metakern.ops.hrnn_step.reference import Step


def _shapes(a: Any) -> tuple[Any, ...]:
    attention = a.weights[2].shape[-2] == len(reference.READOUTS)
    return (
        [p.new_empty(p.shape) for p in a.params],
        [x.new_empty(x.shape) for x in a.states],
        a.biases.new_empty(*a.biases.shape[:2], a.biases.shape[-1] // 3 + reference.FEATURES + 1),
        [p.new_empty(p.shape) for p in a.params] if attention else [],
    )


stacked = define_op(
    "hrnn_step_stacked(Tensor[] params, Tensor[] grads, Tensor[] states, Tensor biases, Tensor mean_rate, "
    "Tensor[] weights) -> (Tensor[], Tensor[], Tensor, Tensor[])",
    results=("new_params", "new_states", "means", "attended"),
    shapes=_shapes,
    reference=reference.hrnn_step,
)


def hrnn_step_stacked(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    biases: Tensor,
    mean_rate: Tensor,
    weights: Sequence[Tensor],
    *,
    backend: str | None = None,
) -> Step:
    """:func:`metakern.ops.hrnn_step` where each of T ≥ 1 tasks has weights of its own, [T, *shape] each.

    On the CPU one launch without a gradient; where a gradient is recorded, under transforms and on a GPU a launch for
    each task. Arguments, results and errors as there.
    """
    kernel = None
    if biases.dim() and biases.shape[-1] == 3 * COMPILED_HIDDEN:
        kernel = kernel_of_copies(stacked, backend, (*params, *grads, *states, biases, mean_rate, *weights))
    if kernel is not None:
        return Step(*kernel.call((list(params), list(grads), list(states), biases, mean_rate, list(weights))))
    tasks = count_copies(weights, mean_rate.shape[0])
    steps = []
    for at in range(tasks):
        of_params, of_grads, of_states = ([x[at : at + 1] for x in xs] for xs in (params, grads, states))
        own, of_task = [w[at] for w in weights], (biases[:, at : at + 1], mean_rate[at : at + 1])
        steps.append(hrnn_step(of_params, of_grads, of_states, *of_task, own, backend=backend))
    lists = zip(*((new.params, new.states, new.attended) for new in steps), strict=True)
    params, states, attended = ([torch.cat(parts) for parts in zip(*xs, strict=True)] for xs in lists)
    return Step(params, states, torch.cat([new.means for new in steps], 1), attended)
