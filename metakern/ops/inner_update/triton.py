"""inner_update by Triton kernels: launches, and the operator.

Triton kernels take no list of pointers, so every tensor has its own launch; ``clip_norm`` adds one per tensor for
squares, and one for the tasks' factors. Tensors are not concatenated. Results do not depend on the programs' order.

Axis legend: T tasks, K inner steps, ``*shape`` the shape of one parameter tensor of the model. Needs the package
triton, 3.6 or newer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from metakern.ops.core.triton_launch import Config, is_interpreted, launch_in_parts, split
from metakern.ops.inner_update.autograd import update
from metakern.ops.inner_update.triton_kernels import coefficients_kernel, squares_kernel, update_kernel

#: Maximum elements of a program, and its warps.
MAX_BLOCK, NUM_WARPS = 1024, 4


def _config(elements: int) -> Config:
    """Launch configuration for rows of ``elements``: the block is no larger than the row needs."""
    return Config(min(MAX_BLOCK, max(32, triton.next_power_of_2(elements))), NUM_WARPS)


def _coefficients(squares: Any, factors: Any, grads: Sequence[Tensor], clip_norm: float) -> Tensor:
    """Clipping factors [T], float64; ``squares`` and ``factors`` are the kernels, possibly wrapped by wrap_triton."""
    tasks = grads[0].shape[0]
    # Without any elements there is still one sum per task: zero.
    sizes = [g.numel() // tasks if g.numel() else 0 for g in grads]
    counts = [triton.cdiv(size, MAX_BLOCK) for size in sizes]
    sums = grads[0].new_zeros((tasks, max(1, sum(counts))), dtype=torch.float64)
    coefficients = grads[0].new_empty((tasks,), dtype=torch.float64)
    at = 0
    for g, size, count in zip(grads, sizes, counts, strict=True):
        if count:
            config = Config(MAX_BLOCK, NUM_WARPS)
            arguments = (g, sums.view(-1)[at:], size, count, sums.shape[1])
            launch_in_parts(squares, tasks * count, config, *arguments, BLOCK=config.block)
        at += count
    config = _config(sums.shape[1])
    limits = split(clip_norm)
    launch_in_parts(factors, tasks, config, sums, coefficients, sums.shape[1], *limits, BLOCK=config.block)
    return coefficients


def _update(
    kernel: Any,
    params: Tensor,
    grads: Tensor,
    rates: Tensor | None,
    rate: float,
    coefficients: Tensor | None,
    active: Tensor | None,
) -> Tensor:
    """θ' of one tensor; ``rates`` repeat along it."""
    updated = torch.empty_like(params)
    n = params.numel()
    if n == 0:
        return updated
    by_task = coefficients is not None or active is not None
    task_size = n // params.shape[0] if by_task else n
    period = n if rates is None or rates.numel() == 1 else rates.numel()
    row = min(task_size, period)  # one of the two divides the other
    config = _config(row)
    blocks = triton.cdiv(row, config.block)
    unused = params  # placeholder for a tensor that is not read
    launch_in_parts(
        kernel,
        n // row * blocks,
        config,
        *(params, grads, unused if rates is None else rates, updated),
        *(unused if coefficients is None else coefficients, unused if active is None else active),
        *(row, blocks, task_size, period, *split(rate)),
        RATE=0 if rates is None else 1 if rates.numel() == 1 else 2,
        CLIP=coefficients is not None,
        ACTIVE=active is not None,
        BLOCK=config.block,
    )
    return updated


@update.traced_triton_kernel
def inner_update_triton(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    lr: Sequence[Tensor],
    rate: float,
    step: int,
    clip_norm: float | None,
    active: Tensor | None,
) -> list[Tensor]:
    """One gradient step of all tasks: θ' = θ − α ⊙ g for a list of tensors.

    Arguments and result as for :func:`metakern.ops.inner_update.inner_update`, except α: ``lr`` holds one tensor of one
    element for everything, or one tensor per parameter tensor; if it is empty, α is the number ``rate``.
    """
    params, grads = [p.contiguous() for p in params], [g.contiguous() for g in grads]
    shared = len(lr) == 1 and lr[0].numel() == 1
    rates: list[Tensor | None] = [None] * len(params)
    if lr:
        selected = [r if step < 0 or shared else r[step] for r in lr]
        rates = [r.contiguous() for r in (selected * len(params) if shared else selected)]
    coefficients = None
    if clip_norm is not None and params and params[0].shape[0]:
        squares = squares_kernel if is_interpreted() else wrap_triton(squares_kernel)
        factors = coefficients_kernel if is_interpreted() else wrap_triton(coefficients_kernel)
        coefficients = _coefficients(squares, factors, grads, clip_norm)
    tasks = None if active is None else active.contiguous().view(torch.uint8)
    kernel = update_kernel if is_interpreted() else wrap_triton(update_kernel)
    return [_update(kernel, p, g, r, rate, coefficients, tasks) for p, g, r in zip(params, grads, rates, strict=True)]
