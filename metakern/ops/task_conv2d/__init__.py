"""task_conv2d: convolution with weights of its own per task, and the two maps that are its derivatives.

The definition is :mod:`metakern.ops.task_conv2d.reference`.

Axis legend: T tasks, S samples, C channels of x, O channels of y, [H, W] and [Ho, Wo] their images, [kh, kw] kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.core.checks import check_dense, check_same_device, check_type, check_value
from metakern.ops.core.define_op import Kernel
from metakern.ops.core.devices import without_autocast
from metakern.ops.task_conv2d import reference
from metakern.ops.task_conv2d.arguments import check_conv, check_input, check_weight, pair
from metakern.ops.task_conv2d.autograd import conv, conv_input, conv_weight

__all__ = ["task_conv2d", "task_conv2d_input", "task_conv2d_weight"]

Pair = int | tuple[int, int] | list[int]


def task_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """Convolution of T tasks at once, each with weights of its own: ``F.conv2d(x[t], weight[t], bias[t], ...)``.

    Differentiable to any order through every tensor argument: its derivatives are :func:`task_conv2d_input`,
    :func:`task_conv2d_weight` and itself. Works under ``torch.compile(fullgraph=True)``, ``torch.func.grad`` and
    ``torch.func.vmap``, whose axis becomes more tasks, or more samples where the weights are shared. The same bits come
    out for any number of threads. The kernels ignore autocast.

    Args:
        x: [T, S, C, H, W], float32 or float64: S samples of each task. T and S may be zero.
        weight: [T, O, C / groups, kh, kw]
        bias: [T, O] or None
        stride: one integer, or two for rows and columns; likewise below
        padding: zeros on both sides of each axis
        dilation: with a dilation or with groups, PyTorch's convolution runs instead of a kernel
        groups: see ``dilation``
        backend: ``"auto"``, ``"cpp"``, ``"triton"`` or ``"reference"``; None is ``"auto"``

    Returns:
        [T, S, O, Ho, Wo], contiguous

    Raises:
        ValueError: for shapes, sizes or options that do not fit, such as an image smaller than the kernel
        TypeError: for dtypes or types that do not fit
        RuntimeError: for tensors on several devices, and for a backend that cannot run

    Example:
        >>> x, weight = torch.randn(4, 5, 1, 28, 28), torch.randn(4, 64, 1, 3, 3)  # of T = 4 tasks
        >>> task_conv2d(x, weight, padding=1).shape
        torch.Size([4, 5, 64, 28, 28])
    """
    _check_tensors(x=x, weight=weight)
    if bias is not None:
        _check_tensors(x=x, bias=bias)
    stride, padding, dilation = pair(stride, "stride", 1), pair(padding, "padding", 0), pair(dilation, "dilation", 1)
    check_type(type(groups) is int, "groups must be an integer, got ", type(groups).__name__)
    check_value(groups >= 1, "groups must be at least 1, got ", groups)
    plain = dilation == (1, 1) and groups == 1
    kernel = conv.choose(backend, x.device, None if plain else _UNSERVED)
    if not _checks_itself(kernel):
        check_conv(x, weight, bias, padding, dilation, groups)
    if kernel is not None:
        y: Tensor = kernel(x, weight, bias, list(stride), list(padding))
        return y
    with without_autocast(x.device):
        return reference.task_conv2d(x, weight, bias, stride, padding, dilation, groups)


def task_conv2d_input(
    grad: Tensor, weight: Tensor, size: Pair, stride: Pair = 1, padding: Pair = 0, *, backend: str | None = None
) -> Tensor:
    """Gradient of :func:`task_conv2d` by x, a transposed convolution. Differentiable to any order.

    Args:
        grad: gradient of y, [T, S, O, Ho, Wo]
        weight: [T, O, C, kh, kw]
        size: H and W of x, which Ho and Wo do not determine if the stride is more than one
        stride: of the convolution
        padding: of the convolution
        backend: as in :func:`task_conv2d`

    Returns:
        [T, S, C, H, W], contiguous

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`task_conv2d`

    Example:
        >>> grad, weight = torch.randn(4, 5, 8, 28, 28), torch.randn(4, 8, 1, 3, 3)
        >>> task_conv2d_input(grad, weight, (28, 28), padding=1).shape
        torch.Size([4, 5, 1, 28, 28])
    """
    _check_tensors(grad=grad, weight=weight)
    size, stride, padding = pair(size, "size", 0), pair(stride, "stride", 1), pair(padding, "padding", 0)
    kernel = conv_input.choose(backend, grad.device)
    if not _checks_itself(kernel):
        check_input(grad, weight, size, stride, padding)
    if kernel is not None:
        grad_x: Tensor = kernel(grad, weight, list(size), list(stride), list(padding))
        return grad_x
    with without_autocast(grad.device):
        return reference.task_conv2d_input(grad, weight, size, stride, padding)


def task_conv2d_weight(
    x: Tensor, grad: Tensor, kernel_size: Pair, stride: Pair = 1, padding: Pair = 0, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`task_conv2d` by weight and by bias, in one pass. Differentiable to any order.

    Args:
        x: [T, S, C, H, W]
        grad: gradient of y, [T, S, O, Ho, Wo]
        kernel_size: kh and kw, which the images do not determine if the stride is more than one
        stride: of the convolution
        padding: of the convolution
        backend: as in :func:`task_conv2d`

    Returns:
        [T, O, C, kh, kw] and [T, O]; zeros without samples

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`task_conv2d`

    Example:
        >>> x, grad = torch.randn(4, 5, 1, 28, 28), torch.randn(4, 5, 8, 28, 28)
        >>> weight, bias = task_conv2d_weight(x, grad, 3, padding=1)
        >>> weight.shape, bias.shape
        (torch.Size([4, 8, 1, 3, 3]), torch.Size([4, 8]))
    """
    _check_tensors(x=x, grad=grad)
    kernel_size = pair(kernel_size, "kernel_size", 1)
    stride, padding = pair(stride, "stride", 1), pair(padding, "padding", 0)
    kernel = conv_weight.choose(backend, x.device)
    if not _checks_itself(kernel):
        check_weight(x, grad, kernel_size, stride, padding)
    if kernel is not None:
        grads: tuple[Tensor, Tensor] = kernel(x, grad, list(kernel_size), list(stride), list(padding))
        return grads
    with without_autocast(x.device):
        return reference.task_conv2d_weight(x, grad, kernel_size, stride, padding)


#: Why no kernel serves a convolution with a dilation or groups.
_UNSERVED = dict.fromkeys(("cpp", "triton"), "its convolutions have dilation 1 and groups 1")


def _check_tensors(**tensors: Tensor) -> None:
    """Check that all are dense tensors on one device, which chooses the backend."""
    first, *others = tensors
    for name, x in tensors.items():
        check_dense(x, name)
    for name in others:
        check_same_device(tensors[name], name, tensors[first], first)


def _checks_itself(kernel: Kernel | None) -> bool:
    """Whether a compiled kernel, which checks its arguments, runs; under torch.compile its fake kernel does."""
    return kernel is not None and kernel.implementation == "compiled" and not torch.compiler.is_compiling()


def prepare(backend: str | None) -> None:
    """Import what ``backend`` needs ahead of the first call, as torch.compile cannot trace imports."""
    for operator in (conv, conv_input, conv_weight):
        operator.prepare(backend)
