# mypy: disable-error-code="no-untyped-def"
"""Device functions of mlp_update_step: the network of a block of coordinates, and its gradients.

Axis legend: B coordinates, W hidden units, WP = W padded to a power of two of at least 16 for ``tl.dot``, L hidden
layers of 1 to 4. Padded units have zero weights. ``weights`` is flat: [W, 39], [W], then [W, W], [W] for each further
hidden layer, then [2, W], [2]. The first bias is a task's own, with the time features' part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from metakern.ops.core.triton_arithmetic import exp, product, scalar, tanh
from metakern.ops.mlp_update_step.triton_features import feature_numbers

_INPUTS = tl.constexpr(39)


@triton.jit
def load_first(weights, W: tl.constexpr, WP: tl.constexpr):
    """The first layer's weights of the features, [WP, 32]."""
    units = tl.arange(0, WP)
    numbers, used = feature_numbers()
    mask = (units < W)[:, None] & used[None, :]
    return tl.load(weights + units[:, None] * _INPUTS + numbers[None, :], mask=mask, other=0.0)


@triton.jit
def load_hidden(weights, LAYER: tl.constexpr, W: tl.constexpr, WP: tl.constexpr):
    """The weights of hidden layer LAYER from 1, [WP, WP], outputs first."""
    units = tl.arange(0, WP)
    base = weights + (_INPUTS * W + W + (LAYER - 1) * (W * W + W))
    mask = (units < W)[:, None] & (units < W)[None, :]
    return tl.load(base + units[:, None] * W + units[None, :], mask=mask, other=0.0)


@triton.jit
def load_units(base, W: tl.constexpr, WP: tl.constexpr):
    """W numbers, [WP]."""
    units = tl.arange(0, WP)
    return tl.load(base + units, mask=units < W, other=0.0)


@triton.jit
def relu(x):
    """max(x, 0); NaN stays."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def next_hidden(h, weights, LAYER: tl.constexpr, W: tl.constexpr, WP: tl.constexpr):
    """The units of hidden layer LAYER from 1, from those before it."""
    bias = load_units(weights + (_INPUTS * W + W + (LAYER - 1) * (W * W + W) + W * W), W, WP)
    return relu(product(h, tl.trans(load_hidden(weights, LAYER, W, WP))) + bias[None, :])


@triton.jit
def hidden_units(x, weights, bias, W: tl.constexpr, WP: tl.constexpr, L: tl.constexpr):
    """The units of up to four hidden layers, [B, WP] each, of the normalised features; the last for those beyond L."""
    h1 = relu(product(x, tl.trans(load_first(weights, W, WP))) + load_units(bias, W, WP)[None, :])
    h2 = h1
    if L > 1:
        h2 = next_hidden(h1, weights, 1, W, WP)
    h3 = h2
    if L > 2:
        h3 = next_hidden(h2, weights, 2, W, WP)
    h4 = h3
    if L > 3:
        h4 = next_hidden(h3, weights, 3, W, WP)
    return h1, h2, h3, h4


@triton.jit
def output(weights, INDEX: tl.constexpr, h, W: tl.constexpr, WP: tl.constexpr, L: tl.constexpr):
    """The network's output INDEX, [B], and its weights, [WP]."""
    base = weights + (_INPUTS * W + W + (L - 1) * (W * W + W))
    row = load_units(base + INDEX * W, W, WP)
    return tl.sum(h * row[None, :], axis=1) + tl.load(base + 2 * W + INDEX), row


@triton.jit
def through_hidden(by_sum, h, weights, LAYER: tl.constexpr, W: tl.constexpr, WP: tl.constexpr):
    """Gradients by the sums of the layer before hidden layer LAYER, whose units are h."""
    return tl.where(h > 0, product(by_sum, load_hidden(weights, LAYER, W, WP)), 0.0)


@triton.jit
def outputs_backward(
    above, valid, h, rate, exp_mult, exp_mult_low, weights, W: tl.constexpr, WP: tl.constexpr, L: tl.constexpr
):
    """Gradients by the last hidden sums and by both outputs; the gradient of the update's factor, and the direction.

    All are zero after the last coordinate. ``above`` are the gradients of the new params, h the last hidden units.
    """
    direction, direction_weights = output(weights, 0, h, W, WP, L)
    magnitude, magnitude_weights = output(weights, 1, h, W, WP, L)
    factor = scalar(exp_mult, exp_mult_low, direction)
    scaled = tl.where(valid, above * exp(factor * magnitude), 0.0)
    of_d = -scaled * rate
    of_s = of_d * direction * factor
    by_sum = of_d[:, None] * direction_weights[None, :] + of_s[:, None] * magnitude_weights[None, :]
    return tl.where(h > 0, by_sum, 0.0), of_d, of_s, scaled, direction


@triton.jit
def layer_backward(by_sum, h, of_weight, of_bias, weights, LAYER: tl.constexpr, W: tl.constexpr, WP: tl.constexpr):
    """Adds to the gradients of hidden layer LAYER's weight and bias; then the gradients by the sums before it."""
    of_weight += product(tl.trans(by_sum), h)
    of_bias += by_sum
    return of_weight, of_bias, through_hidden(by_sum, h, weights, LAYER, W, WP)


@triton.jit
def store_layer(row, of_weight, of_bias, WP: tl.constexpr):
    """The gradients of a hidden layer's weight, [WP, WP], and bias, [WP]."""
    units = tl.arange(0, WP)
    tl.store(row + units[:, None] * WP + units[None, :], of_weight)
    tl.store(row + WP * WP + units, tl.sum(of_bias, axis=0))


@triton.jit
def hidden_backward(
    by_sum, h1, h2, h3, w1, b1, w2, b2, w3, b3, weights, W: tl.constexpr, WP: tl.constexpr, L: tl.constexpr
):
    """Gradients of the first layer's sums from those of the last hidden layer's; the layers' own are added to w and b.

    Returns:
        the gradients, then the sums w and b of each layer
    """
    if L > 3:
        w3, b3, by_sum = layer_backward(by_sum, h3, w3, b3, weights, 3, W, WP)
    if L > 2:
        w2, b2, by_sum = layer_backward(by_sum, h2, w2, b2, weights, 2, W, WP)
    if L > 1:
        w1, b1, by_sum = layer_backward(by_sum, h1, w1, b1, weights, 1, W, WP)
    return by_sum, w1, b1, w2, b2, w3, b3


@triton.jit
def store_layers(row, first, w1, b1, w2, b2, w3, b3, WP: tl.constexpr, L: tl.constexpr):
    """The gradients of the first layer's weight, [WP, 32], and of up to three hidden layers behind it."""
    tl.store(row + tl.arange(0, WP)[:, None] * 32 + tl.arange(0, 32)[None, :], first)
    row += 32 * WP
    if L > 1:
        store_layer(row, w1, b1, WP)
    if L > 2:
        store_layer(row + (WP * WP + WP), w2, b2, WP)
    if L > 3:
        store_layer(row + 2 * (WP * WP + WP), w3, b3, WP)


@triton.jit
def store_outputs(row, of_direction, of_magnitude, by_direction, by_magnitude, WP: tl.constexpr):
    """The gradients of the outputs' weights, [WP] each, and of their biases."""
    units = tl.arange(0, WP)
    tl.store(row + units, tl.sum(of_direction, axis=0))
    tl.store(row + WP + units, tl.sum(of_magnitude, axis=0))
    tl.store(row + 2 * WP, tl.sum(by_direction))
    tl.store(row + 2 * WP + 1, tl.sum(by_magnitude))


@triton.jit
def biases_kernel(weights, steps, time, biases, first_program, W: tl.constexpr, WP: tl.constexpr):
    """The time features of one task, [11], and its first bias, [W]."""
    task = tl.program_id(0).to(tl.int64) + first_program
    units, j = tl.arange(0, WP), tl.arange(0, 16)
    t = tl.load(steps + task).to(biases.dtype.element_ty)
    scale = tl.where(j % 2 == 0, 1.0, 3.0).to(t.dtype)  # 1, 3, 10, 30, ...
    for power in tl.static_range(5):
        scale = tl.where(j // 2 > power, scale * 10, scale)
    values = tanh(t / scale - 1)
    tl.store(time + task * 11 + j, values, mask=j < 11)
    mask = (units < W)[:, None] & (j < 11)[None, :]
    of_time = tl.load(weights + units[:, None] * _INPUTS + (28 + j)[None, :], mask=mask, other=0.0)
    bias = load_units(weights + _INPUTS * W, W, WP) + tl.sum(of_time * values[None, :], axis=1)
    tl.store(biases + task * W + units, bias, mask=units < W)
