"""task_conv2d by Triton kernels: launch configurations, launches, and the operators.

Triton rather than CUDA C++: the maps are matrix products on tensor cores (three TF32 products for float32), which
tl.dot provides, and one source serves float32 and float64. Images are read where they lie, in NCHW. Sums over samples
are cut into a number of parts that the shapes determine, and the parts are added in order.

Axis legend: T tasks, S samples, C channels of x, O channels of y, [H, W] and [Ho, Wo] their images, [kh, kw] kernel.
Needs the package triton, 3.6 or newer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from metakern.ops.core.triton_launch import Config, is_interpreted, launch_in_parts
from metakern.ops.task_conv2d.autograd import conv, conv_input, conv_weight
from metakern.ops.task_conv2d.reference import output_size
from metakern.ops.task_conv2d.triton_kernels import conv_input_kernel, conv_kernel, conv_weight_kernel


class Tile(NamedTuple):
    """Rows and columns of a program, terms summed at once, warps."""

    rows: int
    columns: int
    terms: int
    warps: int


#: Not timed on a GPU.
FLOAT32_TILE, FLOAT64_TILE = Tile(64, 64, 32, 4), Tile(32, 32, 16, 4)

#: Programs of a sum over samples: parts are made until there are so many, of at least so many terms.
WANTED_PROGRAMS, MIN_TERMS = 512, 512


def _tile(x: Tensor) -> Tile:
    if is_interpreted():  # programs are slow to start there
        return Tile(32, 64, 32, 4)
    return FLOAT64_TILE if x.dtype == torch.float64 else FLOAT32_TILE


def _constants(kernel: Sequence[int], stride: Sequence[int], tile: Tile) -> dict[str, int]:
    names = ("KH", "KW", "SH", "SW", "BM", "BN", "BK")
    return dict(zip(names, (*kernel, *stride, tile.rows, tile.columns, tile.terms), strict=True))


def _launch(
    kernel: Any, parts: int, rows: int, columns: int, tile: Tile, tensors: Sequence[Any], **constants: int
) -> None:
    """Launch ``parts`` results [rows, columns] in tiles."""
    row_blocks, column_blocks = triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns)
    config = Config(tile.terms, tile.warps)
    grid = parts * row_blocks * column_blocks
    if grid:
        launch_in_parts(kernel, grid, config, *tensors, row_blocks, column_blocks, **constants)


@conv.triton_kernel
def task_conv2d_triton(a: Any) -> Tensor:
    """Convolution of every task, as in :data:`metakern.ops.task_conv2d.autograd.conv`."""
    x, weight = a.x.contiguous(), a.weight.contiguous()
    tasks, samples, channels, height, width = x.shape
    rows, kernel = weight.shape[1], weight.shape[3:]
    axes = zip((height, width), kernel, a.stride, a.padding, strict=True)
    out = [output_size(*axis) for axis in axes]
    tile = _tile(x)
    y: Tensor = x.new_empty((tasks, samples, rows, *out))
    bias = x if a.bias is None else a.bias.contiguous()
    arguments = (x, weight, bias, y, samples, channels, height, width, rows, *out, *a.padding)
    constants = _constants(kernel, a.stride, tile) | {"HAS_BIAS": int(a.bias is not None)}
    _launch(conv_kernel, tasks, rows, samples * out[0] * out[1], tile, arguments, **constants)
    return y


@conv_input.triton_kernel
def task_conv2d_input_triton(a: Any) -> Tensor:
    """Gradient by x, as in :data:`metakern.ops.task_conv2d.autograd.conv_input`."""
    grad, weight = a.grad.contiguous(), a.weight.contiguous()
    tasks, samples, rows, *out = grad.shape
    channels, *kernel = weight.shape[2:]
    tile = _tile(grad)
    grad_x: Tensor = grad.new_empty((tasks, samples, channels, *a.size))
    arguments = (grad, weight, grad_x, samples, channels, *a.size, rows, *out, *a.padding)
    constants = _constants(kernel, a.stride, tile)
    _launch(conv_input_kernel, tasks, channels, samples * a.size[0] * a.size[1], tile, arguments, **constants)
    return grad_x


@conv_weight.triton_kernel
def task_conv2d_weight_triton(a: Any) -> tuple[Tensor, Tensor]:
    """Gradients by weight and bias, as in :data:`metakern.ops.task_conv2d.autograd.conv_weight`."""
    x, grad = a.x.contiguous(), a.grad.contiguous()
    tasks, samples, channels, height, width = x.shape
    rows, *out = grad.shape[2:]
    columns, terms, tile = channels * a.kernel[0] * a.kernel[1], samples * out[0] * out[1], _tile(x)
    splits, split_terms = _splits(tasks, rows, columns, terms, tile)
    parts = x.new_empty((tasks, splits, rows, columns))
    bias_parts = x.new_empty((tasks, splits, rows))
    arguments = (x, grad, parts, bias_parts, samples, channels, height, width, rows, *out, *a.padding)
    constants = _constants(a.kernel, a.stride, tile)
    _launch(conv_weight_kernel, tasks * splits, rows, columns, tile, (*arguments, splits, split_terms), **constants)
    return parts.sum(1).view(tasks, rows, channels, *a.kernel), bias_parts.sum(1)


def _splits(tasks: int, rows: int, columns: int, terms: int, tile: Tile) -> tuple[int, int]:
    """Number of parts of a sum over ``terms``, and terms of a part, a multiple of the tile's."""
    programs = max(1, tasks * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns))
    splits = max(1, min(triton.cdiv(WANTED_PROGRAMS, programs), terms // MIN_TERMS))
    split_terms = max(1, triton.cdiv(triton.cdiv(terms, splits), tile.terms)) * tile.terms
    return max(1, triton.cdiv(terms, split_terms)), split_terms
