# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM108
"""Device functions of every operator: the dtype of the arithmetic, and numbers of the host in it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_arithmetic(x):
    """float64 stays, everything else becomes float32."""
    if x.dtype == tl.float64:
        result = x
    else:
        result = x.to(tl.float32)
    return result


# ------------------------------------------------------------------------------------------------------------ products


@triton.jit
def scalar(high, low, like):
    """A number of the host in the dtype of ``like``, from the float32 nearest to it and what is left.

    Eager mode passes a float argument as float32, torch.compile as float64: both give the same bits here.
    """
    high = tl.cast(high, tl.float32)
    if like.dtype == tl.float64:
        result = high.to(tl.float64) + tl.cast(low, tl.float32).to(tl.float64)
    else:
        result = high
    return result
