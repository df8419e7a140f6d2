# mypy: disable-error-code="no-untyped-def"
"""Kernels of hrnn_step: forward, update, products and backward.

A segment (one tensor of one task) is cut into chunks of blocks, by its size alone. Forward writes the new state, the
steps before their normalisation and one row of partial sums a chunk; triton_sums.py adds the rows of a segment in a
fixed order, and :func:`update_kernel` normalises. Backward needs Σ grad · step of a segment first
(:func:`products_kernel`), then recomputes the coordinates and writes their gradients, sums for the segments, and sums
for the weights, which the programs carry along their chunks.

Axis legend: as in triton_cell.py; A = 1 with attention, else 0. Tensors are those of one entry of the operator's lists.
"""

from __future__ import annotations

import triton
import triton.language as tl

from metakern.ops.core.triton_arithmetic import exp, product, sigmoid, to_arithmetic
from metakern.ops.hrnn_step import triton_cell as cell


@triton.jit
def forward_kernel(
    grads, state, new_state, steps, partials, biases, mean_rates, gates, candidate, readouts, scales, scalars,
    n, blocks, blocks_per_chunk, chunks, first_program,
    H: tl.constexpr, HP: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program takes one chunk; its row of partials has sums of h' (HP), x (12), ℓ', δ² and δ_a²."""
    item = tl.program_id(0).to(tl.int64) + first_program
    task, chunk = item // chunks, item % chunks
    n = tl.cast(n, tl.int64)
    grads += task * n
    state += task * (H + 11) * n
    new_state += task * (H + 11) * n
    steps += task * (1 + A) * n
    biases += task * (3 * H)
    mean_rate = tl.load(mean_rates + task)
    rate_bias, scale_bias, input_bias = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    offset, kept = tl.load(scalars + 3), sigmoid(tl.load(scalars + 4))
    units, columns = tl.arange(0, HP), tl.arange(0, 16)
    sums_h = tl.zeros([BLOCK, HP], partials.dtype.element_ty)
    sums_x = tl.zeros([BLOCK, 16], partials.dtype.element_ty)
    for block in range(chunk * blocks_per_chunk, tl.minimum((chunk + 1) * blocks_per_chunk, blocks)):
        lanes = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        valid = lanes < n
        g = to_arithmetic(tl.load(grads + lanes, mask=valid, other=0.0))
        x, a0, a1, a2, a3, m0, m1, m2, m3, rate, _, _ = cell.features(state, g, lanes, valid, n, mean_rate, H, BLOCK)
        h = cell.load_units(state, lanes, valid, n, H, HP)
        _, _, _, h = cell.gru(x, h, biases, gates, candidate, H, HP)
        delta = cell.readout(readouts, 0, h, H, HP) + cell.direction(x, scales)
        step_rate = cell.clipped(rate + cell.readout(readouts, 1, h, H, HP) + rate_bias)
        new_rate = kept * rate + (1 - kept) * step_rate
        cell.store_units(new_state, lanes, valid, n, h, H, HP)
        cell.store_row(new_state, H, lanes, valid, n, a0)
        cell.store_row(new_state, H + 1, lanes, valid, n, a1)
        cell.store_row(new_state, H + 2, lanes, valid, n, a2)
        cell.store_row(new_state, H + 3, lanes, valid, n, a3)
        cell.store_row(new_state, H + 4, lanes, valid, n, m0)
        cell.store_row(new_state, H + 5, lanes, valid, n, m1)
        cell.store_row(new_state, H + 6, lanes, valid, n, m2)
        cell.store_row(new_state, H + 7, lanes, valid, n, m3)
        cell.store_row(new_state, H + 8, lanes, valid, n, new_rate)
        scale_decay = sigmoid(cell.readout(readouts, 2, h, H, HP) + scale_bias)
        input_decay = sigmoid(cell.readout(readouts, 3, h, H, HP) + input_bias)
        cell.store_row(new_state, H + 9, lanes, valid, n, scale_decay)
        cell.store_row(new_state, H + 10, lanes, valid, n, input_decay)
        cell.store_row(steps, 0, lanes, valid, n, exp(step_rate + offset) * delta)
        x = cell.with_column(cell.with_column(x, 12, new_rate), 13, delta * delta)
        if A == 1:
            attention = cell.readout(readouts, 4, h, H, HP)
            cell.store_row(steps, 1, lanes, valid, n, exp(step_rate) * attention)
            x = cell.with_column(x, 14, attention * attention)
        sums_h += tl.where(valid[:, None], h, 0.0)
        sums_x += tl.where(valid[:, None], x, 0.0)
    partials += item * (HP + 16)
    tl.store(partials + units, tl.sum(sums_h, axis=0))
    tl.store(partials + HP + columns, tl.sum(sums_x, axis=0))


@triton.jit
def update_kernel(
    old_params, steps, rms, new_params, attended, n, blocks, first_program, A: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """θ - step / rms of BLOCK coordinates of a segment, and with attention the point of the next gradient."""
    item = tl.program_id(0).to(tl.int64) + first_program
    task = item // blocks
    n = tl.cast(n, tl.int64)
    lanes = item % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = lanes < n
    theta = to_arithmetic(tl.load(old_params + task * n + lanes, mask=valid, other=0.0))
    steps += task * (1 + A) * n
    rms += task * (1 + A)
    new = theta - tl.load(steps + lanes, mask=valid, other=0.0) / tl.load(rms)
    tl.store(new_params + task * n + lanes, new.to(new_params.dtype.element_ty), mask=valid)
    if A == 1:
        point = theta - tl.load(steps + n + lanes, mask=valid, other=0.0) / tl.load(rms + 1)
        tl.store(attended + task * n + lanes, point.to(attended.dtype.element_ty), mask=valid)


@triton.jit
def products_kernel(
    grad_new_params, grad_attended, steps, partials, n, blocks, blocks_per_chunk, chunks, first_program,
    A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ grad · step of one chunk, for the params and the attended points: two numbers."""
    item = tl.program_id(0).to(tl.int64) + first_program
    task, chunk = item // chunks, item % chunks
    n = tl.cast(n, tl.int64)
    grad_new_params += task * n
    grad_attended += task * n
    steps += task * (1 + A) * n
    first = tl.zeros([BLOCK], partials.dtype.element_ty)
    second = tl.zeros([BLOCK], partials.dtype.element_ty)
    for block in range(chunk * blocks_per_chunk, tl.minimum((chunk + 1) * blocks_per_chunk, blocks)):
        lanes = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        valid = lanes < n
        step = tl.load(steps + lanes, mask=valid, other=0.0)
        first += step * to_arithmetic(tl.load(grad_new_params + lanes, mask=valid, other=0.0))
        if A == 1:
            step = tl.load(steps + n + lanes, mask=valid, other=0.0)
            second += step * to_arithmetic(tl.load(grad_attended + lanes, mask=valid, other=0.0))
    tl.store(partials + item * 2, tl.sum(first))
    tl.store(partials + item * 2 + 1, tl.sum(second))


@triton.jit
def backward_kernel(
    grad_new_params, grad_attended, grad_new_state, grad_means, grads, state, rms, products, biases, mean_rates,
    gates, candidate, readouts, scales, scalars, grad_grads, grad_state, partials, weight_partials,
    n, blocks, blocks_per_chunk, chunks, items, items_per_program,
    H: tl.constexpr, HP: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the coordinates of some chunks, one after another.

    grad_means [T, H + 13] is already divided by n. A chunk's row of partials: gradients of the pre-activations r, u and
    c (HP each), and of the mean rate. A program's row of weight_partials: products of these three with x (HP × 16
    each), then with h, h and r h (HP × HP each); products of D with h' (16 × HP); sums of D (16). D has the gradients
    of the five readouts, four products of the first with ĝ, and those of o and of σ(m).
    """
    program = tl.program_id(0).to(tl.int64)
    n = tl.cast(n, tl.int64)
    units, columns = tl.arange(0, HP), tl.arange(0, 16)
    rx, ux, cx = (tl.zeros([HP, 16], partials.dtype.element_ty),) * 3
    rh, uh, ch = (tl.zeros([HP, HP], partials.dtype.element_ty),) * 3
    dh = tl.zeros([16, HP], partials.dtype.element_ty)
    sums_d = tl.zeros([BLOCK, 16], partials.dtype.element_ty)
    for item in range(program * items_per_program, tl.minimum((program + 1) * items_per_program, items)):
        task, chunk = tl.cast(item, tl.int64) // chunks, item % chunks
        bias_r, bias_u, bias_c = (tl.zeros([BLOCK, HP], partials.dtype.element_ty),) * 3
        by_mean = tl.zeros([BLOCK], partials.dtype.element_ty)
        for block in range(chunk * blocks_per_chunk, tl.minimum((chunk + 1) * blocks_per_chunk, blocks)):
            lanes = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            x, h, rested, new_h, da_r, da_u, da_c, d, by_rate = _backward_block(
                grad_new_params, grad_attended, grad_new_state, grad_means, grads, state, rms, products, biases,
                mean_rates, gates, candidate, readouts, scales, scalars, grad_grads, grad_state,
                n, task, lanes, H, HP, A, BLOCK,
            )  # fmt: skip
            rx += product(tl.trans(da_r), x)
            ux += product(tl.trans(da_u), x)
            cx += product(tl.trans(da_c), x)
            rh += product(tl.trans(da_r), h)
            uh += product(tl.trans(da_u), h)
            ch += product(tl.trans(da_c), rested)
            dh += product(tl.trans(d), new_h)
            sums_d += d
            bias_r += da_r
            bias_u += da_u
            bias_c += da_c
            by_mean -= by_rate
        row = partials + tl.cast(item, tl.int64) * (3 * HP + 1)
        tl.store(row + units, tl.sum(bias_r, axis=0))
        tl.store(row + HP + units, tl.sum(bias_u, axis=0))
        tl.store(row + 2 * HP + units, tl.sum(bias_c, axis=0))
        tl.store(row + 3 * HP, tl.sum(by_mean))
    row = weight_partials + program * (64 * HP + 3 * HP * HP + 16)
    by_x = units[:, None] * 16 + columns[None, :]
    by_h = units[:, None] * HP + units[None, :]
    tl.store(row + by_x, rx)
    tl.store(row + 16 * HP + by_x, ux)
    tl.store(row + 32 * HP + by_x, cx)
    row += 48 * HP
    tl.store(row + by_h, rh)
    tl.store(row + HP * HP + by_h, uh)
    tl.store(row + 2 * HP * HP + by_h, ch)
    row += 3 * HP * HP
    tl.store(row + columns[:, None] * HP + units[None, :], dh)
    tl.store(row + 16 * HP + columns, tl.sum(sums_d, axis=0))


@triton.jit
def _backward_block(
    grad_new_params, grad_attended, grad_new_state, grad_means, grads, state, rms, products, biases, mean_rates,
    gates, candidate, readouts, scales, scalars, grad_grads, grad_state,
    n, task, lanes, H: tl.constexpr, HP: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a block; return what the sums need, zero after the last coordinate.

    That is x, h, r h, h', the gradients of the pre-activations of r, u and c, D, and the gradient of x's last feature.
    """
    valid = lanes < n
    state += task * (H + 11) * n
    grad_new_state += task * (H + 11) * n
    grad_state += task * (H + 11) * n
    means = grad_means + task * (H + 13)
    columns = tl.arange(0, 16)
    g = to_arithmetic(tl.load(grads + task * n + lanes, mask=valid, other=0.0))
    x, a0, a1, a2, a3, m0, m1, m2, m3, rate, s, decay = cell.features(
        state, g, lanes, valid, n, tl.load(mean_rates + task), H, BLOCK
    )
    h = cell.load_units(state, lanes, valid, n, H, HP)
    r, u, c, new_h = cell.gru(x, h, biases + task * (3 * H), gates, candidate, H, HP)

    d, by_delta, by_offset, by_new_rate, by_step_rate, step_rate, kept = _readouts_backward(
        grad_new_params + task * n, grad_attended + task * n, grad_new_state, means, rms + task * (1 + A),
        products + task * 2, readouts, scales, scalars, x, new_h, rate, n, lanes, valid, H, HP, A, BLOCK,
    )  # fmt: skip
    rows = columns[:, None] * H + tl.arange(0, HP)[None, :]
    mask = (columns < 4 + A)[:, None] & (tl.arange(0, HP) < H)[None, :]
    grad_h = product(d, tl.load(readouts + rows, mask=mask, other=0.0))
    grad_h += cell.load_units(grad_new_state, lanes, valid, n, H, HP) + cell.load_vector(means, H, HP)[None, :]
    grad_h = tl.where(valid[:, None], grad_h, 0.0)

    da_r, da_u, da_c, old_h, by_x = _gru_backward(grad_h, h, r, u, c, gates, candidate, H, HP)
    cell.store_units(grad_state, lanes, valid, n, old_h, H, HP)
    by_x += tl.load(means + H + columns, mask=columns < 12, other=0.0)[None, :]

    # Features.
    by_rate = cell.column(by_x, 11)
    cell.store_row(grad_state, H + 8, lanes, valid, n, kept * by_new_rate + by_step_rate + by_rate)
    _features_backward(
        grad_new_state, state, grad_grads + task * n, grad_state, scales, x, by_x, by_delta, g, s, decay,
        a0, a1, a2, a3, m0, m1, m2, m3, n, lanes, valid, H,
    )  # fmt: skip
    d = cell.with_column(cell.with_column(d, 5, by_delta * cell.column(x, 0)), 6, by_delta * cell.column(x, 1))
    d = cell.with_column(cell.with_column(d, 7, by_delta * cell.column(x, 2)), 8, by_delta * cell.column(x, 3))
    d = cell.with_column(cell.with_column(d, 9, by_offset), 10, by_new_rate * (rate - step_rate))
    d = tl.where(valid[:, None], d, 0.0)
    x = tl.where(valid[:, None], x, 0.0)
    return x, h, r * h, new_h, da_r, da_u, da_c, d, tl.where(valid, by_rate, 0.0)


@triton.jit
def _readouts_backward(
    grad_new_params, grad_attended, grad_new_state, means, rms, products, readouts, scales, scalars, x, new_h, rate,
    n, lanes, valid, H: tl.constexpr, HP: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first five columns of D; gradients of delta, o, the new log rate and its step; that step, and σ(m)."""
    kept = sigmoid(tl.load(scalars + 4))
    delta = cell.readout(readouts, 0, new_h, H, HP) + cell.direction(x, scales)
    step_rate = cell.clipped(rate + cell.readout(readouts, 1, new_h, H, HP) + tl.load(scalars))
    size = tl.load(rms)
    grad = to_arithmetic(tl.load(grad_new_params + lanes, mask=valid, other=0.0))
    grad *= exp(step_rate + tl.load(scalars + 3)) / size
    shared = tl.load(products) / (size * size * size * n)
    by_delta = shared * delta - grad
    by_offset = -grad * delta
    by_new_rate = cell.load_row(grad_new_state, H + 8, lanes, valid, n) + tl.load(means + H + 12)
    by_step_rate = by_offset + (1 - kept) * by_new_rate
    by_attention = tl.zeros([BLOCK], x.dtype)
    if A == 1:
        attention = cell.readout(readouts, 4, new_h, H, HP)
        size = tl.load(rms + 1)
        grad = to_arithmetic(tl.load(grad_attended + lanes, mask=valid, other=0.0))
        grad *= exp(step_rate) / size
        by_attention = tl.load(products + 1) / (size * size * size * n) * attention - grad
        by_step_rate -= grad * attention
    scale_decay = sigmoid(cell.readout(readouts, 2, new_h, H, HP) + tl.load(scalars + 1))
    input_decay = sigmoid(cell.readout(readouts, 3, new_h, H, HP) + tl.load(scalars + 2))
    by_scale_decay = cell.load_row(grad_new_state, H + 9, lanes, valid, n) * scale_decay * (1 - scale_decay)
    by_input_decay = cell.load_row(grad_new_state, H + 10, lanes, valid, n) * input_decay * (1 - input_decay)
    d = tl.zeros([BLOCK, 16], x.dtype)
    d = cell.with_column(cell.with_column(d, 0, by_delta), 1, by_step_rate)
    d = cell.with_column(cell.with_column(d, 2, by_scale_decay), 3, by_input_decay)
    d = cell.with_column(d, 4, by_attention)
    d = tl.where(valid[:, None], d, 0.0)
    return d, by_delta, by_offset, by_new_rate, by_step_rate, step_rate, kept


@triton.jit
def _gru_backward(grad_h, h, r, u, c, gates, candidate, H: tl.constexpr, HP: tl.constexpr):
    """Gradients of the pre-activations of r, u and c, of the old h, and of x through the GRU."""
    da_u = grad_h * (h - c) * u * (1 - u)
    da_c = grad_h * (1 - u) * (1 - c * c)
    by_rested = product(da_c, cell.load_weight(candidate, 0, 12, H, HP, H, HP))
    da_r = by_rested * h * r * (1 - r)
    old_h = grad_h * u + by_rested * r
    old_h += product(da_r, cell.load_weight(gates, 0, 12, H, HP, H, HP))
    old_h += product(da_u, cell.load_weight(gates, H, 12, H, HP, H, HP))
    by_x = product(da_r, cell.load_weight(gates, 0, 0, 12, 16, H, HP))
    by_x += product(da_u, cell.load_weight(gates, H, 0, 12, 16, H, HP))
    by_x += product(da_c, cell.load_weight(candidate, 0, 0, 12, 16, H, HP))
    return da_r, da_u, da_c, old_h, by_x


@triton.jit
def _features_backward(
    grad_new_state, state, grad_grads, grad_state, scales, x, by_x, by_delta, g, s, decay,
    a0, a1, a2, a3, m0, m1, m2, m3, n, lanes, valid, H: tl.constexpr,
):  # fmt: skip
    """Gradients by g and by the rows a, ms, s and d of a block."""
    g0, g1, g2, g3 = cell.column(x, 0), cell.column(x, 1), cell.column(x, 2), cell.column(x, 3)
    p0, p1, p2 = cell.column(by_x, 4), cell.column(by_x, 5), cell.column(by_x, 6)
    by_g0 = cell.column(by_x, 0) + by_delta * tl.load(scales) + p0 * g1
    by_g1 = cell.column(by_x, 1) + by_delta * tl.load(scales + 1) + p0 * g0 + p1 * g2
    by_g2 = cell.column(by_x, 2) + by_delta * tl.load(scales + 2) + p1 * g1 + p2 * g3
    by_g3 = cell.column(by_x, 3) + by_delta * tl.load(scales + 3) + p2 * g2
    l0, l1, l2, l3 = cell.column(by_x, 7), cell.column(by_x, 8), cell.column(by_x, 9), cell.column(by_x, 10)
    mean = (l0 + l1 + l2 + l3) * 0.25
    d1 = cell.root(decay)
    d2 = cell.root(d1)
    d3 = cell.root(d2)
    by_g, by_s, by_d3 = _scale_backward(
        grad_new_state, state, grad_state, by_g3, l3 - mean, g, s, d3, a3, m3, n, lanes, valid, H + 3
    )
    more_g, more_s, by_d2 = _scale_backward(
        grad_new_state, state, grad_state, by_g2, l2 - mean, g, s, d2, a2, m2, n, lanes, valid, H + 2
    )
    by_g, by_s, by_d2 = by_g + more_g, by_s + more_s, by_d2 + cell.root_backward(by_d3, d3)
    more_g, more_s, by_d1 = _scale_backward(
        grad_new_state, state, grad_state, by_g1, l1 - mean, g, s, d1, a1, m1, n, lanes, valid, H + 1
    )
    by_g, by_s, by_d1 = by_g + more_g, by_s + more_s, by_d1 + cell.root_backward(by_d2, d2)
    more_g, more_s, by_d = _scale_backward(
        grad_new_state, state, grad_state, by_g0, l0 - mean, g, s, decay, a0, m0, n, lanes, valid, H
    )
    cell.store_row(grad_state, H + 9, lanes, valid, n, by_s + more_s)
    cell.store_row(grad_state, H + 10, lanes, valid, n, by_d + cell.root_backward(by_d1, d1))
    tl.store(grad_grads + lanes, (by_g + more_g).to(grad_grads.dtype.element_ty), mask=valid)


@triton.jit
def _scale_backward(
    grad_new_state, state, grad_state, by_scaled, by_log, g, s, decay, new_a, new_ms, n, lanes, valid,
    row: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one scale's a and ms; return those by g, s and the decay."""
    by_g, by_a, by_ms, by_s, by_decay = cell.scale_backward(
        cell.load_row(grad_new_state, row, lanes, valid, n), cell.load_row(grad_new_state, row + 4, lanes, valid, n),
        by_scaled, by_log, g,
        cell.load_row(state, row, lanes, valid, n), cell.load_row(state, row + 4, lanes, valid, n),
        s, decay, new_a, new_ms,
    )  # fmt: skip
    cell.store_row(grad_state, row, lanes, valid, n, by_a)
    cell.store_row(grad_state, row + 4, lanes, valid, n, by_ms)
    return by_g, by_s, by_decay
