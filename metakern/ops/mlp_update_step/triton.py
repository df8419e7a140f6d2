"""mlp_update_step by Triton kernels: launch configurations, launches, and the operators.

Triton rather than CUDA C++: one source serves every width, number of layers and dtype. Features and network, forward
and backward, are Triton kernels. Sums over the rows and columns of a tensor, and what has one entry a row or column,
are PyTorch operations (triton_factors.py). Triton kernels take no list of pointers, so every tensor has launches of its
own; nothing is concatenated but the weights. Results do not depend on the order of the programs. Backward needs memory
for 41 numbers a coordinate of one tensor at a time.

Axis legend: M tensors, T tasks, n coordinates of a segment (one tensor of one task), W hidden units, WP = W padded,
L hidden layers. Needs the package triton, 3.6 or newer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from metakern.ops.core.triton_launch import Config, launch, launch_in_parts, split
from metakern.ops.core.triton_sums import add_rows
from metakern.ops.mlp_update_step.autograd import step, step_backward
from metakern.ops.mlp_update_step.factors import factored_axes
from metakern.ops.mlp_update_step.reference import TENSOR_FEATURES, TIME_FEATURES
from metakern.ops.mlp_update_step.triton_factors import (
    Factors,
    Geometry,
    averaged,
    factors,
    factors_backward,
    mean_squares,
)
from metakern.ops.mlp_update_step.triton_kernels import (
    coordinates_kernel,
    moments_kernel,
    network_kernel,
    update_kernel,
)
from metakern.ops.mlp_update_step.triton_network import biases_kernel

#: Of the kernels; not timed on a GPU. Other blocks change the last bits of sums.
MOMENTS_CONFIG, UPDATE_CONFIG, COORDINATES_CONFIG = Config(128, 4), Config(64, 4), Config(64, 4)

#: Of backward's network, up to 32 units and more, by spilled bytes and compile time among 16 to 128 coordinates and 4
#: to 16 warps. Larger blocks of 64 units spill kilobytes, and on sm_80 take minutes to compile; in float64 they need
#: more shared memory than sm_80 has.
NETWORK_CONFIG, WIDE_NETWORK_CONFIG = Config(32, 4), Config(16, 8)

#: Maximum chunks of a segment, each with a row of partial sums, and programs of a launch that sum for the weights.
MAX_CHUNKS, MAX_PROGRAMS = 1024, 512


class _Cut(NamedTuple):
    """How the segments of one tensor are cut into chunks of blocks, by their size alone."""

    blocks: int
    blocks_per_chunk: int
    chunks: int

    @classmethod
    def of(cls, n: int, block: int) -> _Cut:
        blocks = triton.cdiv(n, block)
        blocks_per_chunk = triton.cdiv(blocks, MAX_CHUNKS)
        return cls(blocks, blocks_per_chunk, triton.cdiv(blocks, blocks_per_chunk))


class _Network(NamedTuple):
    """The network of a call: weights as one tensor, time features [T, 11], first biases [T, W], and sizes."""

    weights: Tensor
    time: Tensor
    biases: Tensor
    exp_mult: tuple[int, ...]
    width: int
    padded: int
    layers: int

    @classmethod
    def of(cls, a: Any) -> _Network:
        width, tasks = a.weights[0].shape[0], a.steps.shape[0]
        padded = max(16, 1 << (width - 1).bit_length())  # a power of two of at least 16, as tl.dot requires
        weights = torch.cat([w.reshape(-1) for w in a.weights])
        time, biases = weights.new_empty(tasks, TIME_FEATURES), weights.new_empty(tasks, width)
        if tasks:
            arguments = (weights, a.steps.contiguous(), time, biases)
            launch_in_parts(biases_kernel, tasks, Config(0, 4), *arguments, W=width, WP=padded)
        return cls(weights, time, biases, tuple(split(a.exp_mult)), width, padded, len(a.weights) // 2 - 1)

    @property
    def constants(self) -> dict[str, int]:
        """The kernels' constants."""
        return {"W": self.width, "WP": self.padded, "L": self.layers}


class _Inputs(NamedTuple):
    """What kernels read of one tensor, contiguous. r and c are the new ones; only moments_kernel gets an old V."""

    grads: Tensor
    params: Tensor
    m: Tensor
    v: Tensor
    r: Tensor
    c: Tensor
    factors: Factors

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """r, c, R and C, as all kernels take them."""
        return self.r, self.c, *self.factors


def _contiguous(xs: Any) -> list[Tensor]:
    return [x.contiguous() for x in xs]


def _in_order(columns: Tensor) -> Tensor:
    """The 28 features of [..., 32], the columns of a matrix as in triton_features.py, in the network's order."""
    by_lane = columns.unflatten(-1, (4, 8))
    three, last = by_lane[..., :3, :].unbind(-1), by_lane[..., 3, :4].split(1, -1)
    return torch.cat([*last[:2], three[0], last[2], three[1], last[3], *three[2:]], -1)


# ---------------------------------------------------------------------------------------------------------- forward


@step.triton_kernel
def mlp_update_step_triton(a: Any) -> tuple[Any, ...]:
    """One step of every tensor; arguments and results as in :data:`metakern.ops.mlp_update_step.autograd.step`."""
    network, decays, rates, keep = _Network.of(a), *_contiguous((a.decays, a.rates, a.keep))
    norms = rates.new_zeros(*rates.shape, TENSOR_FEATURES)
    new: list[list[Tensor]] = [[], [], [], [], []]
    for index in range(len(a.params)):
        old = [xs[index].contiguous() for xs in (a.params, a.grads, a.m, a.v, a.r, a.c)]
        if old[0].numel():
            results = _step(old, decays, (rates[index], keep[index]), norms[index], network)
        else:
            results = [x.clone() for x in (old[0], *old[2:])]
        for xs, x in zip(new, results, strict=True):
            xs.append(x)
    return *new, norms


def _step(
    old: list[Tensor], decays: Tensor, numbers: tuple[Tensor, Tensor], norms: Tensor, network: _Network
) -> list[Tensor]:
    """New params and moments of one tensor; writes its norms [T, 28]. ``numbers``: its rates and keep, [T] each."""
    params, grads, m, v, r, c = old
    geometry, axes, tasks = Geometry.of(params.shape[1:]), factored_axes(params.shape[1:]), params.shape[0]
    new_params, new_m, new_v = torch.empty_like(params), torch.empty_like(m), torch.empty_like(v)
    if axes is None:
        new_r, new_c = torch.empty_like(r), c.clone()
        inputs = _Inputs(grads, params, m, v, r, c, Factors(r, r))
    else:
        squares = mean_squares(grads, axes, decays.dtype)
        new_r, new_c = (averaged(x, square, decays) for x, square in zip((r, c), squares, strict=True))
        inputs = _Inputs(grads, params, m, v, new_r, new_c, factors(new_r, new_c, axes))
    constants = {"KIND": geometry.kind, "WIDE": geometry.wide}
    block, cut = MOMENTS_CONFIG.block, _Cut.of(geometry.n, MOMENTS_CONFIG.block)
    partials = decays.new_empty(tasks, cut.chunks, 32)
    arguments = (*inputs[:4], *inputs.tables, decays, new_m, new_v, new_r, partials, *geometry[1:], *cut)
    launch_in_parts(moments_kernel, tasks * cut.chunks, MOMENTS_CONFIG, *arguments, **constants, BLOCK=block)
    norms.copy_(_in_order(add_rows(partials) / geometry.n + 1e-5).rsqrt())
    tables, (rates, keep) = inputs._replace(r=new_r).tables, numbers
    block = UPDATE_CONFIG.block
    blocks = triton.cdiv(geometry.n, block)
    arguments = (grads, params, new_m, new_v, *tables, norms, network.weights, network.biases, rates, keep, new_params)
    arguments += (*geometry[1:], blocks, *network.exp_mult)
    launch_in_parts(
        update_kernel, tasks * blocks, UPDATE_CONFIG, *arguments, **constants, **network.constants, BLOCK=block
    )
    return [new_params, new_m, new_v, new_r, new_c]


# --------------------------------------------------------------------------------------------------------- backward


class _Sums(NamedTuple):
    """Sums of one tensor's coordinates in float64: for its tasks, [T, .], the decays, [7], and the weights."""

    rates: Tensor
    keep: Tensor
    first_bias: Tensor
    decays: Tensor
    weights: Tensor


@step_backward.triton_kernel
def mlp_update_step_triton_backward(a: Any) -> tuple[Any, ...]:
    """Gradients as in :data:`metakern.ops.mlp_update_step.autograd.step_backward`."""
    network, decays = _Network.of(a), a.decays.contiguous()
    numbers = _contiguous((a.norms, a.rates, a.keep))
    found: list[list[Tensor]] = [[], [], [], [], [], []]
    by_rates, by_keep = torch.zeros_like(a.rates), torch.zeros_like(a.keep)
    by_decays = decays.new_zeros(decays.shape, dtype=torch.float64)
    by_bias, by_weights = network.biases.new_zeros(network.biases.shape, dtype=torch.float64), None
    for index in range(len(a.params)):
        above = [x[index].contiguous() for x in (a.grad_new_params, *(getattr(a, f"grad_new_{k}") for k in "mvrc"))]
        old = [xs[index].contiguous() for xs in (a.params, a.grads, a.m, a.v, a.r, a.c)]
        if old[0].numel():
            new = (a.new_r[index].contiguous(), a.new_c[index].contiguous())
            own = tuple(x[index] for x in numbers)
            gradients, sums = _backward(above, old, new, decays, own, network)
            by_rates[index], by_keep[index] = sums.rates, sums.keep
            by_decays, by_bias = by_decays + sums.decays, by_bias + sums.first_bias
            by_weights = sums.weights if by_weights is None else by_weights + sums.weights
        else:
            gradients = [x.clone() for x in (above[0], above[0], *above[1:])]
        for xs, x in zip(found, gradients, strict=True):
            xs.append(x)
    if by_weights is None:
        of_weights = [torch.zeros_like(w) for w in a.weights]
    else:
        of_weights = _of_weights(by_weights, by_bias, network, a.weights)
    return *found, of_weights, by_decays.to(decays.dtype), by_rates, by_keep


def _backward(
    above: list[Tensor],
    old: list[Tensor],
    new: tuple[Tensor, Tensor],
    decays: Tensor,
    numbers: tuple[Tensor, ...],
    network: _Network,
) -> tuple[list[Tensor], _Sums]:
    """Gradients of one tensor's params, grads and moments, and its sums.

    ``above``: gradients of the new params and moments; ``numbers``: the tensor's norms, rates and keep.
    """
    params, grads, m, v, r, c = old
    geometry, axes = Geometry.of(params.shape[1:]), factored_axes(params.shape[1:])
    inputs = _Inputs(grads, params, m, v, *new, Factors(new[0], new[0]) if axes is None else factors(*new, axes))
    by_features, of_tasks, by_weights = _network_backward(above[0], inputs, geometry, decays, numbers, network)
    by_norm, by_rates, by_keep, by_bias = of_tasks.split([32, 1, 1, network.padded], 1)
    slopes = (_by_columns(numbers[0]).square() * by_norm / geometry.n).to(decays.dtype)
    cut, tasks = _Cut.of(geometry.n, COORDINATES_CONFIG.block), params.shape[0]
    partials = decays.new_empty(tasks, cut.chunks, 8)
    work = params if axes is None else v  # the gradient of g is finished below
    by_params, by_grads = torch.empty_like(params), torch.empty_like(work)
    by_m, by_v = torch.empty_like(m), torch.empty_like(v)
    by_r = torch.empty_like(r)
    by_factors = by_r if axes is None else v.new_empty(tasks, 9, *params.shape[1:])
    launch_in_parts(
        coordinates_kernel,
        tasks * cut.chunks,
        COORDINATES_CONFIG,
        *(by_features, slopes, *above[:4], *inputs[:4], r, *inputs.tables, decays, numbers[2]),
        *(by_params, by_grads, by_m, by_v, by_r, by_factors, partials, *geometry[1:], *cut),
        KIND=geometry.kind,
        WIDE=geometry.wide,
        BLOCK=COORDINATES_CONFIG.block,
    )
    by_decays, by_c = add_rows(partials)[:, :7].sum(0), torch.zeros_like(c)
    if axes is not None:
        of_factors = factors_backward(by_factors, (above[3], above[4]), (r, c), new[0], grads, decays)
        by_r, by_c = of_factors.r, of_factors.c
        by_grads = torch.addcmul(by_grads, grads.to(by_grads.dtype), of_factors.slope, value=2).to(grads.dtype)
        by_decays = torch.cat([by_decays[:4], of_factors.decays])
    sums = _Sums(by_rates[:, 0], by_keep[:, 0], by_bias[:, : network.width], by_decays, by_weights)
    return [by_params, by_grads, by_m, by_v, by_r, by_c], sums


def _network_backward(
    grad_new_params: Tensor,
    inputs: _Inputs,
    geometry: Geometry,
    decays: Tensor,
    numbers: tuple[Tensor, ...],
    network: _Network,
) -> tuple[Tensor, Tensor, Tensor]:
    """norm·dy of every coordinate, [T, n, 32], and the sums of :func:`network_kernel` for the tasks and the weights."""
    tasks, padded = inputs.params.shape[0], network.padded
    config = NETWORK_CONFIG if padded <= 32 else WIDE_NETWORK_CONFIG
    cut = _Cut.of(geometry.n, config.block)
    items = tasks * cut.chunks
    items_per_program = triton.cdiv(items, MAX_PROGRAMS)
    programs = triton.cdiv(items, items_per_program)
    by_features = decays.new_empty(tasks, geometry.n, 32)
    partials = decays.new_empty(tasks, cut.chunks, 34 + padded)
    row = 32 * padded + (network.layers - 1) * (padded * padded + padded) + 2 * padded + 2
    weight_partials = decays.new_empty(1, programs, row)
    norms, rates, keep = numbers
    launch(
        network_kernel,
        programs,
        config,
        *(grad_new_params, *inputs[:4], *inputs.tables, decays, norms, network.weights, network.biases, rates, keep),
        *(by_features, partials, weight_partials, *geometry[1:], *cut, items, items_per_program, *network.exp_mult),
        KIND=geometry.kind,
        WIDE=geometry.wide,
        **network.constants,
        BLOCK=config.block,
    )
    return by_features, add_rows(partials), add_rows(weight_partials)[0]


def _by_columns(features: Tensor) -> Tensor:
    """The 28 features of [T, 28] as [T, 32], in the order of a matrix's columns; zeros elsewhere."""
    x = features.double()
    three = [x[:, start : start + 3] for start in (2, 6, 10, 13, 16, 19, 22, 25)]
    last = torch.cat([x[:, :2], x[:, 5:6], x[:, 9:10], x.new_zeros(x.shape[0], 4)], 1)
    return torch.cat([torch.stack(three, 2), last.unsqueeze(1)], 1).flatten(1)


def _of_weights(sums: Tensor, by_bias: Tensor, network: _Network, weights: list[Tensor]) -> list[Tensor]:
    """The weights' gradients from a row of sums as :func:`network_kernel` lays it out, and from the first bias's."""
    width, padded, hidden = network.width, network.padded, network.layers - 1
    first, *others = sums.split([32 * padded, *[padded * padded, padded] * hidden, 2 * padded, 2])
    time = (by_bias.unsqueeze(2) * network.time.double().unsqueeze(1)).sum(0)  # [W, 11]
    found = [torch.cat([_in_order(first.view(padded, 32)[:width]), time], 1), by_bias.sum(0)]
    for layer in range(hidden):
        found += [others[2 * layer].view(padded, padded)[:width, :width], others[2 * layer + 1][:width]]
    found += [others[-2].view(2, padded)[:, :width], others[-1]]
    return [torch.empty_like(w).copy_(x) for w, x in zip(weights, found, strict=True)]
