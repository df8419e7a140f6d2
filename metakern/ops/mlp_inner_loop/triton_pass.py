# mypy: disable-error-code="no-untyped-def"
"""One pass of one task's small MLP by one program: forward, gradient, and Hessian-vector product.

Hessian products by forward over reverse (Pearlmutter 1994): the derivative of the gradient in a direction.

Axis legend: S samples of the task, U units of all layers together, P parameters: per layer weight [units, inputs] and
bias [units]. ``theta``, ``direction`` and every gradient are [P]. A record of a pass is [4, U S]: z before the
activation, h after it, the gradients e by h and δ by z, in each [S, units] of the layers one behind the other; tangents
are a record of their derivatives.

Everything lies in global memory, in the cache, and threads read there what other threads of the program wrote:
``tl.debug_barrier()`` stands between. It becomes ``ttg.barrier all``, then ``bar.sync 0``, CUDA's ``__syncthreads``:
accesses of shared and global memory before it are visible after it to all threads of the block. Of itself the compiler
places barriers for shared memory alone: a store and a load of one global address without one are a race (triton-lang
issues 9887 and 10924). It moves no load across a barrier, not even out of a loop that has nothing else in it, nor
across a store (looked up in the PTX of Triton 3.6 and 3.9). Two rules follow. Every function here ends in a barrier
once it has written. And what is read, changed and written back to one address is not used again in that phase: where
a layout gives an element to several threads, one of them stores, and another may load after that.

Products of BS samples by BU units are float32 sums of float32 products, or float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from metakern.ops.core.triton_arithmetic import scalar
from metakern.ops.mlp_inner_loop.triton_functions import activation, slope_times, tangent

#: Columns of a network's table, one row per tensor; keep in step with metakern/ops/mlp_inner_loop/triton.py.
OFFSET, SIZE, INPUTS, UNITS, BEFORE, ADAPTED, SLOT, PER_PARAMETER, STEP = map(tl.constexpr, range(9))
KIND, LEAK, LEAK_LOW = map(tl.constexpr, range(9, 12))
COLUMNS = tl.constexpr(12)

#: Inner block size of products: tl.dot's minimum, which needs the fewest registers.
DEPTH = tl.constexpr(16)


@triton.jit
def entry(table, tensor, column: tl.constexpr):
    """One entry of a network's table."""
    return tl.load(table + tensor * COLUMNS + column)


@triton.jit
def layer_sizes(table, layer):
    """A layer's inputs, units, the units of the layers before, and the offsets of its weight and bias."""
    inputs, units = entry(table, 2 * layer, INPUTS), entry(table, 2 * layer, UNITS)
    weight, bias = entry(table, 2 * layer, OFFSET), entry(table, 2 * layer + 1, OFFSET)
    return inputs, units, entry(table, 2 * layer, BEFORE), weight, bias


@triton.jit
def layer_activation(table, layer, like):
    """Kind of a layer's activation, and its slope at and below zero (a host scalar)."""
    leak = scalar(entry(table, 2 * layer, LEAK), entry(table, 2 * layer, LEAK_LOW), like)
    return entry(table, 2 * layer, KIND), leak


@triton.jit
def layer_input(x, h, layer, inputs, before, samples):
    """A layer's input [S, inputs]: the samples, or the activations of the layer below."""
    result = x
    if layer > 0:
        result = h + (before - inputs) * samples
    return result


@triton.jit
def add_product(
    total, a, a_row, a_column, rows, b, b_row, b_column, columns, depth, m, n
):  # fmt: skip
    """``total`` + A B of rows ``m`` of A [rows, depth] and columns ``n`` of B [depth, columns], given by strides."""
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        at_a = m[:, None] * a_row + k[None, :] * a_column
        at_b = k[:, None] * b_row + n[None, :] * b_column
        x = tl.load(a + at_a, mask=(m < rows)[:, None] & (k < depth)[None, :], other=0.0)
        y = tl.load(b + at_b, mask=(k < depth)[:, None] & (n < columns)[None, :], other=0.0)
        total = tl.dot(x, y, total, input_precision="ieee", out_dtype=total.dtype)
    return total


@triton.jit
def forward_pass(
    theta, x, record, samples, net,
    ACTIVATION: tl.constexpr, BS: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """Compute z and h of every layer; the last are the predictions."""
    table, layers, units_total = net
    size = units_total * samples
    for layer in range(layers):
        inputs, units, before, weight, bias = layer_sizes(table, layer)
        below = layer_input(x, record + size, layer, inputs, before, samples)
        for first in range(0, samples, BS):
            s = first + tl.arange(0, BS)
            for unit in range(0, units, BU):
                u = unit + tl.arange(0, BU)
                z = tl.zeros([BS, BU], theta.dtype.element_ty)
                z += tl.load(theta + bias + u, mask=u < units, other=0.0)[None, :]
                z = add_product(z, below, inputs, 1, samples, theta + weight, 1, inputs, units, inputs, s, u)
                at = before * samples + s[:, None] * units + u[None, :]
                inside = (s < samples)[:, None] & (u < units)[None, :]
                tl.store(record + at, z, mask=inside)
                kind, leak = layer_activation(table, layer, z)
                tl.store(record + size + at, activation(z, kind, leak, ACTIVATION), mask=inside)
        tl.debug_barrier()


@triton.jit
def backward_pass(
    theta, record, samples, net,
    ACTIVATION: tl.constexpr, BS: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """Compute the gradients by all pre-activations, from those of the last layer."""
    table, layers, units_total = net
    size = units_total * samples
    for done in range(1, layers):
        layer = layers - done
        inputs, units, before, weight, _bias = layer_sizes(table, layer)
        delta = record + 3 * size + before * samples
        for first in range(0, samples, BS):
            s = first + tl.arange(0, BS)
            for unit in range(0, inputs, BU):
                u = unit + tl.arange(0, BU)
                e = tl.zeros([BS, BU], theta.dtype.element_ty)
                e = add_product(e, delta, units, 1, samples, theta + weight, inputs, 1, inputs, units, s, u)
                at = (before - inputs) * samples + s[:, None] * inputs + u[None, :]
                inside = (s < samples)[:, None] & (u < inputs)[None, :]
                z = tl.load(record + at, mask=inside, other=0.0)
                h = tl.load(record + size + at, mask=inside, other=0.0)
                kind, leak = layer_activation(table, layer - 1, z)
                tl.store(record + 2 * size + at, e, mask=inside)
                tl.store(record + 3 * size + at, slope_times(z, h, e, kind, leak, ACTIVATION), mask=inside)
        tl.debug_barrier()


@triton.jit
def gradient_pass(
    out, factor, x, deltas, record, tangents, samples, net,
    ADD: tl.constexpr, TANGENT: tl.constexpr, BS: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """``out`` (+)= factor · Σ over samples of δ ⊗ input, and of δ; with TANGENT the derivative of that.

    ``deltas`` are the record's δ, or with TANGENT the tangents' δ.
    """
    table, layers, units_total = net
    size = units_total * samples
    for layer in range(layers):
        inputs, units, before, weight, bias = layer_sizes(table, layer)
        delta = deltas + before * samples
        below = layer_input(x, record + size, layer, inputs, before, samples)
        for first in range(0, units, BU):
            u = first + tl.arange(0, BU)
            for start in range(0, inputs, BU):
                i = start + tl.arange(0, BU)
                g = tl.zeros([BU, BU], out.dtype.element_ty)
                g = add_product(g, delta, 1, units, units, below, inputs, 1, inputs, samples, u, i)
                if TANGENT:
                    moved = layer_input(tangents, tangents + size, layer, inputs, before, samples)
                    count = tl.where(layer > 0, samples, 0)  # the samples have no tangent
                    own = record + 3 * size + before * samples
                    g = add_product(g, own, 1, units, units, moved, inputs, 1, inputs, count, u, i)
                at = out + weight + u[:, None] * inputs + i[None, :]
                inside = (u < units)[:, None] & (i < inputs)[None, :]
                g *= factor
                if ADD:
                    g += tl.load(at, mask=inside, other=0.0)
                tl.store(at, g, mask=inside)
            sums = tl.zeros([BU], out.dtype.element_ty)
            for start in range(0, samples, BS):
                s = start + tl.arange(0, BS)
                inside = (s < samples)[:, None] & (u < units)[None, :]
                sums += tl.sum(tl.load(delta + s[:, None] * units + u[None, :], mask=inside, other=0.0), axis=0)
            sums *= factor
            if ADD:
                sums += tl.load(out + bias + u, mask=u < units, other=0.0)
            tl.store(out + bias + u, sums, mask=u < units)
    tl.debug_barrier()


@triton.jit
def tangent_forward_pass(
    theta, direction, x, record, tangents, samples, net,
    ACTIVATION: tl.constexpr, BS: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """Derivatives of z and h when theta moves along ``direction``."""
    table, layers, units_total = net
    size = units_total * samples
    for layer in range(layers):
        inputs, units, before, weight, bias = layer_sizes(table, layer)
        below = layer_input(x, record + size, layer, inputs, before, samples)
        moved = layer_input(tangents, tangents + size, layer, inputs, before, samples)
        depth = tl.where(layer > 0, inputs, 0)
        for first in range(0, samples, BS):
            s = first + tl.arange(0, BS)
            for unit in range(0, units, BU):
                u = unit + tl.arange(0, BU)
                tz = tl.zeros([BS, BU], theta.dtype.element_ty)
                tz += tl.load(direction + bias + u, mask=u < units, other=0.0)[None, :]
                tz = add_product(tz, below, inputs, 1, samples, direction + weight, 1, inputs, units, inputs, s, u)
                tz = add_product(tz, moved, inputs, 1, samples, theta + weight, 1, inputs, units, depth, s, u)
                at = before * samples + s[:, None] * units + u[None, :]
                inside = (s < samples)[:, None] & (u < units)[None, :]
                z = tl.load(record + at, mask=inside, other=0.0)
                h = tl.load(record + size + at, mask=inside, other=0.0)
                kind, leak = layer_activation(table, layer, z)
                tl.store(tangents + at, tz, mask=inside)
                tl.store(tangents + size + at, slope_times(z, h, tz, kind, leak, ACTIVATION), mask=inside)
        tl.debug_barrier()


@triton.jit
def tangent_backward_pass(
    theta, direction, record, tangents, samples, net,
    ACTIVATION: tl.constexpr, BS: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """Derivatives of all δ, from those of the last layer."""
    table, layers, units_total = net
    size = units_total * samples
    for done in range(1, layers):
        layer = layers - done
        inputs, units, before, weight, _bias = layer_sizes(table, layer)
        delta = 3 * size + before * samples
        for first in range(0, samples, BS):
            s = first + tl.arange(0, BS)
            for unit in range(0, inputs, BU):
                u = unit + tl.arange(0, BU)
                te = tl.zeros([BS, BU], theta.dtype.element_ty)
                te = add_product(
                    te, tangents + delta, units, 1, samples, theta + weight, inputs, 1, inputs, units, s, u
                )  # fmt: skip
                te = add_product(
                    te, record + delta, units, 1, samples, direction + weight, inputs, 1, inputs, units, s, u
                )  # fmt: skip
                at = (before - inputs) * samples + s[:, None] * inputs + u[None, :]
                inside = (s < samples)[:, None] & (u < inputs)[None, :]
                z = tl.load(record + at, mask=inside, other=0.0)
                h = tl.load(record + size + at, mask=inside, other=0.0)
                e = tl.load(record + 2 * size + at, mask=inside, other=0.0)
                tz = tl.load(tangents + at, mask=inside, other=0.0)
                kind, leak = layer_activation(table, layer - 1, z)
                moved = tangent(z, h, te, e * tz, kind, leak, ACTIVATION)
                tl.store(tangents + 3 * size + at, moved, mask=inside)
        tl.debug_barrier()
