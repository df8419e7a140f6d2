"""hrnn_step by Triton kernels: launch configurations, launches, and the operators.

Triton rather than CUDA C++: the step is bound by bytes on a GPU, its products are 16 wide, and one source serves
float32 and float64. Triton kernels take no list of pointers, so every tensor has launches of its own, three forward
(step, sums, update) and five backward; nothing is concatenated. Results do not depend on the order of the programs.

Axis legend: M tensors, T tasks, n coordinates of a segment (one tensor of one task), H hidden units, R = H + 11 rows of
the state, A = 1 with attention, else 0. Needs the package triton, 3.6 or newer.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from metakern.ops.core.triton_launch import Config, launch, launch_in_parts
from metakern.ops.core.triton_sums import add_rows
from metakern.ops.hrnn_step.autograd import step, step_backward
from metakern.ops.hrnn_step.reference import FEATURES, READOUTS, RMS_EPSILON, SCALES
from metakern.ops.hrnn_step.triton_kernels import (
    backward_kernel,
    forward_kernel,
    products_kernel,
    update_kernel,
)

#: Of the kernels that step and differentiate coordinates, by the fewest spilled bytes among 32 to 128 coordinates and 1
#: to 8 warps (tests/triton/test_compile.py); not timed on a GPU. Other blocks change the last bits of sums.
FORWARD_CONFIG, BACKWARD_CONFIG = Config(64, 8), Config(32, 8)
FLOAT64_CONFIG = Config(32, 4)

#: Of the elementwise kernels.
UPDATE_CONFIG = Config(1024, 4)

#: Maximum chunks of a segment, each with a row of partial sums, and programs of a launch that sum for the weights.
MAX_CHUNKS, MAX_PROGRAMS = 256, 512


class _Cut(NamedTuple):
    """How the segments of one tensor are cut into chunks of blocks, by their size alone."""

    tasks: int
    n: int
    blocks: int
    blocks_per_chunk: int
    chunks: int

    @classmethod
    def of(cls, state: Tensor, block: int) -> _Cut:
        tasks, _, n = state.shape
        blocks = triton.cdiv(n, block)
        blocks_per_chunk = triton.cdiv(blocks, MAX_CHUNKS)
        return cls(tasks, n, blocks, blocks_per_chunk, triton.cdiv(blocks, blocks_per_chunk))


def _padded_hidden(hidden: int) -> int:
    """H padded to a power of two of at least 16, as tl.dot requires."""
    return max(16, 1 << (hidden - 1).bit_length())


def _config(config: Config, state: Tensor) -> Config:
    return FLOAT64_CONFIG if state.dtype == torch.float64 else config


def _has_attention(weights: list[Tensor]) -> bool:
    return len(weights[2]) == len(READOUTS)


# ---------------------------------------------------------------------------------------------------------- forward


@step.triton_kernel
def hrnn_step_triton(a: Any) -> tuple[list[Tensor], list[Tensor], Tensor, list[Tensor], list[Tensor], Tensor]:
    """One step of every coordinate; arguments and results as in :data:`metakern.ops.hrnn_step.autograd.step`."""
    attention, hidden = _has_attention(a.weights), a.biases.shape[2] // 3
    params, grads, states = ([x.contiguous() for x in xs] for xs in (a.params, a.grads, a.states))
    weights = [w.contiguous() for w in a.weights]
    biases, mean_rate = a.biases.contiguous(), a.mean_rate.contiguous()
    new_params, new_states = [torch.empty_like(p) for p in params], [torch.empty_like(x) for x in states]
    attended = [torch.empty_like(p) for p in params] if attention else []
    steps = [x.new_empty((x.shape[0], 1 + attention, x.shape[2])) for x in states]
    means = biases.new_zeros((*biases.shape[:2], hidden + FEATURES + 1))
    rms = biases.new_full((*biases.shape[:2], 1 + attention), math.sqrt(RMS_EPSILON))
    for index, state in enumerate(states):
        if not state.numel():
            continue
        tensors = (grads[index], state, new_states[index], steps[index])
        means[index], rms[index] = _step(tensors, biases[index], mean_rate, weights, attention)
        tasks, _, n = state.shape
        blocks = triton.cdiv(n, UPDATE_CONFIG.block)
        points = attended[index] if attention else new_params[index]
        arguments = (params[index], steps[index], rms[index], new_params[index], points, n, blocks)
        launch_in_parts(
            update_kernel, tasks * blocks, UPDATE_CONFIG, *arguments, A=int(attention), BLOCK=UPDATE_CONFIG.block
        )
    return new_params, new_states, means, attended, steps, rms


def _step(
    tensors: tuple[Tensor, ...], biases: Tensor, mean_rate: Tensor, weights: list[Tensor], attention: bool
) -> tuple[Tensor, Tensor]:
    """Write the new state and the steps of one tensor; returns its means [T, H + 13] and rms [T, 1 + A]."""
    state, hidden = tensors[1], biases.shape[1] // 3
    config, padded = _config(FORWARD_CONFIG, state), _padded_hidden(hidden)
    cut = _Cut.of(state, config.block)
    partials = state.new_empty((cut.tasks, cut.chunks, padded + 16))
    launch_in_parts(
        forward_kernel,
        cut.tasks * cut.chunks,
        config,
        *(*tensors, partials, biases, mean_rate, *weights),
        *cut[1:],
        H=hidden,
        HP=padded,
        A=int(attention),
        BLOCK=config.block,
    )
    mean = add_rows(partials) / cut.n
    squares = mean[:, padded + FEATURES + 1 : padded + FEATURES + 2 + attention]
    return torch.cat([mean[:, :hidden], mean[:, padded : padded + FEATURES + 1]], 1), (squares + RMS_EPSILON).sqrt()


# --------------------------------------------------------------------------------------------------------- backward


@step_backward.triton_kernel
def hrnn_step_triton_backward(a: Any) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, list[Tensor]]:
    """Gradients of all arguments but params, as in :data:`metakern.ops.hrnn_step.autograd.step_backward`."""
    attention = _has_attention(a.weights)
    weights = [w.contiguous() for w in a.weights]
    grads, states = ([x.contiguous() for x in xs] for xs in (a.grads, a.states))
    grad_new_params, grad_new_states = ([x.contiguous() for x in xs] for xs in (a.grad_new_params, a.grad_new_states))
    grad_attended = [x.contiguous() for x in a.grad_attended] if attention else grad_new_params
    biases, mean_rate, rms = a.biases.contiguous(), a.mean_rate.contiguous(), a.rms.contiguous()
    grad_grads, grad_states = [torch.empty_like(g) for g in grads], [torch.empty_like(x) for x in states]
    grad_biases = torch.zeros_like(biases)
    by_mean = biases.new_zeros(biases.shape[:2], dtype=torch.float64)
    hidden, sums = biases.shape[2] // 3, []
    for index, state in enumerate(states):
        if not state.numel():
            continue
        steps = a.steps[index].contiguous()
        above = (grad_new_params[index], grad_attended[index])
        means = (a.grad_means[index] / state.shape[2]).contiguous()
        segments, of_weights = _backward(
            (*above, grad_new_states[index], means, grads[index], state, rms[index], _products(*above, steps)),
            (biases[index], mean_rate, *weights, grad_grads[index], grad_states[index]),
            hidden,
            attention,
        )
        padded = _padded_hidden(hidden)
        rows = segments[:, : 3 * padded].unflatten(1, (3, padded))[..., :hidden]
        grad_biases[index], by_mean[index] = rows.flatten(1), segments[:, -1]
        sums.append(of_weights)
    by_weight = _by_weight(torch.stack(sums).sum(0), weights) if sums else [torch.zeros_like(w) for w in weights]
    return grad_grads, grad_states, grad_biases, by_mean.sum(0).to(mean_rate.dtype), by_weight


def _products(grad_new_params: Tensor, grad_attended: Tensor, steps: Tensor) -> Tensor:
    """Σ grad · step of every segment, [T, 2]."""
    cut = _Cut.of(steps, UPDATE_CONFIG.block)
    partials = steps.new_empty((cut.tasks, cut.chunks, 2))
    launch_in_parts(
        products_kernel,
        cut.tasks * cut.chunks,
        UPDATE_CONFIG,
        *(grad_new_params, grad_attended, steps, partials),
        *cut[1:],
        A=steps.shape[1] - 1,
        BLOCK=UPDATE_CONFIG.block,
    )
    return add_rows(partials).to(steps.dtype)


def _backward(
    above: tuple[Tensor, ...], others: tuple[Tensor, ...], hidden: int, attention: bool
) -> tuple[Tensor, Tensor]:
    """Write the gradients of one tensor's coordinates; returns sums for its segments and for the weights.

    ``above`` and ``others`` are the tensors of :func:`backward_kernel` in order, without the partial sums.
    """
    state = above[5]
    config, padded = _config(BACKWARD_CONFIG, state), _padded_hidden(hidden)
    cut = _Cut.of(state, config.block)
    items = cut.tasks * cut.chunks
    items_per_program = triton.cdiv(items, MAX_PROGRAMS)
    programs = triton.cdiv(items, items_per_program)
    partials = state.new_empty((cut.tasks, cut.chunks, 3 * padded + 1))
    weight_partials = state.new_empty((1, programs, 64 * padded + 3 * padded * padded + 16))
    launch(
        backward_kernel,
        programs,
        config,
        *(*above, *others, partials, weight_partials, *cut[1:], items, items_per_program),
        H=hidden,
        HP=padded,
        A=int(attention),
        BLOCK=config.block,
    )
    return add_rows(partials), add_rows(weight_partials)[0]


def _by_weight(sums: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """The weights' gradients from a row of sums, whose layout :func:`backward_kernel` describes."""
    hidden = weights[1].shape[0]
    padded = _padded_hidden(hidden)
    by_x, by_h, by_readout, by_number = sums.split([48 * padded, 3 * padded * padded, 16 * padded, 16])
    by_x = by_x.view(3, padded, 16)[:, :hidden, :FEATURES]
    by_h = by_h.view(3, padded, padded)[:, :hidden, :hidden]
    both = torch.cat([by_x, by_h], 2)  # [r u c, H, 12 + H]
    kept = weights[4][4].double().sigmoid()
    scalars = torch.stack([*by_number[1:4], by_number[9], by_number[10] * kept * (1 - kept)])
    found = (
        both[:2].flatten(0, 1),
        both[2],
        by_readout.view(16, padded)[: weights[2].shape[0], :hidden],
        by_number[5 : 5 + SCALES],
        scalars,
    )
    return [torch.empty_like(w).copy_(x) for w, x in zip(weights, found, strict=True)]
