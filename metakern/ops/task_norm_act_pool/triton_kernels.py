# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM108
"""Triton kernels of task_norm_act_pool: a program owns a channel of a task and goes over its values twice.

Every kernel's last argument is its first program. Sums are taken by block in the arithmetic dtype, and the few numbers
of a channel are computed in float64.

Axis legend: T tasks, S samples, C channels, [H, W] the images of x, [HO, WO] those of y; N = S H W values of a channel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from metakern.ops.core.triton_arithmetic import scalar

#: Values of STATISTICS and ACTIVATION, indices into STATISTICS and ACTIVATIONS of the reference.
BATCH: tl.constexpr = tl.constexpr(0)
GIVEN: tl.constexpr = tl.constexpr(1)
NONE: tl.constexpr = tl.constexpr(2)
RELU: tl.constexpr = tl.constexpr(0)
LEAKY_RELU: tl.constexpr = tl.constexpr(1)


@triton.jit
def places(item, k, samples, C, pixels):
    """Where values k of channel ``item`` (in 0 to T C) lie in a tensor [T, S, C, pixels]."""
    return ((item // C * samples + k // pixels) * C + item % C) * pixels + k % pixels


@triton.jit
def channel_number(numbers, item, default: tl.constexpr, HAS: tl.constexpr):
    """One of the numbers [T, C] in float64, or the default where there are none."""
    if HAS:
        result = tl.load(numbers + item).to(tl.float64)
    else:
        result = tl.full([], default, tl.float64)
    return result


@triton.jit
def reciprocal_root(var, eps, eps_low, STATISTICS: tl.constexpr):
    """Returns r = 1 / √(var + eps), or 1 where nothing is normalised."""
    if STATISTICS == NONE:
        result = tl.full([], 1.0, tl.float64)
    else:
        result = 1 / tl.sqrt(var + scalar(eps, eps_low, var))
    return result


@triton.jit
def activation_slope(value, passed, slope, ACTIVATION: tl.constexpr):
    """The value times the activation's slope. ReLU's zero is not a product, which would keep NaN."""
    if ACTIVATION == RELU:
        result = tl.where(passed, value, 0.0)
    elif ACTIVATION == LEAKY_RELU:
        result = tl.where(passed, value, value * slope)
    else:
        result = value
    return result


@triton.jit
def has_passed(z, ACTIVATION: tl.constexpr):
    """Where the activation's slope is 1; as in PyTorch, ReLU lets NaN pass."""
    if ACTIVATION == RELU:
        result = (z > 0) | (z != z)
    elif ACTIVATION == LEAKY_RELU:
        result = z > 0
    else:
        result = z == z
    return result


# -------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def batch_moments(x, item, samples, C, pixels, BLOCK: tl.constexpr):
    """Mean and biased variance of a channel, in float64; zeros without values."""
    n = tl.cast(samples, tl.int64) * pixels
    sums = tl.zeros([BLOCK], x.dtype.element_ty)
    for start in range(0, n, BLOCK):
        k = start + tl.arange(0, BLOCK)
        sums += tl.load(x + places(item, k, samples, C, pixels), mask=k < n, other=0.0)
    count = tl.maximum(n, 1).to(tl.float64)
    mean = (tl.sum(sums, axis=0).to(tl.float64) / count).to(sums.dtype)
    rest, squares = tl.zeros([BLOCK], sums.dtype), tl.zeros([BLOCK], sums.dtype)
    for start in range(0, n, BLOCK):
        k = start + tl.arange(0, BLOCK)
        d = tl.where(k < n, tl.load(x + places(item, k, samples, C, pixels), mask=k < n, other=0.0) - mean, 0.0)
        rest += d
        squares += d * d
    offset = tl.sum(rest, axis=0).to(tl.float64) / count  # from the rounding of the mean
    var = tl.sum(squares, axis=0).to(tl.float64) / count - offset * offset
    return mean.to(tl.float64) + offset, var


@triton.jit
def activated(x, at, mask, mean, scale, shift, slope, ACTIVATION: tl.constexpr):
    """Activation of γ x̂ + β for values at these places, and where its slope is 1."""
    z = (tl.load(x + at, mask=mask, other=0.0) - mean) * scale + shift
    passed = has_passed(z, ACTIVATION)
    return activation_slope(z, passed, slope, ACTIVATION), passed.to(tl.int32)


@triton.jit
def forward_kernel(
    x, gamma, beta, running_mean, running_var, y, out_mean, out_var, index, samples, C, H, W, HO, WO, eps, eps_low,
    slope, slope_low, first_program,
    STATISTICS: tl.constexpr, ACTIVATION: tl.constexpr, POOL: tl.constexpr, HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y, the statistics, and a byte an output: the winner of its window, plus 4 where the activation has slope 1."""
    item = tl.program_id(0).to(tl.int64) + first_program
    pixels, out_pixels = tl.cast(H, tl.int64) * W, tl.cast(HO, tl.int64) * WO
    if STATISTICS == BATCH:
        mean64, var64 = batch_moments(x, item, samples, C, pixels, BLOCK)
    else:
        mean64 = channel_number(running_mean, item, 0.0, STATISTICS == GIVEN)
        var64 = channel_number(running_var, item, 1.0, STATISTICS == GIVEN)
    dtype = y.dtype.element_ty
    mean, var = mean64.to(dtype), var64.to(dtype)
    tl.store(out_mean + item, mean)
    tl.store(out_var + item, var)
    r = reciprocal_root(var.to(tl.float64), eps, eps_low, STATISTICS)
    scale = (r * channel_number(gamma, item, 1.0, HAS_GAMMA)).to(dtype)
    shift = channel_number(beta, item, 0.0, HAS_BETA).to(dtype)
    leak = scalar(slope, slope_low, scale)
    n = samples * out_pixels
    for start in range(0, n, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask, to = k < n, places(item, k, samples, C, out_pixels)
        if POOL:
            pixel = k % out_pixels
            at = places(item, k // out_pixels * pixels, samples, C, pixels) + pixel // WO * 2 * W + pixel % WO * 2
            best, passed = activated(x, at, mask, mean, scale, shift, leak, ACTIVATION)
            winner = tl.zeros([BLOCK], tl.int32)
            for other in tl.static_range(1, 4):
                value, other_passed = activated(
                    x, at + (other // 2) * W + other % 2, mask, mean, scale, shift, leak, ACTIVATION
                )
                wins = (value > best) | (value != value)  # the first of equal pixels, the last NaN
                best = tl.where(wins, value, best)
                passed = tl.where(wins, other_passed, passed)
                winner = tl.where(wins, other, winner)
        else:
            best, passed = activated(x, to, mask, mean, scale, shift, leak, ACTIVATION)
            winner = tl.zeros([BLOCK], tl.int32)
        tl.store(y + to, best, mask=mask)
        tl.store(index + to, (winner + 4 * passed).to(tl.uint8), mask=mask)


# ------------------------------------------------------------------------------------------------------------- backward


@triton.jit
def spread(
    grad_y, index, item, k, mask, samples, C, W, pixels, HO, WO, slope, ACTIVATION: tl.constexpr, POOL: tl.constexpr
):
    """The gradient of γ x̂ + β at values k: that of y where they won their window, times the activation's slope."""
    out_pixels = tl.cast(HO, tl.int64) * WO
    if POOL:
        row, column = k % pixels // W, k % pixels % W
        mask = mask & (row // 2 < HO) & (column // 2 < WO)
        at = places(item, k // pixels * out_pixels, samples, C, out_pixels) + row // 2 * WO + column // 2
        own = (row % 2 * 2 + column % 2).to(tl.int32)
    else:
        at = places(item, k, samples, C, out_pixels)
        own = tl.zeros(k.shape, tl.int32)
    bits = tl.load(index + at, mask=mask, other=0).to(tl.int32)
    value = tl.load(grad_y + at, mask=mask, other=0.0)
    value = activation_slope(value, (bits & 4) != 0, slope, ACTIVATION)
    return tl.where(mask & ((bits & 3) == own), value, 0.0)


@triton.jit
def backward_kernel(
    grad_y, x, gamma, means, variances, index, grad_x, grad_gamma, grad_beta, samples, C, H, W, HO, WO, eps, eps_low,
    slope, slope_low, first_program,
    STATISTICS: tl.constexpr, ACTIVATION: tl.constexpr, POOL: tl.constexpr, HAS_GAMMA: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients by x, gamma and beta."""
    item = tl.program_id(0).to(tl.int64) + first_program
    pixels = tl.cast(H, tl.int64) * W
    n = samples * pixels
    mean = tl.load(means + item)
    r = reciprocal_root(tl.load(variances + item).to(tl.float64), eps, eps_low, STATISTICS)
    leak = scalar(slope, slope_low, mean)
    sums, products = tl.zeros([BLOCK], mean.dtype), tl.zeros([BLOCK], mean.dtype)
    for start in range(0, n, BLOCK):
        k = start + tl.arange(0, BLOCK)
        gz = spread(grad_y, index, item, k, k < n, samples, C, W, pixels, HO, WO, leak, ACTIVATION, POOL)
        d = tl.load(x + places(item, k, samples, C, pixels), mask=k < n, other=0.0) - mean
        sums += gz
        products += gz * d
    beta_sum = tl.sum(sums, axis=0).to(tl.float64)
    gamma_sum = tl.sum(products, axis=0).to(tl.float64) * r
    tl.store(grad_beta + item, beta_sum.to(mean.dtype))
    tl.store(grad_gamma + item, gamma_sum.to(mean.dtype))
    scale, count = r * channel_number(gamma, item, 1.0, HAS_GAMMA), tl.maximum(n, 1).to(tl.float64)
    of_gz = scale.to(mean.dtype)
    of_d, rest = (-scale * r * gamma_sum / count).to(mean.dtype), (-scale * beta_sum / count).to(mean.dtype)
    for start in range(0, n, BLOCK):
        k = start + tl.arange(0, BLOCK)
        at = places(item, k, samples, C, pixels)
        grad = of_gz * spread(grad_y, index, item, k, k < n, samples, C, W, pixels, HO, WO, leak, ACTIVATION, POOL)
        if STATISTICS == BATCH:
            grad += of_d * (tl.load(x + at, mask=k < n, other=0.0) - mean) + rest
        tl.store(grad_x + at, grad, mask=k < n)


# ---------------------------------------------------------------------------------------------------- second derivative


@triton.jit
def second_sums(
    by_x, grad_y, x, index, item, samples, C, W, pixels, HO, WO, mean, leak,
    ACTIVATION: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of gz, gz d, v, v d and v gz over a channel, d = x - mean and v the gradient by grad_x, in float64."""
    n = samples * pixels
    g, gd, v, vd, vg = (
        tl.zeros([BLOCK], mean.dtype),
        tl.zeros([BLOCK], mean.dtype),
        tl.zeros([BLOCK], mean.dtype),
        tl.zeros([BLOCK], mean.dtype),
        tl.zeros([BLOCK], mean.dtype),
    )
    for start in range(0, n, BLOCK):
        k = start + tl.arange(0, BLOCK)
        at = places(item, k, samples, C, pixels)
        gz = spread(grad_y, index, item, k, k < n, samples, C, W, pixels, HO, WO, leak, ACTIVATION, POOL)
        d = tl.load(x + at, mask=k < n, other=0.0) - mean
        a = tl.load(by_x + at, mask=k < n, other=0.0)
        g += gz
        gd += gz * d
        v += a
        vd += a * d
        vg += a * gz
    return (
        tl.sum(g, axis=0).to(tl.float64),
        tl.sum(gd, axis=0).to(tl.float64),
        tl.sum(v, axis=0).to(tl.float64),
        tl.sum(vd, axis=0).to(tl.float64),
        tl.sum(vg, axis=0).to(tl.float64),
    )


@triton.jit
def second_kernel(
    by_x, by_gamma, by_beta, grad_y, x, gamma, means, variances, index, of_grad_y, of_x, of_gamma, samples, C, H, W, HO,
    WO, eps, eps_low, slope, slope_low, first_program,
    STATISTICS: tl.constexpr, ACTIVATION: tl.constexpr, POOL: tl.constexpr, HAS_GAMMA: tl.constexpr,
    HAS_BY_GAMMA: tl.constexpr, HAS_BY_BETA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of <by_x, grad_x> + <by_gamma, grad_gamma> + <by_beta, grad_beta> by grad_y, x and gamma."""
    item = tl.program_id(0).to(tl.int64) + first_program
    pixels, out_pixels = tl.cast(H, tl.int64) * W, tl.cast(HO, tl.int64) * WO
    n = samples * pixels
    mean = tl.load(means + item)
    dtype = mean.dtype
    r = reciprocal_root(tl.load(variances + item).to(tl.float64), eps, eps_low, STATISTICS)
    leak = scalar(slope, slope_low, mean)
    g, gd, v, vd, vg = second_sums(
        by_x, grad_y, x, index, item, samples, C, W, pixels, HO, WO, mean, leak, ACTIVATION, POOL, BLOCK
    )
    count = tl.maximum(n, 1).to(tl.float64)
    square = channel_number(gamma, item, 1.0, HAS_GAMMA) * r * r
    u = channel_number(by_gamma, item, 0.0, HAS_BY_GAMMA) * r
    w = channel_number(by_beta, item, 0.0, HAS_BY_BETA)
    if STATISTICS == BATCH:
        g, gx, v, vx = g / count, gd * r / count, v / count, vd * r / count
        va = vg / count - v * g - vx * gx
        tl.store(of_gamma + item, (r * count * va).to(dtype))
        x_gz, x_v = (u - square * vx).to(dtype), (-square * gx).to(dtype)
        x_d = (-(square * (va - 2 * gx * vx) + u * gx) * r).to(dtype)
        x_rest = (square * (gx * v + vx * g) - u * g).to(dtype)
        gz_v, gz_d, gz_rest = (square / r).to(dtype), (u - square * vx).to(dtype), (w - square / r * v).to(dtype)
    else:
        tl.store(of_gamma + item, (r * vg).to(dtype))
        x_gz, x_v, x_d, x_rest = u.to(dtype), mean * 0, mean * 0, mean * 0
        gz_v, gz_d, gz_rest = (square / r).to(dtype), u.to(dtype), w.to(dtype)
    for start in range(0, n, BLOCK):
        k = start + tl.arange(0, BLOCK)
        at = places(item, k, samples, C, pixels)
        grad = x_gz * spread(grad_y, index, item, k, k < n, samples, C, W, pixels, HO, WO, leak, ACTIVATION, POOL)
        if STATISTICS == BATCH:
            d = tl.load(x + at, mask=k < n, other=0.0) - mean
            grad += x_v * tl.load(by_x + at, mask=k < n, other=0.0) + x_d * d + x_rest
        tl.store(of_x + at, grad, mask=k < n)
    outs = samples * out_pixels
    for start in range(0, outs, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask, to = k < outs, places(item, k, samples, C, out_pixels)
        bits = tl.load(index + to, mask=mask, other=0).to(tl.int32)
        at = to
        if POOL:
            row, column = k % out_pixels // WO * 2 + (bits & 3) // 2, k % out_pixels % WO * 2 + bits % 2
            at = places(item, k // out_pixels * pixels, samples, C, pixels) + row * W + column
        d = tl.load(x + at, mask=mask, other=0.0) - mean
        grad = gz_v * tl.load(by_x + at, mask=mask, other=0.0) + gz_d * d + gz_rest
        tl.store(of_grad_y + to, activation_slope(grad, (bits & 4) != 0, leak, ACTIVATION), mask=mask)
