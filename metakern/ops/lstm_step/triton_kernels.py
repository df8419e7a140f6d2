# mypy: disable-error-code="no-untyped-def"
"""Kernels of lstm_step: forward or in place, backward, and the weights' gradients.

Forward, per coordinate: features x of the gradient g; per layer, in PyTorch's gate order,

    i, f, o = σ(a), g = tanh(a), a = W_ih x + b_ih + W_hh h + b_hh,   c' = f c + i g,   h' = o tanh c'

where h' is the x of the layer above; θ' = θ + output_scale (w · h' + b). Backward recomputes the gates from (h, c):

    dc' += dh' o (1 - tanh² c'),  da_i = dc' g i (1 - i),  da_f = dc' c f (1 - f),  da_g = dc' i (1 - g²),
    da_o = dh' tanh c' o (1 - o),  dc = dc' f,  dh = W_hhᵀ da,  dx = W_ihᵀ da,  dW_hh = Σ da hᵀ,  dW_ih = Σ da xᵀ

Axis legend: N coordinates, F features (1 or 2), H hidden units, L layers, HP = H padded to a power of two, P numbers of
all weights. States are [ceil(N/32), L, 2 (h, c), H, 32]; n is N, or the coordinates of a slab of it. A host scalar is
passed in two arguments, see :func:`metakern.ops.core.triton_arithmetic.scalar`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from metakern.ops.core.triton_arithmetic import scalar, to_arithmetic
from metakern.ops.lstm_step import triton_cell as cell

#: Host scalars, in two halves each: kernels must not be specialized on their values.
_NUMBERS = tuple(
    name + half for name in ("p", "exp_p", "exp_neg_p", "output_scale") for half in ("", "_low")
)  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS)
def forward_kernel(
    old_params, grads, state, new_params, new_state,
    w_ih_0, w_hh_0, b_ih_0, b_hh_0, w_ih_1, w_hh_1, b_ih_1, b_hh_1, w_ih_2, w_hh_2, b_ih_2, b_hh_2, head_w, head_b,
    n, p, p_low, exp_p, exp_p_low, exp_neg_p, exp_neg_p_low, output_scale, output_scale_low,
    PREPROCESS: tl.constexpr, H: tl.constexpr, L: tl.constexpr, HP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, IN_PLACE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One program updates BLOCK coordinates; if DEPTH < L, only the state of the lowest DEPTH layers."""
    TILE: tl.constexpr = L * 2 * H * 32
    F: tl.constexpr = 1 if PREPROCESS == 0 else 2
    block = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    coordinates = block * BLOCK + lanes
    valid = coordinates < n
    inside = coordinates < (tl.cast(n, tl.int64) + 31) // 32 * 32
    state += block * (BLOCK // 32) * TILE
    new_state += block * (BLOCK // 32) * TILE

    g = to_arithmetic(tl.load(grads + coordinates, mask=valid, other=0.0))
    x0, x1 = cell.features(
        g, scalar(p, p_low, g), scalar(exp_p, exp_p_low, g), scalar(exp_neg_p, exp_neg_p_low, g), PREPROCESS
    )
    h = cell.load_units(state, lanes, valid, 0, H, HP, TILE)
    c = cell.load_units(state, lanes, valid, H, H, HP, TILE)
    _, _, _, _, _, c, h = cell.lowest_layer(x0, x1, h, c, w_ih_0, w_hh_0, b_ih_0, b_hh_0, F, H, HP, PRECISION)
    _store_layer(new_state, lanes, valid, inside, 0, h, c, H, HP, TILE, IN_PLACE)
    if DEPTH > 1:
        h_below = h
        h = cell.load_units(state, lanes, valid, 2 * H, H, HP, TILE)
        c = cell.load_units(state, lanes, valid, 3 * H, H, HP, TILE)
        _, _, _, _, _, c, h = cell.layer(h_below, h, c, w_ih_1, w_hh_1, b_ih_1, b_hh_1, H, HP, H, PRECISION)
        _store_layer(new_state, lanes, valid, inside, 2 * H, h, c, H, HP, TILE, IN_PLACE)
    if DEPTH > 2:
        h_below = h
        h = cell.load_units(state, lanes, valid, 4 * H, H, HP, TILE)
        c = cell.load_units(state, lanes, valid, 5 * H, H, HP, TILE)
        _, _, _, _, _, c, h = cell.layer(h_below, h, c, w_ih_2, w_hh_2, b_ih_2, b_hh_2, H, HP, H, PRECISION)
        _store_layer(new_state, lanes, valid, inside, 4 * H, h, c, H, HP, TILE, IN_PLACE)
    if DEPTH == L:
        out = tl.sum(h * cell.load_vector(head_w, 0, H, HP)[None, :], axis=1) + tl.load(head_b)
        theta = to_arithmetic(tl.load(old_params + coordinates, mask=valid, other=0.0))
        theta += scalar(output_scale, output_scale_low, g) * out
        tl.store(new_params + coordinates, theta.to(new_params.dtype.element_ty), mask=valid)


@triton.jit
def _store_layer(
    new_state, lanes, valid, inside, row, h, c,
    H: tl.constexpr, HP: tl.constexpr, TILE: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    if IN_PLACE:
        tl.debug_barrier()  # all threads must have read before this memory is overwritten
    cell.store_units(new_state, lanes, valid, inside, row, h, H, HP, TILE)
    cell.store_units(new_state, lanes, valid, inside, row + H, c, H, HP, TILE)


@triton.jit(do_not_specialize=_NUMBERS)
def features_kernel(
    grads, features, n, p, p_low, exp_p, exp_p_low, exp_neg_p, exp_neg_p_low,
    PREPROCESS: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the features of BLOCK gradients to [tiles, F, 32]."""
    coordinates = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = coordinates < n
    g = tl.load(grads + coordinates, mask=valid, other=0.0).to(features.dtype.element_ty)
    first, second = cell.features(
        g, scalar(p, p_low, g), scalar(exp_p, exp_p_low, g), scalar(exp_neg_p, exp_neg_p_low, g), PREPROCESS
    )
    at = features + coordinates // 32 * (F * 32) + coordinates % 32
    tl.store(at, first, mask=valid)
    if F == 2:
        tl.store(at + 32, second, mask=valid)


@triton.jit(do_not_specialize=_NUMBERS)
def features_backward_kernel(
    grads, work, grad_grads, n, p, p_low, exp_p, exp_p_low, exp_neg_p, exp_neg_p_low,
    PREPROCESS: tl.constexpr, F: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients by BLOCK of the input gradients, from those of their features, which :func:`backward_kernel` wrote."""
    coordinates = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = coordinates < n
    g = tl.load(grads + coordinates, mask=valid, other=0.0).to(work.dtype.element_ty)
    at = work + coordinates // 32 * ((6 * H + 2) * 32) + 5 * H * 32 + coordinates % 32
    first = tl.load(at, mask=valid, other=0.0)
    second = first
    if F == 2:
        second = tl.load(at + 32, mask=valid, other=0.0)
    result = cell.features_backward(
        g, first, second, scalar(p, p_low, g), scalar(exp_p, exp_p_low, g), scalar(exp_neg_p, exp_neg_p_low, g),
        PREPROCESS,
    )  # fmt: skip
    tl.store(grad_grads + coordinates, result.to(grad_grads.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=_NUMBERS)
def backward_kernel(
    grad_new_params, grad_new_state, x_tiles, state, grad_state, work, w_ih, w_hh, b_ih, b_hh, head_w,
    n, output_scale, output_scale_low,
    H: tl.constexpr, L: tl.constexpr, HP: tl.constexpr, K: tl.constexpr, X_TILE: tl.constexpr,
    LAYER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program takes one layer of BLOCK coordinates; the kernel runs for the top layer first.

    x_tiles points to the K rows of the layer's x in the first tile; tiles are X_TILE numbers apart. Writes the
    gradients of h and c, and to work [tiles, 6H + 2, 32]: the gradients of the four pre-activations, h', and the
    gradient of x, which the run for the layer below adds to that of its h'. All three are only needed until that run.
    """
    TILE: tl.constexpr = L * 2 * H * 32
    WORK: tl.constexpr = (6 * H + 2) * 32
    block = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    coordinates = block * BLOCK + lanes
    valid = coordinates < n
    inside = coordinates < (tl.cast(n, tl.int64) + 31) // 32 * 32
    x_tiles += block * (BLOCK // 32) * X_TILE
    state += block * (BLOCK // 32) * TILE
    grad_new_state += block * (BLOCK // 32) * TILE
    grad_state += block * (BLOCK // 32) * TILE
    work += block * (BLOCK // 32) * WORK

    x = cell.load_units(x_tiles, lanes, valid, 0, K, HP, X_TILE)
    h = cell.load_units(state, lanes, valid, 2 * LAYER * H, H, HP, TILE)
    c = cell.load_units(state, lanes, valid, (2 * LAYER + 1) * H, H, HP, TILE)
    i, f, g, o, t, _, y = cell.layer(x, h, c, w_ih, w_hh, b_ih, b_hh, H, HP, K, 0)

    grad_h = cell.load_units(grad_new_state, lanes, valid, 2 * LAYER * H, H, HP, TILE)
    if LAYER == L - 1:
        cell.store_units(work, lanes, valid, inside, 4 * H, y, H, HP, WORK)
        grad_out = to_arithmetic(tl.load(grad_new_params + coordinates, mask=valid, other=0.0))
        grad_out *= scalar(output_scale, output_scale_low, grad_out)
        grad_h += grad_out[:, None] * cell.load_vector(head_w, 0, H, HP)[None, :]
    else:
        grad_h += cell.load_units(work, lanes, valid, 5 * H, H, HP, WORK)
    grad_c = cell.load_units(grad_new_state, lanes, valid, (2 * LAYER + 1) * H, H, HP, TILE)
    di, df, dg, do, dc = cell.activations_backward(i, f, g, o, t, c, grad_h, grad_c)
    cell.store_units(grad_state, lanes, valid, inside, (2 * LAYER + 1) * H, dc, H, HP, TILE)
    cell.store_units(work, lanes, valid, inside, 0, di, H, HP, WORK)
    cell.store_units(work, lanes, valid, inside, H, df, H, HP, WORK)
    cell.store_units(work, lanes, valid, inside, 2 * H, dg, H, HP, WORK)
    cell.store_units(work, lanes, valid, inside, 3 * H, do, H, HP, WORK)
    grad_h = cell.gates_product(di, df, dg, do, w_hh, H, HP, H)
    cell.store_units(grad_state, lanes, valid, inside, 2 * LAYER * H, grad_h, H, HP, TILE)
    grad_x = cell.gates_product(di, df, dg, do, w_ih, H, HP, K)
    cell.store_units(work, lanes, valid, inside, 5 * H, grad_x, K, HP, WORK)


@triton.jit(do_not_specialize=_NUMBERS)
def weights_kernel(
    grad_new_params, x_tiles, state, work, partials,
    n, blocks, blocks_per_chunk, row_length, output_scale, output_scale_low,
    H: tl.constexpr, L: tl.constexpr, HP: tl.constexpr, K: tl.constexpr, X_TILE: tl.constexpr,
    LAYER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program adds one layer's sums of da xᵀ, da hᵀ and da over a chunk of blocks to its row of partials.

    ``partials`` points to the layer's sums in the first row; the head's sums follow the top layer's.
    """
    TILE: tl.constexpr = L * 2 * H * 32
    WORK: tl.constexpr = (6 * H + 2) * 32
    chunk = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    units = tl.arange(0, HP)
    inputs = tl.arange(0, HP)
    rows, real = cell.gate_rows(H, HP)
    hh = tl.zeros([4 * HP, HP], work.dtype.element_ty)
    ih = tl.zeros([4 * HP, HP], work.dtype.element_ty)
    bias = tl.zeros([4 * HP], work.dtype.element_ty)
    head = tl.zeros([HP], work.dtype.element_ty)
    out = tl.zeros([BLOCK], work.dtype.element_ty)
    for block in range(chunk * blocks_per_chunk, tl.minimum((chunk + 1) * blocks_per_chunk, blocks)):
        coordinates = block * BLOCK + lanes
        valid = coordinates < n
        tile = block * (BLOCK // 32)
        da = cell.load_rows(work + tile * WORK, lanes, valid, rows, real, WORK)
        h = cell.load_rows(state + tile * TILE, lanes, valid, 2 * LAYER * H + units, units < H, TILE)
        x = cell.load_rows(x_tiles + tile * X_TILE, lanes, valid, inputs, inputs < K, X_TILE)
        hh += cell.product(da, tl.trans(h), 0)
        ih += cell.product(da, tl.trans(x), 0)
        bias += tl.sum(da, axis=1)
        if LAYER == L - 1:
            grad_out = to_arithmetic(tl.load(grad_new_params + coordinates, mask=valid, other=0.0))
            grad_out *= scalar(output_scale, output_scale_low, grad_out)
            y = cell.load_rows(work + tile * WORK, lanes, valid, 4 * H + units, units < H, WORK)
            head += tl.sum(y * grad_out[None, :], axis=1)
            out += grad_out
    partials += chunk * row_length
    _add(partials + rows[:, None] * K + inputs[None, :], ih, real[:, None] & (inputs < K)[None, :])
    partials += 4 * H * K
    _add(partials + rows[:, None] * H + units[None, :], hh, real[:, None] & (units < H)[None, :])
    _add(partials + 4 * H * H + rows, bias, real)
    if LAYER == L - 1:
        partials += 4 * H * (H + 1)
        _add(partials + units, head, units < H)
        tl.store(partials + H, tl.load(partials + H) + tl.sum(out))


@triton.jit
def _add(to, x, mask):
    tl.store(to, tl.load(to, mask=mask, other=0.0) + x, mask=mask)


@triton.jit
def sum_kernel(
    partials,
    w_ih_0, w_hh_0, b_ih_0, b_hh_0, w_ih_1, w_hh_1, b_ih_1, b_hh_1, w_ih_2, w_hh_2, b_ih_2, b_hh_2, head_w, head_b,
    chunks, F: tl.constexpr, H: tl.constexpr, L: tl.constexpr, WEIGHTS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Sum partials [chunks, P] in a fixed order, in float64, to the gradients of the weights."""
    G: tl.constexpr = 4 * H
    UPPER: tl.constexpr = G * (2 * H + 1)
    LAYER_1: tl.constexpr = G * (F + H + 1)
    HEAD: tl.constexpr = LAYER_1 + (L - 1) * UPPER
    P: tl.constexpr = HEAD + H + 1
    at = tl.program_id(0) * WEIGHTS + tl.arange(0, WEIGHTS)
    row = tl.arange(0, CHUNKS)
    total = tl.zeros([WEIGHTS], tl.float64)
    for start in range(0, chunks, CHUNKS):
        chunk = (start + row).to(tl.int64)
        mask = (chunk < chunks)[:, None] & (at < P)[None, :]
        total += tl.sum(
            tl.load(partials + chunk[:, None] * P + at[None, :], mask=mask, other=0.0).to(tl.float64), axis=0
        )
    _store_range(w_ih_0, at, total, 0, G * F)
    _store_range(w_hh_0, at, total, G * F, G * H)
    _store_range(b_ih_0, at, total, G * (F + H), G)
    _store_range(b_hh_0, at, total, G * (F + H), G)
    if L > 1:
        _store_upper_layer(w_ih_1, w_hh_1, b_ih_1, b_hh_1, at, total, LAYER_1, H)
    if L > 2:
        _store_upper_layer(w_ih_2, w_hh_2, b_ih_2, b_hh_2, at, total, LAYER_1 + UPPER, H)
    _store_range(head_w, at, total, HEAD, H)
    _store_range(head_b, at, total, HEAD + H, 1)


@triton.jit
def _store_upper_layer(w_ih, w_hh, b_ih, b_hh, at, total, start, H: tl.constexpr):
    _store_range(w_ih, at, total, start, 4 * H * H)
    _store_range(w_hh, at, total, start + 4 * H * H, 4 * H * H)
    _store_range(b_ih, at, total, start + 8 * H * H, 4 * H)
    _store_range(b_hh, at, total, start + 8 * H * H, 4 * H)


@triton.jit
def _store_range(out, at, x, start, size):
    tl.store(out + (at - start), x.to(out.dtype.element_ty), mask=(at >= start) & (at < start + size))
