# mypy: disable-error-code="no-untyped-def"
"""Device functions of hrnn_step: features, parameter GRU and readouts of a block of coordinates of one segment.

The formulas are those of :mod:`metakern.ops.hrnn_step.reference`.

Axis legend: B coordinates of a block, n of the segment, H hidden units, HP = H padded to a power of two of at least 16
for ``tl.dot``, 16 columns of features, of which 12 are used. Padded units and columns have zero weights; padded
coordinates are masked where results are stored or summed. The arithmetic dtype is float64 for a float64 state, float32
otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from metakern.ops.core.triton_arithmetic import log, product, sigmoid, tanh

# Keep in step with metakern/ops/hrnn_step/reference.py.
_SQUARE_EPSILON = tl.constexpr(1e-12)
_ROOT_EPSILON = tl.constexpr(1e-16)
_MAX_LOG_RATE = tl.constexpr(33.0)


# ------------------------------------------------------------------------------------------------------ memory access


@triton.jit
def load_row(base, row, lanes, valid, n):
    """One row of a segment's state, [B]; zeros after the last coordinate."""
    return tl.load(base + tl.cast(row, tl.int64) * n + lanes, mask=valid, other=0.0)


@triton.jit
def load_units(base, lanes, valid, n, H: tl.constexpr, HP: tl.constexpr):
    """The first H rows of a segment's state, [B, HP]."""
    units = tl.arange(0, HP)
    offsets = units.to(tl.int64)[None, :] * n + lanes[:, None]
    return tl.load(base + offsets, mask=valid[:, None] & (units < H)[None, :], other=0.0)


@triton.jit
def store_row(base, row, lanes, valid, n, x):
    """Store what :func:`load_row` loads."""
    tl.store(base + tl.cast(row, tl.int64) * n + lanes, x, mask=valid)


@triton.jit
def store_units(base, lanes, valid, n, x, H: tl.constexpr, HP: tl.constexpr):
    """Store what :func:`load_units` loads."""
    units = tl.arange(0, HP)
    offsets = units.to(tl.int64)[None, :] * n + lanes[:, None]
    tl.store(base + offsets, x, mask=valid[:, None] & (units < H)[None, :])


@triton.jit
def load_vector(base, H: tl.constexpr, HP: tl.constexpr):
    """H numbers, [HP]."""
    units = tl.arange(0, HP)
    return tl.load(base + units, mask=units < H, other=0.0)


@triton.jit
def load_weight(
    base, ROW: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr,
):  # fmt: skip
    """Rows ROW to ROW + H and columns START to START + WIDTH of a weight [., 12 + H], as [HP, PADDED]."""
    units, columns = tl.arange(0, HP), tl.arange(0, PADDED)
    offsets = units[:, None] * (12 + H) + columns[None, :] + (ROW * (12 + H) + START)
    return tl.load(base + offsets, mask=(units < H)[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def column(x, index: tl.constexpr):
    """One column of [B, 16], [B]."""
    columns = tl.arange(0, 16)
    return tl.sum(tl.where((columns == index)[None, :], x, 0.0), axis=1)


@triton.jit
def with_column(x, index: tl.constexpr, values):
    """Replace one column of [B, 16]."""
    columns = tl.arange(0, 16)
    return tl.where((columns == index)[None, :], values[:, None], x)


# ----------------------------------------------------------------------------------------------------------- features


@triton.jit
def root(x):
    """√x for a positive x, else x."""
    positive = x > 0
    return tl.where(positive, tl.sqrt(tl.where(positive, x, 1.0)), x)


@triton.jit
def asinh(y):
    """Odd, with a small relative error near zero: log1p(|y| + y² / (1 + √(1 + y²))); NaN where y is not finite."""
    size = tl.abs(y)
    far = size > 1e9
    near = tl.where(far, 1.0, size)
    square = near * near
    t = near + square / (1 + tl.sqrt(1 + square))
    u = 1 + t
    inside = tl.where(u == 1, t, log(u) * (t / tl.where(u == 1, 1.0, u - 1)))  # u - 1 has the rounding error of u
    result = tl.where(far, log(tl.where(far, size, 1.0)) + 0.6931471805599453, inside)
    return tl.where(y < 0, -result, result) + (y - y)


@triton.jit
def scale(g, a, ms, s, decay):
    """One scale: the new moving mean, the new mean square, ĝ and log ms."""
    a = (1 - decay) * g + decay * a
    kept = tl.where(ms == 0, 0.0, s)
    ms = (1 - kept) * (a * a + _SQUARE_EPSILON) + kept * ms
    v = ms + _ROOT_EPSILON
    return a, ms, asinh(a * tl.rsqrt(v)), log(v) + (v - v)


@triton.jit
def features(base, g, lanes, valid, n, mean_rate, H: tl.constexpr, BLOCK: tl.constexpr):
    """The features [B, 16] of a block; a' and ms' at four scales; ℓ, s and d."""
    rate = load_row(base, H + 8, lanes, valid, n)
    s = load_row(base, H + 9, lanes, valid, n)
    d = load_row(base, H + 10, lanes, valid, n)
    d1 = root(d)
    d2 = root(d1)
    a0, m0, g0, l0 = scale(g, load_row(base, H, lanes, valid, n), load_row(base, H + 4, lanes, valid, n), s, d)
    a1, m1, g1, l1 = scale(g, load_row(base, H + 1, lanes, valid, n), load_row(base, H + 5, lanes, valid, n), s, d1)
    a2, m2, g2, l2 = scale(g, load_row(base, H + 2, lanes, valid, n), load_row(base, H + 6, lanes, valid, n), s, d2)
    a3, m3, g3, l3 = scale(
        g, load_row(base, H + 3, lanes, valid, n), load_row(base, H + 7, lanes, valid, n), s, root(d2)
    )
    mean = (l0 + l1 + l2 + l3) * 0.25
    x = tl.zeros([BLOCK, 16], rate.dtype)
    x = with_column(with_column(x, 0, g0), 1, g1)
    x = with_column(with_column(x, 2, g2), 3, g3)
    x = with_column(with_column(with_column(x, 4, g0 * g1), 5, g1 * g2), 6, g2 * g3)
    x = with_column(with_column(x, 7, l0 - mean), 8, l1 - mean)
    x = with_column(with_column(x, 9, l2 - mean), 10, l3 - mean)
    x = with_column(x, 11, rate - mean_rate)
    return x, a0, a1, a2, a3, m0, m1, m2, m3, rate, s, d


# ---------------------------------------------------------------------------------------------------- GRU and readouts


@triton.jit
def gru(x, h, bias, gates, candidate, H: tl.constexpr, HP: tl.constexpr):
    """The gates r and u, the candidate c and h', each [B, HP]."""
    r = product(x, tl.trans(load_weight(gates, 0, 0, 12, 16, H, HP)))
    r += product(h, tl.trans(load_weight(gates, 0, 12, H, HP, H, HP)))
    r = sigmoid(r + load_vector(bias, H, HP)[None, :])
    u = product(x, tl.trans(load_weight(gates, H, 0, 12, 16, H, HP)))
    u += product(h, tl.trans(load_weight(gates, H, 12, H, HP, H, HP)))
    u = sigmoid(u + load_vector(bias + H, H, HP)[None, :])
    c = product(x, tl.trans(load_weight(candidate, 0, 0, 12, 16, H, HP)))
    c += product(r * h, tl.trans(load_weight(candidate, 0, 12, H, HP, H, HP)))
    c = tanh(c + load_vector(bias + 2 * H, H, HP)[None, :])
    return r, u, c, u * h + (1 - u) * c


@triton.jit
def readout(readouts, row: tl.constexpr, h, H: tl.constexpr, HP: tl.constexpr):
    """One readout of h, [B]."""
    return tl.sum(h * load_vector(readouts + row * H, H, HP)[None, :], axis=1)


@triton.jit
def direction(x, scales):
    """ĝ · w_s, [B]."""
    columns = tl.arange(0, 16)
    weight = tl.load(scales + columns, mask=columns < 4, other=0.0)
    return tl.sum(x * weight[None, :], axis=1)


@triton.jit
def clipped(raw):
    """Clip to ±33; NaN where it is not finite."""
    return tl.where(raw > _MAX_LOG_RATE, _MAX_LOG_RATE, tl.where(raw < -_MAX_LOG_RATE, -_MAX_LOG_RATE, raw)) + (
        raw - raw
    )


# ----------------------------------------------------------------------------------------------------------- backward


@triton.jit
def scale_backward(grad_a, grad_ms, grad_scaled, grad_log, g, a, ms, s, decay, new_a, new_ms):
    """Gradients by g, a, ms, s and the decay of one scale, from those of a', ms', ĝ and log ms."""
    zero = ms == 0
    kept = tl.where(zero, 0.0, s)
    v = new_ms + _ROOT_EPSILON
    slope = grad_scaled * tl.rsqrt(v + new_a * new_a)  # of a: 1 / √v · 1 / √(1 + a²/v)
    grad_ms += (grad_log - 0.5 * slope * new_a) / v
    grad_a += slope + grad_ms * (2 * (1 - kept)) * new_a
    by_s = tl.where(zero, 0.0, grad_ms * (ms - (new_a * new_a + _SQUARE_EPSILON)))
    return (1 - decay) * grad_a, decay * grad_a, kept * grad_ms, by_s, grad_a * (a - g)


@triton.jit
def root_backward(grad, root):
    """Gradient by x of √x, from its value; zero at zero."""
    positive = root > 0
    return tl.where(positive, 0.5 * grad / tl.where(positive, root, 1.0), 0.0)
