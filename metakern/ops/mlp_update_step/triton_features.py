# mypy: disable-error-code="no-untyped-def"
"""Device functions of mlp_update_step: places of coordinates in the tables r and c, and the 28 features of a block.

The formulas are those of :mod:`metakern.ops.mlp_update_step.reference`.

Axis legend: B coordinates of a block, n of their segment (one tensor of one task); 4 lanes, of which three are those of
the three decays, and the last holds features of which there is one; 8 groups of features; W hidden units.

As a matrix, the features are [B, 32]: column 8 · lane + group. Groups: m, m·root, g·R·C, r, c, their inverse roots,
m·R·C; the last lane of the first four has g, θ, v and root. The last lane of the other four is zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from metakern.ops.core.triton_arithmetic import to_arithmetic

# Kinds of segments: one axis, whose squared gradients are kept in full; of more axes, whether the largest axis comes
# after the second largest in memory, or before it. Keep in step with triton_factors.py.
_FULL = tl.constexpr(0)
_LARGEST_LAST = tl.constexpr(1)


# --------------------------------------------------------------------------------------------------------------- memory


@triton.jit
def places(lanes, span, inner, middle, joint, KIND: tl.constexpr, WIDE: tl.constexpr):
    """Entries of r and of c that belong to coordinates of a segment, [B] each.

    In memory the segment is [outer, first, middle, second, inner], with the two largest axes first and second.
    ``span`` is second · inner, ``joint`` first · middle. ``WIDE``: whether n takes 64-bit divisions.
    """
    i = lanes if WIDE else lanes.to(tl.int32)
    before = i // span
    rest = i - before * span
    by_second = before * inner + rest % inner  # all but `second`
    by_first = (before // joint * middle + before % middle) * span + rest
    if KIND == _LARGEST_LAST:
        rows, columns = by_second, by_first
    else:
        rows, columns = by_first, by_second
    return rows.to(tl.int64), columns.to(tl.int64)


@triton.jit
def load_lanes(base, row_length, at, valid):
    """Rows 0 to 2 of [3, row_length] at the places ``at``, as [B, 4]; zeros elsewhere."""
    k = tl.arange(0, 4)
    offsets = k.to(tl.int64)[None, :] * row_length + at[:, None]
    return tl.load(base + offsets, mask=valid[:, None] & (k < 3)[None, :], other=0.0)


@triton.jit
def store_lanes(base, row_length, at, valid, x):
    """Store what :func:`load_lanes` loads."""
    k = tl.arange(0, 4)
    offsets = k.to(tl.int64)[None, :] * row_length + at[:, None]
    tl.store(base + offsets, x, mask=valid[:, None] & (k < 3)[None, :])


@triton.jit
def load_decays(decays, START: tl.constexpr):
    """Three decays as [4]; 0 in the last lane."""
    k = tl.arange(0, 4)
    return tl.load(decays + START + k, mask=k < 3, other=0.0)


@triton.jit
def load_old(grads, old_params, m, v, lanes, valid, n):
    """g, θ, m and v of a block, in the arithmetic dtype."""
    g = to_arithmetic(tl.load(grads + lanes, mask=valid, other=0.0))
    theta = to_arithmetic(tl.load(old_params + lanes, mask=valid, other=0.0))
    return g, theta, load_lanes(m, n, lanes, valid), tl.load(v + lanes, mask=valid, other=0.0)


# ------------------------------------------------------------------------------------------------------------- features


@triton.jit
def new_moments(g, m, v, decays):
    """The moving means m and v after this step."""
    of_m, of_v = load_decays(decays, 0), tl.load(decays + 3)
    m = of_m[None, :] * m + (1 - of_m)[None, :] * g[:, None]
    return m, of_v * v + (1 - of_v) * (g * g)


@triton.jit
def full_factors(full):
    """The factors of g and m from V, of a segment with one axis."""
    shifted = full + 1e-9
    return tl.rsqrt(tl.where(shifted < 1e-9, 1e-9, shifted)), tl.rsqrt(full + 1e-6)


@triton.jit
def load_factors(
    r, c, row_factors, column_factors, lanes, valid, n, rows, columns, span, inner, middle, joint,
    KIND: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """r, c, the factors R and C, and those of g and m of a block, [B, 4] each; with one axis r is V, R and C unused."""
    if KIND == _FULL:
        row = load_lanes(r, n, lanes, valid)
        of_g, of_m = full_factors(row)
        column, row_factor, column_factor = row, of_g, of_g
    else:
        at_row, at_column = places(lanes, span, inner, middle, joint, KIND, WIDE)
        row, column = load_lanes(r, rows, at_row, valid), load_lanes(c, columns, at_column, valid)
        row_factor = load_lanes(row_factors, rows, at_row, valid)
        column_factor = load_lanes(column_factors, columns, at_column, valid)
        of_g = row_factor * column_factor
        of_m = of_g
    return row, column, row_factor, column_factor, of_g, of_m


@triton.jit
def with_last(x, last):
    """Replace the last lane of [B, 4] by [B]."""
    return tl.where((tl.arange(0, 4) == 3)[None, :], last[:, None], x)


@triton.jit
def groups(g, theta, m, v, r, c, of_g, of_m, valid):
    """The eight groups of features, [B, 4] each; zeros after the last coordinate."""
    root = tl.rsqrt(v + 1e-6)
    used = valid[:, None] & (tl.arange(0, 4) < 3)[None, :]
    return (
        with_last(m, tl.where(valid, g, 0.0)),
        with_last(m * root[:, None], tl.where(valid, theta, 0.0)),
        with_last(g[:, None] * of_g, tl.where(valid, v, 0.0)),
        with_last(r, tl.where(valid, root, 0.0)),
        tl.where(used, c, 0.0),
        tl.where(used, tl.rsqrt(r + 1e-8), 0.0),
        tl.where(used, tl.rsqrt(c + 1e-8), 0.0),
        tl.where(used, m * of_m, 0.0),
    )


@triton.jit
def matrix(x0, x1, x2, x3, x4, x5, x6, x7, BLOCK: tl.constexpr):
    """The eight groups as a matrix, [B, 32]."""
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    return tl.reshape(tl.join(even, odd), [BLOCK, 32])


@triton.jit
def split_groups(x, BLOCK: tl.constexpr):
    """The eight groups of a matrix."""
    even, odd = tl.split(tl.reshape(x, [BLOCK, 4, 2, 2, 2]))
    low_even, high_even = tl.split(even)
    low_odd, high_odd = tl.split(odd)
    x0, x4 = tl.split(low_even)
    x2, x6 = tl.split(high_even)
    x1, x5 = tl.split(low_odd)
    x3, x7 = tl.split(high_odd)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def feature_numbers():
    """For every column of a matrix, [32]: its feature's number among the network's inputs, and whether it has one."""
    columns = tl.arange(0, 32)
    lane, group = columns // 8, columns % 8
    of_three = tl.where(group < 3, 2 + 4 * group, 4 + 3 * group) + lane
    single = tl.where(group < 2, group, 4 * group - 3)
    return tl.where(lane < 3, of_three, single), (lane < 3) | (group < 4)


@triton.jit
def load_norms(norms):
    """(1e-5 + mean x²)^-½ of every column, [32]; zeros where there is no feature."""
    numbers, used = feature_numbers()
    return tl.load(norms + numbers, mask=used, other=0.0)


# ------------------------------------------------------------------------------------------------------------- gradient


@triton.jit
def last(x):
    """The last lane of [B, 4], [B]."""
    return tl.sum(tl.where((tl.arange(0, 4) == 3)[None, :], x, 0.0), axis=1)


@triton.jit
def sum_of_three(x):
    """The sum of the first three lanes of [B, 4], [B]."""
    return tl.sum(tl.where((tl.arange(0, 4) < 3)[None, :], x, 0.0), axis=1)


@triton.jit
def safe_slope(x, root):
    """The derivative of max(x, 1e-9)^-½, from its value."""
    return tl.where(x < 1e-9, 0.0, -0.5 * root * root * root)


@triton.jit
def features_backward(g, m, v, r, c, of_g, of_m, d0, d1, d2, d3, d4, d5, d6, d7):
    """Gradients by g, θ, m, v, r, c and the factors of g and m, from those of the groups.

    Lanes: those by m, r, c and the factors are [B, 4], and their last lanes hold no number of use.
    """
    root = tl.rsqrt(v + 1e-6)
    by_root = last(d3) + sum_of_three(d1 * m)
    r_root, c_root = tl.rsqrt(r + 1e-8), tl.rsqrt(c + 1e-8)
    return (
        last(d0) + sum_of_three(d2 * of_g),
        last(d1),
        d0 + d1 * root[:, None] + d7 * of_m,
        last(d2) - 0.5 * by_root * (root * root * root),
        d3 - 0.5 * d5 * (r_root * r_root * r_root),
        d4 - 0.5 * d6 * (c_root * c_root * c_root),
        d2 * g[:, None],
        d7 * m,
    )
