# mypy: disable-error-code="no-untyped-def"
"""Sums of programs' partial sums, in float64 and in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float64

from metakern.ops.core.triton_launch import Config, launch

#: Block sizes (rows, columns).
SUM_ROWS, SUM_COLUMNS = 32, 32


def add_rows(partials: Tensor) -> Tensor:
    """Sums [groups, columns] of [groups, rows, columns], in float64."""
    groups, rows, columns = partials.shape
    found = partials.new_empty((groups, columns), dtype=float64)
    column_blocks = triton.cdiv(columns, SUM_COLUMNS)
    arguments = (partials, found, rows, columns, column_blocks)
    launch(sum_kernel, groups * column_blocks, Config(0, 4), *arguments, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS)
    return found


@triton.jit
def sum_kernel(partials, sums, rows, row_length, column_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums [., rows, row_length] over the rows, in float64 and in a fixed order; one program for COLUMNS of a group."""
    program = tl.program_id(0).to(tl.int64)
    group = program // column_blocks
    columns = program % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    partials += group * rows * row_length
    total = tl.zeros([COLUMNS], tl.float64)
    for start in range(0, rows, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (columns < row_length)[None, :]
        values = tl.load(partials + row[:, None] * row_length + columns[None, :], mask=mask, other=0.0)
        total += tl.sum(values.to(tl.float64), axis=0)
    tl.store(sums + group * row_length + columns, total, mask=columns < row_length)
