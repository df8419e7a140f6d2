# mypy: disable-error-code="no-untyped-def"
"""Activations and losses of small MLPs with first and second derivatives, over the samples of one task.

Axis legend: S samples of the task, O outputs of the model; predictions [S, O] are processed in blocks of BS samples by
OP outputs, O padded to a power of two. Other threads may read what a phase wrote only after a ``tl.debug_barrier()``,
which the caller must place (see :mod:`metakern.ops.mlp_inner_loop.triton_pass`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from metakern.ops.core.triton_arithmetic import exp, log, sigmoid, tanh, to_arithmetic

#: Block size of elementwise phases.
BLOCK = tl.constexpr(512)

#: ACTIVATION of a network whose layers differ in kind; single kinds are the numbers below this one.
MIXED = tl.constexpr(5)


@triton.constexpr_function
def loss_block(outputs):
    """Samples per block in the loss, for this number of outputs."""
    return max(1, min(32, 2048 // outputs))


@triton.jit
def activation_of(z, leak, KIND: tl.constexpr):
    """φ(z); propagates NaN."""
    if KIND == 0:
        result = tl.where(z <= 0, 0.0, z)  # the comparison is false for NaN
    elif KIND == 1:
        result = tanh(z)
    elif KIND == 2:
        result = sigmoid(z)
    elif KIND == 3:
        result = z * normal_cdf(z)
    else:
        result = tl.where(z > 0, z, leak * z)
    return result


@triton.jit
def normal_cdf(z):
    """Normal distribution function."""
    return 0.5 + 0.5 * tl.erf(z * 0.70710678118654752440)


@triton.jit
def tangent_of(z, h, v, curved, leak, KIND: tl.constexpr):
    """φ'(z) v + φ''(z) curved; computed from h = φ(z) where possible.

    ReLU and leaky ReLU select instead of multiplying: an infinite gradient of a dead unit gives zero, not NaN.
    """
    if KIND == 0:
        result = tl.where(h <= 0, 0.0, v)
    elif KIND == 1:
        slope = 1 - h * h
        result = v * slope + curved * (-2 * h * slope)
    elif KIND == 2:
        slope = h * (1 - h)
        result = v * slope + curved * (slope * (1 - 2 * h))
    elif KIND == 3:
        density = exp(-0.5 * z * z) * 0.39894228040143267794
        result = v * (normal_cdf(z) + z * density) + curved * (density * (2 - z * z))
    else:
        result = tl.where(h > 0, v, leak * v)
    return result


@triton.jit
def slope_of(z, h, v, leak, KIND: tl.constexpr):
    """φ'(z) v."""
    if KIND == 1:
        result = v * (1 - h * h)
    elif KIND == 2:
        result = v * (h * (1 - h))
    elif KIND == 3:
        result = v * (normal_cdf(z) + z * exp(-0.5 * z * z) * 0.39894228040143267794)
    else:
        result = tangent_of(z, h, v, v, leak, KIND)
    return result


# The functions below take a layer's ``kind``; ACTIVATION is the kind of all layers, or MIXED if they differ.


@triton.jit
def activation(z, kind, leak, ACTIVATION: tl.constexpr):
    """φ(z)."""
    if ACTIVATION != MIXED:
        result = activation_of(z, leak, ACTIVATION)
    else:
        result = activation_of(z, leak, 0)
        if kind == 1:
            result = activation_of(z, leak, 1)
        if kind == 2:
            result = activation_of(z, leak, 2)
        if kind == 3:
            result = activation_of(z, leak, 3)
        if kind == 4:
            result = activation_of(z, leak, 4)
    return result


@triton.jit
def slope_times(z, h, v, kind, leak, ACTIVATION: tl.constexpr):
    """φ'(z) v."""
    if ACTIVATION != MIXED:
        result = slope_of(z, h, v, leak, ACTIVATION)
    else:
        result = slope_of(z, h, v, leak, 0)
        if kind == 1:
            result = slope_of(z, h, v, leak, 1)
        if kind == 2:
            result = slope_of(z, h, v, leak, 2)
        if kind == 3:
            result = slope_of(z, h, v, leak, 3)
        if kind == 4:
            result = slope_of(z, h, v, leak, 4)
    return result


@triton.jit
def tangent(z, h, v, curved, kind, leak, ACTIVATION: tl.constexpr):
    """φ'(z) v + φ''(z) curved."""
    if ACTIVATION != MIXED:
        result = tangent_of(z, h, v, curved, leak, ACTIVATION)
    else:
        result = tangent_of(z, h, v, curved, leak, 0)
        if kind == 1:
            result = tangent_of(z, h, v, curved, leak, 1)
        if kind == 2:
            result = tangent_of(z, h, v, curved, leak, 2)
        if kind == 3:
            result = tangent_of(z, h, v, curved, leak, 3)
        if kind == 4:
            result = tangent_of(z, h, v, curved, leak, 4)
    return result


# ------------------------------------------------------------------------------------------------------------- losses


@triton.jit
def mean_factor(mask, like, samples, outputs, LOSS: tl.constexpr, MASKED: tl.constexpr):
    """Weight of one element in the task's mean loss; infinite (and unused) if all samples are masked out."""
    counted = samples
    if MASKED:
        lanes = tl.arange(0, BLOCK)
        sums = tl.zeros([BLOCK], tl.int32)
        for start in range(0, samples, BLOCK):
            sums += (tl.load(mask + start + lanes, mask=start + lanes < samples, other=0) != 0).to(tl.int32)
        counted = tl.sum(sums, axis=0)
    if LOSS != 1:
        counted *= outputs
    return 1 / counted.to(like.dtype.element_ty)


@triton.jit
def sample_weights(mask, factor, s, samples, MASKED: tl.constexpr):
    """Weights [BS] of the samples ``s``; zero for masked ones and beyond the last."""
    used = s < samples
    if MASKED:
        used = used & (tl.load(mask + s, mask=used, other=0) != 0)
    return tl.where(used, factor, 0.0)


@triton.jit
def shares(p, inside):
    """Softmax of rows [BS, OP] of predictions: exponentials, their sum [BS], and the largest prediction [BS]."""
    largest = tl.max(tl.where(inside, p, float("-inf")), axis=1)
    e = tl.where(inside, exp(p - largest[:, None]), 0.0)
    return e, tl.sum(e, axis=1), largest


@triton.jit
def cross_entropy(p, label, weight, o, outputs):
    """Losses [BS] and gradients [BS, OP]; NaN for an unmasked sample whose label is out of range."""
    weight = tl.where((weight != 0) & ((label < 0) | (label >= outputs)), float("nan"), weight)
    e, total, largest = shares(p, (o < outputs)[None, :])
    one_hot = label[:, None] == o[None, :]
    chosen = tl.sum(tl.where(one_hot, p, 0.0), axis=1)
    losses = weight * (log(total) + largest - chosen)
    return losses, e * (weight / total)[:, None] - tl.where(one_hot, weight[:, None], 0.0)


@triton.jit
def softplus_of_minus(size):
    """log(1 + e^-size) for size ≥ 0, corrected for the rounding of 1 + e^-size."""
    e = exp(-size)
    one_e = 1 + e
    return log(one_e) + (e - (one_e - 1)) / one_e


@triton.jit
def elementwise_loss(p, y, weight, inside, LOSS: tl.constexpr):
    """Losses [BS] and gradients [BS, OP] of mse (0) and binary cross-entropy (2)."""
    if LOSS == 0:
        losses = (p - y) * (p - y)
        gradient = 2 * (p - y)
    else:
        losses = tl.where(p <= 0, 0.0, p) + (p - p) - p * y + softplus_of_minus(tl.abs(p))
        gradient = sigmoid(p) - y
    return weight * tl.sum(tl.where(inside, losses, 0.0), axis=1), weight[:, None] * gradient


@triton.jit
def loss_pass(
    predictions, delta, y, mask, factor, samples, outputs,
    LOSS: tl.constexpr, MASKED: tl.constexpr, OP: tl.constexpr,
):  # fmt: skip
    """The task's loss; writes the gradient by the predictions to ``delta``. ``y`` is [S, O], or labels [S]."""
    BS: tl.constexpr = loss_block(OP)
    o = tl.arange(0, OP)
    totals = tl.zeros([BS], predictions.dtype.element_ty)
    for start in range(0, samples, BS):
        s = start + tl.arange(0, BS)
        at = s[:, None] * outputs + o[None, :]
        inside = (s < samples)[:, None] & (o < outputs)[None, :]
        p = tl.load(predictions + at, mask=inside, other=0.0)
        weight = sample_weights(mask, factor, s, samples, MASKED)
        if LOSS == 1:
            label = tl.load(y + s, mask=s < samples, other=0)
            losses, gradient = cross_entropy(p, label, weight, o, outputs)
        else:
            target = tl.load(y + at, mask=inside, other=0.0).to(p.dtype)
            losses, gradient = elementwise_loss(p, target, weight, inside, LOSS)
        totals += losses
        tl.store(delta + at, gradient, mask=inside)
    return tl.sum(totals, axis=0)


@triton.jit
def loss_tangent_pass(
    predictions, tangents, delta_tangents, mask, factor, samples, outputs,
    LOSS: tl.constexpr, MASKED: tl.constexpr, OP: tl.constexpr,
):  # fmt: skip
    """Write the derivative of loss_pass's gradient in the direction ``tangents`` of the predictions."""
    BS: tl.constexpr = loss_block(OP)
    o = tl.arange(0, OP)
    for start in range(0, samples, BS):
        s = start + tl.arange(0, BS)
        at = s[:, None] * outputs + o[None, :]
        inside = (s < samples)[:, None] & (o < outputs)[None, :]
        p = tl.load(predictions + at, mask=inside, other=0.0)
        t = tl.load(tangents + at, mask=inside, other=0.0)
        weight = sample_weights(mask, factor, s, samples, MASKED)[:, None]
        if LOSS == 0:
            result = 2 * weight * t
        elif LOSS == 1:
            share, total, _largest = shares(p, (o < outputs)[None, :])
            share /= total[:, None]
            result = weight * share * (t - tl.sum(share * t, axis=1)[:, None])
        else:
            h = sigmoid(p)
            result = weight * h * (1 - h) * t
        tl.store(delta_tangents + at, result, mask=inside)


# --------------------------------------------------------------------------------------------------- copies


@triton.jit
def copy(source, target, size):
    """Copy ``size`` elements, cast to the target's dtype."""
    lanes = tl.arange(0, BLOCK)
    for start in range(0, size, BLOCK):
        x = to_arithmetic(tl.load(source + start + lanes, mask=start + lanes < size, other=0.0))
        tl.store(target + start + lanes, x.to(target.dtype.element_ty), mask=start + lanes < size)
