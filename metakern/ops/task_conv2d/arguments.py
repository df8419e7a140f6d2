"""Arguments of the public functions: pairs of numbers, and the checks of csrc/task_conv2d/arguments.h in Python."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metakern.ops.core.checks import check_same_device, check_shape, check_type, check_value
from metakern.ops.task_conv2d.reference import output_size

#: Largest padding and stride.
MAX_STEP = 2**31 - 1


def pair(value: Any, name: str, smallest: int) -> tuple[int, int]:
    """One integer for both axes, or two, as a pair.

    Raises:
        TypeError: for something other than integers
        ValueError: for another count, or an integer out of range
    """
    values = value if isinstance(value, (tuple, list)) else (value, value)
    check_value(len(values) == 2, name, " must hold 2 integers, of rows and columns, got ", len(values))
    try:
        rows, columns = (operator.index(x) for x in values)
    except TypeError:
        raise TypeError(f"{name} must be an integer or two, got {value!r}") from None
    for x in (rows, columns):
        check_value(smallest <= x <= MAX_STEP, name, " must be ", smallest, " to ", MAX_STEP, ", got ", x)
    return rows, columns


def check_images(x: Tensor, name: str, axes: str, other: Tensor, other_name: str) -> None:
    """Check five axes, and the dtype and device, which are those of ``other``."""
    check_value(x.dim() == 5, name, " must have shape [", axes, "], got ", x.shape)
    known = x.dtype in (torch.float32, torch.float64)
    check_type(known, name, " must be float32 or float64, got ", x.dtype)
    same = x.dtype == other.dtype
    check_type(same, name, " must have the dtype of ", other_name, ", ", other.dtype, ", got ", x.dtype)
    check_same_device(x, name, other, other_name)


def check_fits(
    size: Sequence[int], kernel: Sequence[int], padding: Sequence[int], dilation: Sequence[int] = (1, 1)
) -> None:
    """Check that the kernel fits into the padded image, and is not empty."""
    for axis, n, k, p, d in zip(("rows", "columns"), size, kernel, padding, dilation, strict=True):
        check_value(k >= 1, "the kernel must have at least one of ", axis, ", got ", k)
        extent = d * (k - 1) + 1
        check_value(
            n + 2 * p >= extent,
            *("x must have at least as many ", axis, " as the kernel, ", extent, ", got ", n, " and a padding of ", p),
        )


def check_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> None:
    """Check the tensors of task_conv2d."""
    check_images(x, "x", "T, S, C, H, W", x, "x")
    check_images(weight, "weight", "T, O, C, kh, kw", x, "x")
    check_value(x.shape[2] >= 1, "x must have at least one channel, got shape ", x.shape)
    check_value(weight.shape[1] >= 1, "weight must have at least one output channel, got shape ", weight.shape)
    fits = weight.shape[0] == x.shape[0] and weight.shape[2] * groups == x.shape[2]
    wanted = (x.shape[0], weight.shape[1], x.shape[2] // groups, *weight.shape[3:])
    check_value(fits, "weight must have shape ", list(wanted), " for x of shape ", x.shape, ", got ", weight.shape)
    check_fits(x.shape[3:], weight.shape[3:], padding, dilation)
    if bias is not None:
        check_shape(bias, "bias", tuple(weight.shape[:2]))
        same = bias.dtype == x.dtype
        check_type(same, "bias must have the dtype of x, ", x.dtype, ", got ", bias.dtype)
        check_same_device(bias, "bias", x, "x")


def _check_grad(
    grad: Tensor, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> None:
    """Check the image of y's gradient against the sizes of x and of the kernel."""
    sizes = tuple(output_size(*axis) for axis in zip(size, kernel, stride, padding, strict=True))
    check_shape(grad, "grad", (*grad.shape[:3], *sizes))


def check_input(
    grad: Tensor, weight: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> None:
    """Check the tensors of task_conv2d_input."""
    check_images(grad, "grad", "T, S, O, Ho, Wo", grad, "grad")
    check_images(weight, "weight", "T, O, C, kh, kw", grad, "grad")
    check_value(weight.shape[2] >= 1, "weight must have at least one input channel, got shape ", weight.shape)
    check_value(grad.shape[2] >= 1, "grad must have at least one channel, got shape ", grad.shape)
    check_shape(weight, "weight", (grad.shape[0], grad.shape[2], *weight.shape[2:]))
    check_fits(size, weight.shape[3:], padding)
    _check_grad(grad, size, weight.shape[3:], stride, padding)


def check_weight(
    x: Tensor, grad: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> None:
    """Check the tensors of task_conv2d_weight."""
    check_images(x, "x", "T, S, C, H, W", x, "x")
    check_images(grad, "grad", "T, S, O, Ho, Wo", x, "x")
    check_value(x.shape[2] >= 1, "x must have at least one channel, got shape ", x.shape)
    check_value(grad.shape[2] >= 1, "grad must have at least one channel, got shape ", grad.shape)
    check_shape(grad, "grad", (*x.shape[:2], *grad.shape[2:]))
    check_fits(x.shape[3:], kernel_size, padding)
    _check_grad(grad, x.shape[3:], kernel_size, stride, padding)
