# mypy: disable-error-code="no-untyped-def"
"""Kernels of mlp_update_step: moments, update, and backward's network and coordinates.

A segment (one tensor of one task) is cut into chunks of blocks, by its size alone. Forward writes the new moments and
one row of sums of squared features a chunk (:func:`moments_kernel`); triton_sums.py adds the rows of a segment in a
fixed order; :func:`update_kernel` runs the network. With y = x·norm the normalised features and dy their gradients,

    dx = norm·dy − x·norm²·mean(dy·y)

Backward recomputes the network and writes norm·dy and the sums (:func:`network_kernel`). :func:`coordinates_kernel`
then subtracts the term with the mean, and writes the gradients of a coordinate's own numbers and what is to be summed
over its row and its column.

Axis legend: as in triton_features.py and triton_network.py. Tensors are those of one entry of the operator's lists.
"""

from __future__ import annotations

import triton
import triton.language as tl

from metakern.ops.core.triton_arithmetic import exp, product, scalar, to_arithmetic
from metakern.ops.mlp_update_step import triton_features as features
from metakern.ops.mlp_update_step import triton_network as network

_FULL = tl.constexpr(0)


@triton.jit
def moments_kernel(
    grads, old_params, m, v, r, c, row_factors, column_factors, decays, new_m, new_v, new_r, partials,
    n, rows, columns, span, inner, middle, joint, blocks, blocks_per_chunk, chunks, first_program,
    KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The new moments of a chunk, and its sums of squared features, in the order of a matrix's columns.

    r and c are the new ones, except with one axis: then r is the old V.
    """
    item = tl.program_id(0).to(tl.int64) + first_program
    task, chunk = item // chunks, item % chunks
    n, rows, columns = tl.cast(n, tl.int64), tl.cast(rows, tl.int64), tl.cast(columns, tl.int64)
    grads += task * n
    old_params += task * n
    m += task * 3 * n
    v += task * n
    new_m += task * 3 * n
    new_v += task * n
    r += task * 3 * rows
    row_factors += task * 3 * rows
    c += task * 3 * columns
    column_factors += task * 3 * columns
    s0, s1, s2, s3 = (tl.zeros([BLOCK, 4], partials.dtype.element_ty),) * 4
    s4, s5, s6, s7 = (tl.zeros([BLOCK, 4], partials.dtype.element_ty),) * 4
    for block in range(chunk * blocks_per_chunk, tl.minimum((chunk + 1) * blocks_per_chunk, blocks)):
        lanes = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        valid = lanes < n
        g, theta, now_m, now_v = features.load_old(grads, old_params, m, v, lanes, valid, n)
        now_m, now_v = features.new_moments(g, now_m, now_v, decays)
        features.store_lanes(new_m, n, lanes, valid, now_m)
        tl.store(new_v + lanes, now_v, mask=valid)
        row, column, _, _, of_g, of_m = features.load_factors(
            r, c, row_factors, column_factors, lanes, valid, n, rows, columns, span, inner, middle, joint, KIND, WIDE
        )
        if KIND == _FULL:
            decay = features.load_decays(decays, 4)
            row = decay[None, :] * row + (1 - decay)[None, :] * (g * g + 1e-30)[:, None]
            features.store_lanes(new_r + task * 3 * n, n, lanes, valid, row)
            column = row
            of_g, of_m = features.full_factors(row)
        x0, x1, x2, x3, x4, x5, x6, x7 = features.groups(g, theta, now_m, now_v, row, column, of_g, of_m, valid)
        s0 += x0 * x0
        s1 += x1 * x1
        s2 += x2 * x2
        s3 += x3 * x3
        s4 += x4 * x4
        s5 += x5 * x5
        s6 += x6 * x6
        s7 += x7 * x7
    at = partials + item * 32 + 8 * tl.arange(0, 4)
    tl.store(at, tl.sum(s0, axis=0))
    tl.store(at + 1, tl.sum(s1, axis=0))
    tl.store(at + 2, tl.sum(s2, axis=0))
    tl.store(at + 3, tl.sum(s3, axis=0))
    tl.store(at + 4, tl.sum(s4, axis=0))
    tl.store(at + 5, tl.sum(s5, axis=0))
    tl.store(at + 6, tl.sum(s6, axis=0))
    tl.store(at + 7, tl.sum(s7, axis=0))


@triton.jit
def update_kernel(
    grads, old_params, new_m, new_v, new_r, new_c, row_factors, column_factors, norms, weights, biases, rates, keeps,
    new_params, n, rows, columns, span, inner, middle, joint, blocks, exp_mult, exp_mult_low, first_program,
    KIND: tl.constexpr, WIDE: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The new params of one block, from the new moments."""
    item = tl.program_id(0).to(tl.int64) + first_program
    task = item // blocks
    n, rows, columns = tl.cast(n, tl.int64), tl.cast(rows, tl.int64), tl.cast(columns, tl.int64)
    lanes = item % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = lanes < n
    g, theta, m, v = features.load_old(
        grads + task * n, old_params + task * n, new_m + task * 3 * n, new_v + task * n, lanes, valid, n
    )
    r, c, _, _, of_g, of_m = features.load_factors(
        new_r + task * 3 * rows, new_c + task * 3 * columns, row_factors + task * 3 * rows,
        column_factors + task * 3 * columns, lanes, valid, n, rows, columns, span, inner, middle, joint, KIND, WIDE,
    )  # fmt: skip
    x0, x1, x2, x3, x4, x5, x6, x7 = features.groups(g, theta, m, v, r, c, of_g, of_m, valid)
    x = features.matrix(x0, x1, x2, x3, x4, x5, x6, x7, BLOCK) * features.load_norms(norms + task * 28)[None, :]
    _, _, _, h = network.hidden_units(x, weights, biases + task * W, W, WP, L)
    direction, _ = network.output(weights, 0, h, W, WP, L)
    magnitude, _ = network.output(weights, 1, h, W, WP, L)
    step = direction * exp(scalar(exp_mult, exp_mult_low, direction) * magnitude)
    new = tl.load(keeps + task) * theta - tl.load(rates + task) * step
    tl.store(new_params + task * n + lanes, new.to(new_params.dtype.element_ty), mask=valid)


# ------------------------------------------------------------------------------------------------------------- backward


@triton.jit
def _old_block(
    grads, old_params, m, v, new_r, new_c, row_factors, column_factors, decays, task, lanes, valid,
    n, rows, columns, span, inner, middle, joint, KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block's g, params, old and new moments and factors, and its features before they are normalised.

    From the old moments and the new factors.
    """
    g, theta, old_m, old_v = features.load_old(
        grads + task * n, old_params + task * n, m + task * 3 * n, v + task * n, lanes, valid, n
    )
    now_m, now_v = features.new_moments(g, old_m, old_v, decays)
    row, column, row_factor, column_factor, of_g, of_m = features.load_factors(
        new_r + task * 3 * rows, new_c + task * 3 * columns, row_factors + task * 3 * rows,
        column_factors + task * 3 * columns, lanes, valid, n, rows, columns, span, inner, middle, joint, KIND, WIDE,
    )  # fmt: skip
    x0, x1, x2, x3, x4, x5, x6, x7 = features.groups(g, theta, now_m, now_v, row, column, of_g, of_m, valid)
    x = features.matrix(x0, x1, x2, x3, x4, x5, x6, x7, BLOCK)
    return g, theta, old_m, old_v, now_m, now_v, row, column, row_factor, column_factor, of_g, of_m, x


@triton.jit
def _store_chunk(row, by_norm, by_rate, by_keep, by_bias, WP: tl.constexpr):
    """A chunk's row of partials of :func:`network_kernel`."""
    inputs = tl.arange(0, 32)
    tl.store(row + inputs, tl.sum(by_norm, axis=0))
    tl.store(row + 32, tl.sum(by_rate))
    tl.store(row + 33, tl.sum(by_keep))
    tl.store(row + 34 + tl.arange(0, WP), tl.sum(by_bias, axis=0))


@triton.jit
def network_kernel(
    grad_new_params, grads, old_params, m, v, new_r, new_c, row_factors, column_factors, decays, norms, weights, biases,
    rates, keeps, by_features, partials, weight_partials,
    n, rows, columns, span, inner, middle, joint, blocks, blocks_per_chunk, chunks, items, items_per_program,
    exp_mult, exp_mult_low,
    KIND: tl.constexpr, WIDE: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """norm·dy of the coordinates of some chunks, one after another: by_features [T, n, 32].

    A chunk's row of partials: sums of dy·y (32), the gradients of the rate and of `keep`, and those of the first bias
    (WP). A program's row of weight_partials: those of the first layer's weights (WP × 32), of the others' (WP × WP
    each), of their biases (WP each), of the outputs' weights (WP each) and of their biases.
    """
    program = tl.program_id(0).to(tl.int64)
    n, rows, columns = tl.cast(n, tl.int64), tl.cast(rows, tl.int64), tl.cast(columns, tl.int64)
    inputs = tl.arange(0, 32)
    first = tl.zeros([WP, 32], partials.dtype.element_ty)
    w1, w2, w3 = (tl.zeros([WP, WP], partials.dtype.element_ty),) * 3
    b1, b2, b3 = (tl.zeros([BLOCK, WP], partials.dtype.element_ty),) * 3
    of_direction, of_magnitude = (tl.zeros([BLOCK, WP], partials.dtype.element_ty),) * 2
    by_direction, by_magnitude = (tl.zeros([BLOCK], partials.dtype.element_ty),) * 2
    for item in range(program * items_per_program, tl.minimum((program + 1) * items_per_program, items)):
        task, chunk = tl.cast(item, tl.int64) // chunks, item % chunks
        by_norm = tl.zeros([BLOCK, 32], partials.dtype.element_ty)
        by_bias = tl.zeros([BLOCK, WP], partials.dtype.element_ty)
        by_rate, by_keep = (tl.zeros([BLOCK], partials.dtype.element_ty),) * 2
        norm = features.load_norms(norms + task * 28)
        rate = tl.load(rates + task)
        for block in range(chunk * blocks_per_chunk, tl.minimum((chunk + 1) * blocks_per_chunk, blocks)):
            lanes = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            valid = lanes < n
            _, theta, _, _, _, _, _, _, _, _, _, _, x = _old_block(
                grads, old_params, m, v, new_r, new_c, row_factors, column_factors, decays, task, lanes, valid,
                n, rows, columns, span, inner, middle, joint, KIND, WIDE, BLOCK,
            )  # fmt: skip
            x *= norm[None, :]
            h1, h2, h3, h4 = network.hidden_units(x, weights, biases + task * W, W, WP, L)
            above = to_arithmetic(tl.load(grad_new_params + task * n + lanes, mask=valid, other=0.0))
            by_sum, of_d, of_s, scaled, direction = network.outputs_backward(
                above, valid, h4, rate, exp_mult, exp_mult_low, weights, W, WP, L
            )
            by_rate -= scaled * direction
            by_keep += above * theta
            of_direction += of_d[:, None] * h4
            of_magnitude += of_s[:, None] * h4
            by_direction += of_d
            by_magnitude += of_s
            by_sum, w1, b1, w2, b2, w3, b3 = network.hidden_backward(
                by_sum, h1, h2, h3, w1, b1, w2, b2, w3, b3, weights, W, WP, L
            )
            first += product(tl.trans(by_sum), x)
            by_bias += by_sum
            by_y = product(by_sum, network.load_first(weights, W, WP))
            by_norm += by_y * x
            at = by_features + ((task * n + lanes) * 32)[:, None] + inputs[None, :]
            tl.store(at, by_y * norm[None, :], mask=valid[:, None])
        _store_chunk(partials + tl.cast(item, tl.int64) * (34 + WP), by_norm, by_rate, by_keep, by_bias, WP)
    row = weight_partials + program * (32 * WP + (L - 1) * (WP * WP + WP) + 2 * WP + 2)
    network.store_layers(row, first, w1, b1, w2, b2, w3, b3, WP, L)
    row += 32 * WP + (L - 1) * (WP * WP + WP)
    network.store_outputs(row, of_direction, of_magnitude, by_direction, by_magnitude, WP)


@triton.jit
def _store_by_factors(base, by_both, by_r, by_c, row_factor, column, column_factor, lanes, valid, n):
    """What a block adds to the gradients of R, of r but through R, and of c."""
    features.store_lanes(base, n, lanes, valid, by_both * column_factor)
    features.store_lanes(base + 3 * n, n, lanes, valid, by_r)
    by_c += by_both * row_factor * features.safe_slope(column, column_factor)
    features.store_lanes(base + 6 * n, n, lanes, valid, by_c)


@triton.jit
def coordinates_kernel(
    by_features, slopes, grad_new_params, grad_new_m, grad_new_v, grad_new_r,
    grads, old_params, m, v, r, new_r, new_c, row_factors, column_factors, decays, keeps,
    grad_params, grad_grads, grad_m, grad_v, grad_r, by_factors, partials,
    n, rows, columns, span, inner, middle, joint, blocks, blocks_per_chunk, chunks, first_program,
    KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's params, m, v and V; slopes [T, 32] are norm²·mean(dy·y).

    With one axis, grad_grads is finished and by_factors unused. Else grad_grads misses what comes through r and c, and
    by_factors [T, 9, n] has what a coordinate adds to the gradients of R, of r but through R, and of c. A chunk's row
    of partials: gradients of the decays of m, of v, and of V (3), then one unused number.
    """
    item = tl.program_id(0).to(tl.int64) + first_program
    task, chunk = item // chunks, item % chunks
    n, rows, columns = tl.cast(n, tl.int64), tl.cast(rows, tl.int64), tl.cast(columns, tl.int64)
    inputs, k = tl.arange(0, 32), tl.arange(0, 4)
    slope = tl.load(slopes + task * 32 + inputs)
    keep = tl.load(keeps + task)
    decay_m, decay_v, decay_r = features.load_decays(decays, 0), tl.load(decays + 3), features.load_decays(decays, 4)
    of_moments, of_full = (tl.zeros([BLOCK, 4], partials.dtype.element_ty),) * 2
    for block in range(chunk * blocks_per_chunk, tl.minimum((chunk + 1) * blocks_per_chunk, blocks)):
        lanes = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        valid = lanes < n
        g, _, old_m, old_v, now_m, now_v, row, column, row_factor, column_factor, of_g, of_m, x = _old_block(
            grads, old_params, m, v, new_r, new_c, row_factors, column_factors, decays, task, lanes, valid,
            n, rows, columns, span, inner, middle, joint, KIND, WIDE, BLOCK,
        )  # fmt: skip
        at = by_features + ((task * n + lanes) * 32)[:, None] + inputs[None, :]
        d = tl.load(at, mask=valid[:, None], other=0.0) - x * slope[None, :]
        d0, d1, d2, d3, d4, d5, d6, d7 = features.split_groups(d, BLOCK)
        by_g, by_theta, by_m, by_v, by_r, by_c, by_of_g, by_of_m = features.features_backward(
            g, now_m, now_v, row, column, of_g, of_m, d0, d1, d2, d3, d4, d5, d6, d7
        )

        above = to_arithmetic(tl.load(grad_new_params + task * n + lanes, mask=valid, other=0.0))
        by_theta += keep * above
        tl.store(grad_params + task * n + lanes, by_theta.to(grad_params.dtype.element_ty), mask=valid)
        by_m += features.load_lanes(grad_new_m + task * 3 * n, n, lanes, valid)
        by_v += tl.load(grad_new_v + task * n + lanes, mask=valid, other=0.0)
        features.store_lanes(grad_m + task * 3 * n, n, lanes, valid, by_m * decay_m[None, :])
        tl.store(grad_v + task * n + lanes, by_v * decay_v, mask=valid)
        by_decays = features.with_last(by_m * (old_m - g[:, None]), by_v * (old_v - g * g))
        of_moments += tl.where(valid[:, None], by_decays, 0.0)
        by_g += features.sum_of_three(by_m * (1 - decay_m)[None, :])
        by_square = by_v * (1 - decay_v)
        if KIND == _FULL:
            by_r += by_c + by_of_g * features.safe_slope(row + 1e-9, of_g) - 0.5 * by_of_m * (of_m * of_m * of_m)
            by_r += features.load_lanes(grad_new_r + task * 3 * n, n, lanes, valid)
            features.store_lanes(grad_r + task * 3 * n, n, lanes, valid, by_r * decay_r[None, :])
            old = features.load_lanes(r + task * 3 * n, n, lanes, valid)
            of_full += tl.where(valid[:, None], by_r * (old - (g * g + 1e-30)[:, None]), 0.0)
            by_square += features.sum_of_three(by_r * (1 - decay_r)[None, :])
        else:
            _store_by_factors(
                by_factors + task * 9 * n, by_of_g + by_of_m, by_r, by_c, row_factor, column, column_factor,
                lanes, valid, n,
            )  # fmt: skip
        by_g += 2 * by_square * g
        tl.store(grad_grads + task * n + lanes, by_g.to(grad_grads.dtype.element_ty), mask=valid)
    row = partials + item * 8 + k
    tl.store(row, tl.sum(of_moments, axis=0))
    tl.store(row + 4, tl.sum(of_full, axis=0))
