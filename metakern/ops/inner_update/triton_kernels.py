# mypy: disable-error-code="no-untyped-def"
"""Kernels of inner_update: sums of squared gradients, the tasks' factors, and one tensor's update.

θ' = θ − α ⊙ (c g), c = min(1, clip_norm / ‖g‖). Axis legend: T tasks; a row belongs to one task and one period of α.
A host scalar is passed in two arguments, see :func:`metakern.ops.core.triton_arithmetic.scalar`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from metakern.ops.core.triton_arithmetic import scalar, to_arithmetic


@triton.jit(do_not_specialize=("rate", "rate_low", "first_program"))
def update_kernel(
    old_params, grads, rates, updated, coefficients, active,
    row, blocks, task_size, rate_period, rate, rate_low, first_program,
    RATE: tl.constexpr, CLIP: tl.constexpr, ACTIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program updates BLOCK elements of a row; RATE: α is a number (0), one element (1) or one for each (2)."""
    program = first_program + tl.program_id(0).to(tl.int64)
    first = program // blocks * row
    lanes = program % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = lanes < row
    at = first + lanes
    theta = tl.load(old_params + at, mask=valid, other=0.0)
    g = to_arithmetic(tl.load(grads + at, mask=valid, other=0.0))
    if CLIP:
        g *= tl.load(coefficients + first // task_size).to(g.dtype)
    if RATE == 0:
        step = scalar(rate, rate_low, g) * g
    elif RATE == 1:
        step = tl.load(rates).to(g.dtype) * g
    else:
        step = tl.load(rates + first % rate_period + lanes, mask=valid, other=0.0).to(g.dtype) * g
    new = (to_arithmetic(theta) - step).to(theta.dtype)
    if ACTIVE:
        new = tl.where(tl.load(active + first // task_size) != 0, new, theta)
    tl.store(updated + at, new, mask=valid)


@triton.jit(do_not_specialize=("first_program",))
def squares_kernel(grads, sums, task_size, blocks, row_length, first_program, BLOCK: tl.constexpr):
    """One program sums the squares of BLOCK elements of one task, in float64, which holds every square of a float32."""
    program = first_program + tl.program_id(0).to(tl.int64)
    task = program // blocks
    block = program % blocks
    lanes = block * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(grads + task * task_size + lanes, mask=lanes < task_size, other=0.0).to(tl.float64)
    tl.store(sums + task * row_length + block, tl.sum(g * g, axis=0))


@triton.jit(do_not_specialize=("clip_norm", "clip_norm_low", "first_program"))
def coefficients_kernel(sums, coefficients, row_length, clip_norm, clip_norm_low, first_program, BLOCK: tl.constexpr):
    """One program adds the sums of one task and computes its clipping factor."""
    task = first_program + tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, row_length, BLOCK):
        total += tl.load(sums + task * row_length + start + lanes, mask=start + lanes < row_length, other=0.0)
    squares = tl.sum(total, axis=0)
    clip = scalar(clip_norm, clip_norm_low, squares)
    short = squares <= clip * clip  # false for NaN
    tl.store(coefficients + task, tl.where(short, 1.0, clip / tl.sqrt(tl.where(short, 1.0, squares))))
