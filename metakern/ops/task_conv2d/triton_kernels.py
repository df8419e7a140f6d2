# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of task_conv2d: three implicit matrix products, which read images where they lie.

A program owns BM rows and BN columns of the result of one task. Every kernel's last argument is its first program.

Axis legend: T tasks, S samples, C channels of x, OC channels of y, [H, W] and [HO, WO] their images, [KH, KW] kernel,
[SH, SW] stride, [PH, PW] padding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from metakern.ops.core.triton_arithmetic import product


@triton.jit
def load_image(images, channel, row, column, mask, channels, height, width):
    """Elements of images [channels, height, width], zero outside of them; ``images`` points to each one's sample."""
    mask = mask & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return tl.load(images + (channel * height + row) * width + column, mask=mask, other=0.0)


@triton.jit
def conv_kernel(
    x, weight, bias, y, samples, C, H, W, OC, HO, WO, PH, PW, row_blocks, column_blocks, first_program,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows OC, columns (s, ho, wo), terms (c, kh, kw)."""
    item = tl.program_id(0).to(tl.int64) + first_program
    task = item // (row_blocks * column_blocks)
    rows = item // column_blocks % row_blocks * BM + tl.arange(0, BM)
    columns = item % column_blocks * BN + tl.arange(0, BN)
    pixels = tl.cast(HO, tl.int64) * WO
    inside = columns < samples * pixels
    sample, pixel = columns // pixels, columns % pixels
    top, left = pixel // WO * SH - PH, pixel % WO * SW - PW
    terms = tl.cast(C, tl.int64) * (KH * KW)
    images = x + ((task * samples + sample) * C * H * W)[None, :]
    weights = weight + (task * OC + rows)[:, None] * terms
    sums = tl.zeros([BM, BN], y.dtype.element_ty)
    for first in range(0, terms, BK):
        k = first + tl.arange(0, BK)
        channel, tap = k // (KH * KW), k % (KH * KW)
        a = tl.load(weights + k[None, :], mask=(rows < OC)[:, None] & (k < terms)[None, :], other=0.0)
        row, column = top[None, :] + (tap // KW)[:, None], left[None, :] + (tap % KW)[:, None]
        mask = (k < terms)[:, None] & inside[None, :]
        sums += product(a, load_image(images, channel[:, None], row, column, mask, C, H, W))
    if HAS_BIAS:
        sums += tl.load(bias + task * OC + rows, mask=rows < OC, other=0.0)[:, None]
    to = y + ((task * samples + sample)[None, :] * OC + rows[:, None]) * pixels + pixel[None, :]
    tl.store(to, sums, mask=(rows < OC)[:, None] & inside[None, :])


@triton.jit
def conv_input_kernel(
    grad, weight, grad_x, samples, C, H, W, OC, HO, WO, PH, PW, row_blocks, column_blocks, first_program,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows C, columns (s, h, w), terms (o, kh, kw)."""
    item = tl.program_id(0).to(tl.int64) + first_program
    task = item // (row_blocks * column_blocks)
    rows = item // column_blocks % row_blocks * BM + tl.arange(0, BM)
    columns = item % column_blocks * BN + tl.arange(0, BN)
    pixels = tl.cast(H, tl.int64) * W
    inside = columns < samples * pixels
    sample, pixel = columns // pixels, columns % pixels
    bottom, right = pixel // W + PH, pixel % W + PW
    terms = tl.cast(OC, tl.int64) * (KH * KW)
    images = grad + ((task * samples + sample) * OC * HO * WO)[None, :]
    weight += task * terms * C
    sums = tl.zeros([BM, BN], grad_x.dtype.element_ty)
    for first in range(0, terms, BK):
        k = first + tl.arange(0, BK)
        channel, tap = k // (KH * KW), k % (KH * KW)
        places = (channel[None, :] * C + rows[:, None]) * (KH * KW) + tap[None, :]
        a = tl.load(weight + places, mask=(rows < C)[:, None] & (k < terms)[None, :], other=0.0)
        # Steps from the first row and column of y; those between two of its pixels have no part in it.
        down, across = bottom[None, :] - (tap // KW)[:, None], right[None, :] - (tap % KW)[:, None]
        mask = (k < terms)[:, None] & inside[None, :] & (down >= 0) & (across >= 0)
        mask = mask & (down % SH == 0) & (across % SW == 0)
        sums += product(a, load_image(images, channel[:, None], down // SH, across // SW, mask, OC, HO, WO))
    to = grad_x + ((task * samples + sample)[None, :] * C + rows[:, None]) * pixels + pixel[None, :]
    tl.store(to, sums, mask=(rows < C)[:, None] & inside[None, :])


@triton.jit
def conv_weight_kernel(
    x, grad, grad_weight, grad_bias, samples, C, H, W, OC, HO, WO, PH, PW, splits, split_terms, row_blocks,
    column_blocks, first_program,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows OC, columns (c, kh, kw), terms (s, ho, wo); a program sums split_terms of these into its own part.

    grad_weight [T, splits, OC, columns], grad_bias [T, splits, OC].
    """
    item = tl.program_id(0).to(tl.int64) + first_program
    part = item // (row_blocks * column_blocks)  # of a task
    task = part // splits
    rows = item // column_blocks % row_blocks * BM + tl.arange(0, BM)
    columns = item % column_blocks * BN + tl.arange(0, BN)
    all_columns, pixels = tl.cast(C, tl.int64) * (KH * KW), tl.cast(HO, tl.int64) * WO
    channel, tap = columns // (KH * KW), columns % (KH * KW)
    start = part % splits * split_terms
    stop = tl.minimum(start + split_terms, samples * pixels)
    x += task * samples * C * H * W
    grad += task * samples * OC * pixels
    sums = tl.zeros([BM, BN], grad_weight.dtype.element_ty)
    bias_sums = tl.zeros([BM, BK], grad_weight.dtype.element_ty)
    for first in range(start, stop, BK):
        k = first + tl.arange(0, BK)
        sample, pixel = k // pixels, k % pixels
        above = grad + (sample[None, :] * OC + rows[:, None]) * pixels + pixel[None, :]
        a = tl.load(above, mask=(rows < OC)[:, None] & (k < stop)[None, :], other=0.0)
        row = (pixel // WO * SH - PH)[:, None] + (tap // KW)[None, :]
        column = (pixel % WO * SW - PW)[:, None] + (tap % KW)[None, :]
        mask = (k < stop)[:, None] & (columns < all_columns)[None, :]
        images = x + (sample * C * H * W)[:, None]
        sums += product(a, load_image(images, channel[None, :], row, column, mask, C, H, W))
        bias_sums += a
    to = part * OC + rows
    mask = (rows < OC)[:, None] & (columns < all_columns)[None, :]
    tl.store(grad_weight + to[:, None] * all_columns + columns[None, :], sums, mask=mask)
    if item % column_blocks == 0:
        tl.store(grad_bias + to, tl.sum(bias_sums, axis=1), mask=rows < OC)
