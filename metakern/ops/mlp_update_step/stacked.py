"""mlp_update_step with weights and decays of every task's own, in one launch without a gradient.

Axis legend: T tasks; the rest as in ``__init__.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metakern.ops.core.define_op import define_op
from metakern.ops.core.stacking import count_copies, kernel_of_copies
from metakern.ops.mlp_update_step import mlp_update_step, reference
from metakern.ops.mlp_update_step.reference import Moments

_LISTS = ", ".join(f"Tensor[] {name}" for name in ("params", "grads", *Moments._fields, "weights"))

stacked = define_op(
    f"mlp_update_step_stacked({_LISTS}, Tensor decays, Tensor rates, Tensor keep, Tensor steps, float exp_mult) -> "
    "(Tensor[], Tensor[], Tensor[], Tensor[], Tensor[])",
    results=("new_params", *(f"new_{name}" for name in Moments._fields)),
    shapes=lambda a: tuple([x.new_empty(x.shape) for x in xs] for xs in (a.params, a.m, a.v, a.r, a.c)),
    reference=reference.mlp_update_step,
)


def mlp_update_step_stacked(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Moments,
    weights: Sequence[Tensor],
    decays: Tensor,
    rates: Tensor,
    keep: Tensor,
    steps: Tensor,
    *,
    exp_mult: float = 1e-3,
    backend: str | None = None,
) -> tuple[list[Tensor], Moments]:
    """:func:`metakern.ops.mlp_update_step` where each of T ≥ 1 tasks has weights [T, *shape] and decays [T, 7].

    On the CPU one launch without a gradient; where a gradient is recorded, under transforms and on a GPU a launch for
    each task. Arguments, results and errors as there.
    """
    lists = [list(xs) for xs in (params, grads, *moments, weights)]
    numbers = (decays, rates, keep, steps)
    kernel = kernel_of_copies(stacked, backend, [*numbers, *(x for xs in lists for x in xs)])
    if kernel is not None:
        new: Any = kernel.call((*lists, *numbers, float(exp_mult)))
        return new[0], Moments(*new[1:])
    tasks = count_copies([*weights, decays], steps.shape[0])
    found = []
    for at in range(tasks):
        own = [[x[at : at + 1] for x in xs] for xs in (params, grads, *moments)]
        of_task = (decays[at], rates[:, at : at + 1], keep[:, at : at + 1], steps[at : at + 1])
        options: dict[str, Any] = {"exp_mult": exp_mult, "backend": backend}
        found.append(mlp_update_step(own[0], own[1], Moments(*own[2:]), [w[at] for w in weights], *of_task, **options))
    lists_of_tasks = [[p, *state] for p, state in found]
    joined = [[torch.cat(parts) for parts in zip(*xs, strict=True)] for xs in zip(*lists_of_tasks, strict=True)]
    return joined[0], Moments(*joined[1:])
