# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM108
"""Device functions shared by all operators: arithmetic dtype, host scalars, products, elementary functions."""

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


@triton.jit
def scalar(number, number_low, like):
    """A host scalar in the dtype of ``like``, from the upper and lower half of its float64 bits.

    A float argument would be float32 in eager mode and float64 under torch.compile.
    """
    low = tl.cast(tl.cast(number_low, tl.int32), tl.uint32, bitcast=True).to(tl.int64)
    bits = (tl.cast(number, tl.int64) << 32) | low
    return bits.to(tl.float64, bitcast=True).to(like.dtype)


# ------------------------------------------------------------------------------------------------------------ products


@triton.jit
def product(a, b):
    """A @ b in the arithmetic dtype; float32 by three TF32 products, as FMA products take all registers."""
    if a.dtype == tl.float64:
        result = tl.dot(a, b, input_precision="ieee", out_dtype=tl.float64)
    else:
        result = tl.dot(a, b, input_precision="tf32x3")
    return result


# ------------------------------------------------------------------------------------------------ elementary functions


@triton.jit
def exp(x):
    """e^x. float32 by the processor's 2^x (relative error 2^-22.5 and |x| 2^-24), which takes two instructions."""
    if x.dtype == tl.float64:
        result = tl.exp(x)
    else:
        result = tl.exp2(x * 1.4426950408889634)
    return result


@triton.jit
def reciprocal(x):
    """1 / x for x ≥ 1, infinity included. float32 by the square of 1/√x: relative error 3e-7, a third of a division."""
    if x.dtype == tl.float64:
        result = 1 / x
    else:
        root = tl.rsqrt(x)
        result = root * root
    return result


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x); correct limits where the exponential overflows."""
    return reciprocal(1 + exp(-x))


@triton.jit
def tanh(x):
    """1 - 2 / (e^2|x| + 1), except where this cancels: small arguments keep their relative accuracy.

    float32: x + x³ q(x²) below 0.6, q a least-squares fit at Chebyshev nodes, relative error 4e-9. float64: with
    u = e^2|x| rounded, (u - 1) · 2|x| / log u is e^2|x| - 1 without the rounding error of u.
    """
    size = tl.abs(x)
    u = exp(2 * size)
    if x.dtype == tl.float64:
        expm1 = tl.where(u == 1, 2 * size, (u - 1) * (2 * size) / tl.log(u))
        small = expm1 / (expm1 + 2)
        small = tl.where(x < 0, -small, small)
    else:
        z = x * x
        q = -0.005883233156 * z + 0.020785147324
        q = (q * z - 0.053780399263) * z + 0.133318796754
        q = q * z - 0.333332955837
        small = x + x * (z * q)
    large = 1 - 2 * reciprocal(u + 1)
    return tl.where(size < 0.6, small, tl.where(x < 0, -large, large))


@triton.jit
def log(x):
    """Natural logarithm of a positive finite x, denormal numbers included.

    float32 by 2 atanh((m - 1) / (m + 1)) of the mantissa m in [√½, √2): the processor's own approximation has an
    absolute error near 1, which a small preprocessing scale would magnify.
    """
    if x.dtype == tl.float64:
        result = tl.log(x)
    else:
        denormal = x < 1.17549435e-38
        bits = tl.where(denormal, x * 33554432.0, x).to(tl.int32, bitcast=True)  # times 2^25
        exponent = (bits - 0x3F3504F3) >> 23  # 0x3F3504F3 is √½
        m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
        e = exponent.to(tl.float32) - tl.where(denormal, 25.0, 0.0)
        s = (m - 1) / (m + 1)
        z = s * s
        series = (((2.0 / 9 * z + 2.0 / 7) * z + 2.0 / 5) * z + 2.0 / 3) * z + 2.0
        result = e * 0.6931471805599453 + s * series
    return result
