"""lstm_step by Triton kernels: launch configurations, launches, and the operators.

Forward is one launch. Backward goes slab by slab, so that its workspace stays small: it recomputes features and the
hidden states of the lower layers, then, from the top layer down, launches one kernel for the coordinates' gradients and
one for partial sums of the weights' gradients; a last launch adds those. Results do not depend on the programs' order.

Axis legend: N coordinates, F features (1 or 2), H hidden units, L layers; the state is
[ceil(N/32), L, 2 (h, c), H, 32]. Needs the package triton, 3.6 or newer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from metakern.ops.core.triton_launch import Config, is_interpreted, launch, split
from metakern.ops.lstm_step.autograd import step, step_, step_backward
from metakern.ops.lstm_step.triton_kernels import (
    backward_kernel,
    features_backward_kernel,
    features_kernel,
    forward_kernel,
    sum_kernel,
    weights_kernel,
)

_LANES = 32


#: By kernel, padded hidden units, and whether the GPU has compute capability 9 or 10. Chosen so that the compiler
#: does not spill registers (tests/triton/test_compile.py). May be tuned: "forward" changes no result, "backward" and
#: "weights" only the last bits of the weights' gradients.
CONFIGS = {
    ("forward", 16, True): Config(128, 8),
    ("forward", 16, False): Config(64, 8),
    ("forward", 32, True): Config(128, 8),
    ("forward", 32, False): Config(64, 8),
    ("forward", 64, True): Config(64, 8),
    ("forward", 64, False): Config(32, 8),
    ("backward", 16, True): Config(128, 8),
    ("backward", 16, False): Config(32, 8),
    ("backward", 32, True): Config(128, 8),
    ("backward", 32, False): Config(32, 8),
    ("backward", 64, True): Config(64, 8),
    ("backward", 64, False): Config(32, 8),
    ("weights", 16, True): Config(64, 8),
    ("weights", 16, False): Config(64, 8),
    ("weights", 32, True): Config(64, 8),
    ("weights", 32, False): Config(32, 8),
    ("weights", 64, True): Config(32, 8),
    ("weights", 64, False): Config(32, 8),
}

#: For the elementwise kernels of the features and their gradients.
FEATURES_CONFIG = Config(512, 4)

#: For float64, whose products take four times the registers.
FLOAT64_CONFIG = Config(32, 8)

#: Maximum chunks per slab of coordinates for the weights' gradients: two programs per multiprocessor of a large GPU.
#: The slab is as large as its workspace allows: 800 bytes per coordinate with H = 20 and L = 2.
MAX_CHUNKS = 256
WORKSPACE_BYTES = 2**27

#: Block sizes (weights, chunks) of the last sum.
SUM_WEIGHTS, SUM_CHUNKS = 32, 32


# -------------------------------------------------------------------------------------------------------- launchers


def _padded_hidden(hidden: int) -> int:
    """H padded to a power of two of at least 16, as tl.dot requires."""
    return max(16, 1 << (hidden - 1).bit_length())


@functools.cache
def _has_warpgroups(index: int | None) -> bool:
    """Whether a CUDA device has warpgroup products (Hopper, Blackwell); assumed if there is no device."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(index)[0] in (9, 10)


def _config(kernel: str, state: Tensor) -> Config:
    if state.dtype == torch.float64:
        return FLOAT64_CONFIG
    return CONFIGS[kernel, _padded_hidden(state.shape[3]), _has_warpgroups(state.device.index)]


def _scalars(preprocess_scale: float, output_scale: float) -> list[int]:
    p = float(preprocess_scale)
    return split(p, math.exp(p), math.exp(-p), float(output_scale))


def _fourteen(weights: Sequence[Tensor]) -> list[Tensor]:
    """The 14 weights of three layers and the head; an unread placeholder stands for each missing layer's."""
    *layers, head_weight, head_bias = weights
    return [*layers, *[head_bias] * (12 - len(layers)), head_weight, head_bias]


def _forward(
    kernel: Any,
    params: Tensor,
    grads: Tensor,
    state: Tensor,
    new_params: Tensor,
    new_state: Tensor,
    weights: Sequence[Tensor],
    preprocess: int,
    preprocess_scale: float,
    output_scale: float,
    precision: int,
    depth: int | None = None,
) -> None:
    """Write new_params and new_state by the forward kernel, plain or wrapped for tracing.

    All tensors are contiguous; for an in-place update new_params and new_state are params and state. With ``depth``
    below L, only the state of the lowest ``depth`` layers is written.
    """
    n = params.numel()
    if n == 0:
        return
    _, layers, _, hidden, _ = state.shape
    config = _config("forward", state)
    launch(
        kernel,
        triton.cdiv(n, config.block),
        config,
        *(params, grads, state, new_params, new_state),
        *_fourteen([w.contiguous() for w in weights]),
        n,
        *_scalars(preprocess_scale, output_scale),
        PREPROCESS=preprocess,
        H=hidden,
        L=layers,
        HP=_padded_hidden(hidden),
        PRECISION=precision,
        BLOCK=config.block,
        IN_PLACE=new_state is state,
        DEPTH=layers if depth is None else depth,
    )


class _Sums(NamedTuple):
    """Offsets of the weights' gradients in a row of partial sums; the two biases of a layer share one.

    :func:`sum_kernel` uses the same layout.
    """

    layers: list[int]  # where each layer begins: weight_ih, weight_hh, bias
    length: int

    @classmethod
    def of(cls, features: int, hidden: int, layers: int) -> _Sums:
        starts, at = [], 0
        for layer in range(layers):
            starts.append(at)
            at += 4 * hidden * ((hidden if layer else features) + hidden + 1)
        return cls(starts, at + hidden + 1)


def _backward(
    grad_new_params: Tensor,
    grad_new_state: Tensor,
    grads: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    preprocess: int,
    preprocess_scale: float,
    output_scale: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Slab by slab, the coordinates' gradients and the weights' partial sums; then the sum of the partials."""
    n = grads.numel()
    if n == 0:
        return torch.empty_like(grads), torch.empty_like(state), [torch.zeros_like(w) for w in weights]
    _, layers, _, hidden, _ = state.shape
    features = weights[0].shape[1]
    sums = _Sums.of(features, hidden, layers)
    rows = 6 * hidden + 2 + features + 2 * layers * hidden  # of 32 numbers: the workspace of a tile
    slab = max(WORKSPACE_BYTES // (rows * _LANES * weights[0].element_size()) // 8, 1) * 8  # whole blocks
    tiles = state.shape[0]
    work = weights[0].new_empty((min(tiles, slab), rows, _LANES))
    partials = weights[0].new_zeros((MAX_CHUNKS, sums.length))
    grad_grads, grad_state = torch.empty_like(grads), torch.empty_like(state)
    grad_weights = [torch.empty_like(w) for w in weights]
    for first in range(0, int(triton.cdiv(tiles, slab)) * slab, slab):
        coordinates = slice(first * _LANES, (first + slab) * _LANES)
        flat = [x.view(-1)[coordinates] for x in (grad_new_params, grads, grad_grads)]
        tiled = [x[first : first + slab] for x in (grad_new_state, state, grad_state)]
        _backward_slab(
            *(flat, tiled, work.view(-1), partials, weights, sums),
            *(preprocess, preprocess_scale, output_scale),
        )
    launch(
        sum_kernel,
        triton.cdiv(sums.length, SUM_WEIGHTS),
        Config(0, 4),
        partials,
        *_fourteen(grad_weights),
        MAX_CHUNKS,
        F=features,
        H=hidden,
        L=layers,
        WEIGHTS=SUM_WEIGHTS,
        CHUNKS=SUM_CHUNKS,
    )
    return grad_grads, grad_state, grad_weights


def _backward_slab(
    flat: Sequence[Tensor],
    tiled: Sequence[Tensor],
    workspace: Tensor,
    partials: Tensor,
    weights: Sequence[Tensor],
    sums: _Sums,
    preprocess: int,
    preprocess_scale: float,
    output_scale: float,
) -> None:
    """Recompute features and hidden states; then, from the top layer down, gradients and the weights' partial sums."""
    grad_new_params, grads, grad_grads = flat
    grad_new_state, state, grad_state = tiled
    n, features = grads.numel(), weights[0].shape[1]
    tiles, layers, _, hidden, _ = state.shape
    rows = [6 * hidden + 2, features, 2 * layers * hidden]
    work, x, below, _ = workspace.split(
        [tiles * _LANES * r for r in rows] + [workspace.numel() - tiles * _LANES * sum(rows)]
    )
    config, wide = _config("backward", state), _config("weights", state)
    *preprocess_scalars, scale, scale_low = _scalars(preprocess_scale, output_scale)
    sizes = {"H": hidden, "L": layers, "HP": _padded_hidden(hidden)}
    elementwise = {"PREPROCESS": preprocess, "F": features}
    _launch_elementwise(features_kernel, n, grads, x, n, *preprocess_scalars, **elementwise)
    if layers > 1:
        _forward(
            *(forward_kernel, grads, grads, state, grads, below, weights),
            *(preprocess, preprocess_scale, output_scale, 0),
            depth=layers - 1,
        )
    blocks = triton.cdiv(n, wide.block)
    blocks_per_chunk = triton.cdiv(blocks, MAX_CHUNKS)
    for layer in reversed(range(layers)):
        # h' of the layer below is in the state's tiles; features have tiles of their own.
        inputs = below[2 * (layer - 1) * hidden * _LANES :] if layer else x
        shape = sizes | {"LAYER": layer, "K": hidden if layer else features}
        shape["X_TILE"] = (2 * layers * hidden if layer else features) * _LANES
        launch(
            backward_kernel,
            triton.cdiv(n, config.block),
            config,
            *(grad_new_params, grad_new_state, inputs, state, grad_state, work),
            *(*weights[4 * layer : 4 * layer + 4], weights[-2], n, scale, scale_low),
            **shape,
            BLOCK=config.block,
        )
        launch(
            weights_kernel,
            triton.cdiv(blocks, blocks_per_chunk),
            wide,
            *(grad_new_params, inputs, state, work, partials.view(-1)[sums.layers[layer] :]),
            *(n, blocks, blocks_per_chunk, sums.length, scale, scale_low),
            **shape,
            BLOCK=wide.block,
        )
    arguments = (grads, work, grad_grads, n, *preprocess_scalars)
    _launch_elementwise(features_backward_kernel, n, *arguments, **elementwise, H=hidden)


def _launch_elementwise(kernel: Any, n: int, *args: Any, **constants: Any) -> None:
    """Run an elementwise kernel over n coordinates."""
    block = FEATURES_CONFIG.block
    launch(kernel, triton.cdiv(n, block), FEATURES_CONFIG, *args, **constants, BLOCK=block)


# -------------------------------------------------------------------------------------------------------- operators


@step.traced_triton_kernel
def lstm_step_triton(
    params: Tensor,
    grads: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    preprocess: int,
    preprocess_scale: float,
    output_scale: float,
    precision: int,
) -> tuple[Tensor, Tensor]:
    """One step of the coordinatewise LSTM optimizer for all coordinates.

    Args:
        params: N coordinates in any shape; float32, bfloat16, float16, or float64 with a float64 state.
        grads: gradients of the shape and dtype of ``params``.
        state: [ceil(N/32), L, 2, H, 32]; float32, bfloat16 (rounded where it is stored, all arithmetic in float32) or
            float64.
        weights: per layer weight_ih [4H, F or H], weight_hh [4H, H], bias_ih [4H], bias_hh [4H]; then the head's
            weight [1, H] and bias [1]; float64 for a float64 state, float32 otherwise.
        preprocess: index into ``metakern.ops.lstm_step.reference.PREPROCESS``
        preprocess_scale: p of the preprocessing
        output_scale: factor of the head's output
        precision: of the products of weights and hidden states: 0 float32, 1 TF32, 2 bfloat16; float64 stays.

    Returns:
        The new parameters, like ``params``, and the new state, zero after the last coordinate.
    """
    params, grads, state = params.contiguous(), grads.contiguous(), state.contiguous()
    new_params, new_state = torch.empty_like(params), torch.empty_like(state)
    _forward(
        forward_kernel if is_interpreted() else wrap_triton(forward_kernel),
        *(params, grads, state, new_params, new_state, weights),
        *(preprocess, preprocess_scale, output_scale, precision),
    )
    return new_params, new_state


@step_.traced_triton_kernel
def lstm_step_triton_(
    params: Tensor,
    grads: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    preprocess: int,
    preprocess_scale: float,
    output_scale: float,
    precision: int,
) -> None:
    """:func:`lstm_step_triton` in place: overwrites ``params`` and ``state``, both contiguous."""
    _forward(
        forward_kernel if is_interpreted() else wrap_triton(forward_kernel),
        *(params, grads.contiguous(), state, params, state, weights),
        *(preprocess, preprocess_scale, output_scale, precision),
    )


# Opaque to torch.compile: functionalization would copy its views of the workspace, and nothing would fuse with it.
@step_backward.triton_kernel
def lstm_step_triton_backward(a: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of grads, state (zero after the last coordinate) and weights; that of params is ``grad_new_params``.

    ``precision`` is ignored: products are float32, or float64 for a float64 state.
    """
    return _backward(
        *(a.grad_new_params.contiguous(), a.grad_new_state.contiguous(), a.grads.contiguous(), a.state.contiguous()),
        *([w.contiguous() for w in a.weights], a.preprocess, a.preprocess_scale, a.output_scale),
    )
