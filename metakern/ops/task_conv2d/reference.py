"""task_conv2d and its two companions in plain PyTorch: convolutions with weights of their own per task.

The three maps are linear in each of their two arguments, and the derivative of each by either is one of the other two.

Axis legend: T tasks, S samples, C channels of x, O channels of y, [H, W] and [Ho, Wo] their images, [kh, kw] kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """Length of y along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def task_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Convolution of x [T, S, C, H, W] with weight [T, O, C / groups, kh, kw], plus bias [T, O]: [T, S, O, Ho, Wo]."""
    tasks, samples = x.shape[:2]
    if not tasks or not samples:
        sizes = zip(x.shape[3:], weight.shape[3:], stride, padding, dilation, strict=True)
        shape = (tasks, samples, weight.shape[1], *(output_size(*axis) for axis in sizes))
        return _nothing(shape, x, weight, bias)
    biases = [None] * tasks if bias is None else bias.unbind()
    found = [
        F.conv2d(a, w, b, tuple(stride), tuple(padding), tuple(dilation), groups)
        for a, w, b in zip(x.unbind(), weight.unbind(), biases, strict=True)
    ]
    return torch.stack(found)


def task_conv2d_input(
    grad: Tensor, weight: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Gradient of task_conv2d by x, [T, S, C, *size], from that of y, [T, S, O, Ho, Wo]."""
    tasks, samples = grad.shape[:2]
    if not tasks or not samples:
        return _nothing((tasks, samples, weight.shape[2], *size), grad, weight)
    axes = zip(size, grad.shape[3:], weight.shape[3:], stride, padding, strict=True)
    # Rows of x behind the last place of the kernel.
    behind = tuple(n + 2 * p - k - (m - 1) * s for n, m, k, s, p in axes)
    options = (None, tuple(stride), tuple(padding), behind)
    return torch.stack(
        [F.conv_transpose2d(g, w, *options) for g, w in zip(grad.unbind(), weight.unbind(), strict=True)]
    )


def task_conv2d_weight(
    x: Tensor, grad: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of task_conv2d by weight, [T, O, C, *kernel_size], and by bias, [T, O], from that of y."""
    tasks, samples, channels = x.shape[:3]
    of_bias = grad.sum((1, 3, 4))
    shape = (tasks, grad.shape[2], channels, *kernel_size)
    if not tasks or not samples:
        return _nothing(shape, x, grad), of_bias
    # Samples play the part of channels, and y's gradient that of a kernel whose elements lie `stride` apart.
    found = [
        F.conv2d(a.transpose(0, 1), g.transpose(0, 1), None, 1, tuple(padding), tuple(stride))
        for a, g in zip(x.unbind(), grad.unbind(), strict=True)
    ]
    rows, columns = kernel_size
    return torch.stack([one[:, :, :rows, :columns].transpose(0, 1) for one in found]), of_bias


def _nothing(shape: Sequence[int], *arguments: Tensor | None) -> Tensor:
    """Zeros for a call without tasks or samples, which depend on its arguments as far as autograd can tell."""
    given = [x for x in arguments if x is not None]
    return given[0].new_zeros(tuple(shape)) + sum(x.sum() * 0 for x in given)
