# mypy: disable-error-code="no-untyped-def"
"""Device functions of lstm_step: activations, preprocessing, and one LSTM layer of a block of coordinates.

Formulas (PyTorch's gate order): i, f, o = σ(a), g = tanh(a), a = W_ih x + b_ih + W_hh h + b_hh, c' = f c + i g,
h' = o tanh(c').

Axis legend: B coordinates of a block, F features (1 or 2), H hidden units, HP = H padded to a power of two of at least
16 for ``tl.dot``, K inputs of a layer: H, or F in the lowest. Padded units have zero weights and a zero state, so they
stay zero and add nothing; padded coordinates are masked where results are stored or summed. The arithmetic dtype is
float64 for a float64 state, float32 otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from metakern.ops.core.triton_arithmetic import log, sigmoid, tanh, to_arithmetic

# Keep in step with LOG_AND_CLIP_EPSILON in metakern/ops/lstm_step/reference.py.
_LOG_AND_CLIP_EPSILON = tl.constexpr(1.1920928955078125e-07)
_LANES = tl.constexpr(32)


# ------------------------------------------------------------------------------------------------------ preprocessing


@triton.jit
def features(g, p, exp_p, exp_neg_p, PREPROCESS: tl.constexpr):
    """Both features of gradients [B], each [B]; without preprocessing the second one is zero.

    The term g - g is zero, or NaN for a non-finite gradient, whose coordinate so becomes NaN.
    """
    poison = g - g
    size = tl.abs(g)
    if PREPROCESS == 1:
        large = size >= exp_neg_p
        first = tl.where(large, log(tl.where(large, size, 1.0)) / p, -1.0)
        second = tl.where(large, tl.where(g < 0, -1.0, 1.0), g * exp_p)
    elif PREPROCESS == 2:
        first = log(size + _LOG_AND_CLIP_EPSILON) / p
        first = tl.where(first < -1, -1.0, first)
        second = g * exp_p
        second = tl.where(second > 1, 1.0, tl.where(second < -1, -1.0, second))
    else:
        first = g
        second = poison
    return first + poison, second + poison


@triton.jit
def features_backward(g, grad_first, grad_second, p, exp_p, exp_neg_p, PREPROCESS: tl.constexpr):
    """Gradient by g [B] from the gradients of the features."""
    size = tl.abs(g)
    sign = tl.where(g < 0, -1.0, 1.0)
    if PREPROCESS == 1:
        large = size >= exp_neg_p
        slope = sign / p / tl.where(large, size, 1.0)
        result = tl.where(large, grad_first * slope, grad_second * exp_p)
    elif PREPROCESS == 2:
        shifted = size + _LOG_AND_CLIP_EPSILON
        unclamped = (log(shifted) / p >= -1) & (size > 0)
        bounded = tl.abs(g * exp_p) <= 1
        result = tl.where(unclamped, grad_first * (sign / p / shifted), 0.0)
        result += tl.where(bounded, grad_second * exp_p, 0.0)
    else:
        result = grad_first
    return result


# ------------------------------------------------------------------------------------------------------ memory access


@triton.jit
def load_units(base, lanes, valid, row, H: tl.constexpr, HP: tl.constexpr, TILE: tl.constexpr):
    """Load rows ``row`` to ``row + H`` of a state, [B, HP], in the arithmetic dtype; zeros in the padding."""
    units = tl.arange(0, HP)
    offsets = (lanes // _LANES * TILE + lanes % _LANES)[:, None] + (row + units)[None, :] * _LANES
    x = tl.load(base + offsets, mask=valid[:, None] & (units < H)[None, :], other=0.0)
    return to_arithmetic(x)


@triton.jit
def store_units(base, lanes, valid, inside, row, x, H: tl.constexpr, HP: tl.constexpr, TILE: tl.constexpr):
    """Store what :func:`load_units` loads, with zeros in the lanes after the last coordinate of the last tile."""
    units = tl.arange(0, HP)
    offsets = (lanes // _LANES * TILE + lanes % _LANES)[:, None] + (row + units)[None, :] * _LANES
    x = tl.where(valid[:, None], x, 0.0)
    tl.store(base + offsets, x.to(base.dtype.element_ty), mask=inside[:, None] & (units < H)[None, :])


@triton.jit
def load_rows(base, lanes, valid, rows, real, TILE: tl.constexpr):
    """Load any rows of a tiled tensor, [rows, B]; zero where ``real`` is false."""
    offsets = rows[:, None] * _LANES + (lanes // _LANES * TILE + lanes % _LANES)[None, :]
    return to_arithmetic(tl.load(base + offsets, mask=real[:, None] & valid[None, :], other=0.0))


@triton.jit
def load_vector(base, start, H: tl.constexpr, HP: tl.constexpr):
    """Load H elements of a weight from ``start`` on, [HP]."""
    units = tl.arange(0, HP)
    return tl.load(base + start + units, mask=units < H, other=0.0)


@triton.jit
def gate_rows(H: tl.constexpr, HP: tl.constexpr):
    """Source rows in a weight [4H, …] of the 4 HP rows of its padded form, and a mask of those that are no padding."""
    rows = tl.arange(0, 4 * HP)
    return rows // HP * H + rows % HP, rows % HP < H


@triton.jit
def load_matrix(base, H: tl.constexpr, HP: tl.constexpr, K: tl.constexpr):
    """Load a weight [4H, K] as [4 HP, HP], zero where padded."""
    rows, real = gate_rows(H, HP)
    inputs = tl.arange(0, HP)
    return tl.load(base + rows[:, None] * K + inputs[None, :], mask=real[:, None] & (inputs < K)[None, :], other=0.0)


@triton.jit
def load_gate(base, gate: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, K: tl.constexpr):
    """Load the rows of one gate, [HP, HP]."""
    units = tl.arange(0, HP)
    inputs = tl.arange(0, HP)
    mask = (units < H)[:, None] & (inputs < K)[None, :]
    return tl.load(base + gate * H * K + units[:, None] * K + inputs[None, :], mask=mask, other=0.0)


@triton.jit
def round_to_tf32(x):
    """Round to 11 significant bits, exact in a TF32 product; NaN stays.

    Works on the bits, because the compiler would fuse rounding by an addition and a subtraction.
    """
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """A @ b, accumulated in the arithmetic dtype; PRECISION 0 float32 products, 1 TF32, 2 bfloat16.

    A float32 product consists of three TF32 products, a = a₁ + a₂ with a₁ its first 11 bits; the omitted parts, a₂ b₂
    and the last bit of a₂, are below 2^-21 of the product. FMA products keep both operands in registers, and spilled
    a kilobyte per thread.
    """
    if a.dtype == tl.float64:
        result = tl.dot(a, b, input_precision="ieee", out_dtype=tl.float64)
    elif PRECISION == 2:
        result = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        a1 = round_to_tf32(a)
        b1 = round_to_tf32(b)
        if PRECISION == 1:
            result = tl.dot(a1, b1, input_precision="tf32")
        else:
            result = tl.dot(a - a1, b1, input_precision="tf32")
            result = tl.dot(a1, b - b1, result, input_precision="tf32")
            result = tl.dot(a1, b1, result, input_precision="tf32")
    return result


@triton.jit
def split_gates(a, B: tl.constexpr, HP: tl.constexpr):
    """The gates i, f, g, o, each [B, HP], of [B, 4 HP]; every value stays in the thread that holds it."""
    a = tl.permute(tl.reshape(a, [B, 2, 2, HP]), (0, 3, 1, 2))
    even, odd = tl.split(a)
    i, g = tl.split(even)
    f, o = tl.split(odd)
    return i, f, g, o


@triton.jit
def bias(b_ih, b_hh, gate: tl.constexpr, H: tl.constexpr, HP: tl.constexpr):
    """b_ih + b_hh of one gate, [1, HP]."""
    return (load_vector(b_ih, gate * H, H, HP) + load_vector(b_hh, gate * H, H, HP))[None, :]


@triton.jit
def feature_part(x0, x1, w_ih, gate: tl.constexpr, F: tl.constexpr, H: tl.constexpr, HP: tl.constexpr):
    """W_ih x of one gate, [B, HP], for the features x0 and x1, [B]."""
    units = tl.arange(0, HP)
    column = w_ih + (gate * H + units) * F
    result = x0[:, None] * tl.load(column, mask=units < H, other=0.0)[None, :]
    if F == 2:
        result += x1[:, None] * tl.load(column + 1, mask=units < H, other=0.0)[None, :]
    return result


@triton.jit
def activations(i, f, g, o, c, b_ih, b_hh, H: tl.constexpr, HP: tl.constexpr):
    """Gates i, f, g, o, tanh(c'), c' and h', each [B, HP], from the pre-activations without biases and c."""
    i = sigmoid(i + bias(b_ih, b_hh, 0, H, HP))
    f = sigmoid(f + bias(b_ih, b_hh, 1, H, HP))
    g = tanh(g + bias(b_ih, b_hh, 2, H, HP))
    o = sigmoid(o + bias(b_ih, b_hh, 3, H, HP))
    new_c = f * c + i * g
    t = tanh(new_c)
    return i, f, g, o, t, new_c, o * t


@triton.jit
def lowest_layer(
    x0, x1, h, c, w_ih, w_hh, b_ih, b_hh,
    F: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """:func:`activations` from the features, [B], and h and c [B, HP]. PRECISION applies to the products with h."""
    a = product(h, tl.trans(load_matrix(w_hh, H, HP, H)), PRECISION)
    i, f, g, o = split_gates(a, h.shape[0], HP)
    i += feature_part(x0, x1, w_ih, 0, F, H, HP)
    f += feature_part(x0, x1, w_ih, 1, F, H, HP)
    g += feature_part(x0, x1, w_ih, 2, F, H, HP)
    o += feature_part(x0, x1, w_ih, 3, F, H, HP)
    return activations(i, f, g, o, c, b_ih, b_hh, H, HP)


@triton.jit
def layer(
    x, h, c, w_ih, w_hh, b_ih, b_hh,
    H: tl.constexpr, HP: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """:func:`activations` from x [B, HP], K inputs per coordinate, and h and c [B, HP]."""
    a = product(h, tl.trans(load_matrix(w_hh, H, HP, H)), PRECISION)
    a += product(x, tl.trans(load_matrix(w_ih, H, HP, K)), PRECISION)
    i, f, g, o = split_gates(a, h.shape[0], HP)
    return activations(i, f, g, o, c, b_ih, b_hh, H, HP)


@triton.jit
def activations_backward(i, f, g, o, t, c, grad_h, grad_c):
    """Gradients of the four pre-activations and of c, from those of h' and c'; t is tanh(c')."""
    through = grad_c + grad_h * o * (1 - t * t)
    return (
        through * g * i * (1 - i),
        through * c * f * (1 - f),
        through * i * (1 - g * g),
        grad_h * t * o * (1 - o),
        through * f,
    )


@triton.jit
def gates_product(
    di, df, dg, do, w, H: tl.constexpr, HP: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """Wᵀ da, [B, HP], of a weight [4H, K]; gate by gate, as an operand [B, 4 HP] does not fit the registers."""
    result = product(di, load_gate(w, 0, H, HP, K), 0)
    result += product(df, load_gate(w, 1, H, HP, K), 0)
    result += product(dg, load_gate(w, 2, H, HP, K), 0)
    return result + product(do, load_gate(w, 3, H, HP, K), 0)
