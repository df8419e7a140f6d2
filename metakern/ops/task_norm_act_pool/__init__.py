"""task_norm_act_pool: batch norm with statistics of every task's own, an activation and max-pooling, in one pass.

The definition is :mod:`metakern.ops.task_norm_act_pool.reference`.

Axis legend: T tasks, S samples, C channels, [H, W] the images of x, [Ho, Wo] those of y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.core.checks import check_dense, check_same_device, check_type
from metakern.ops.core.devices import without_autocast
from metakern.ops.task_norm_act_pool import reference
from metakern.ops.task_norm_act_pool.arguments import check_norm, index_of
from metakern.ops.task_norm_act_pool.autograd import norm, norm_backward, norm_backward_backward
from metakern.ops.task_norm_act_pool.reference import ACTIVATIONS, STATISTICS

__all__ = ["task_norm_act_pool"]


def task_norm_act_pool(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    statistics: str = "batch",
    eps: float = 1e-5,
    activation: str = "relu",
    slope: float = 0.01,
    pool: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm, activation and max-pooling of T tasks at once, each with statistics of its own.

    For each task ``F.max_pool2d(F.relu(F.batch_norm(x[t], ...)), 2)``. First and second derivatives by x, gamma and
    beta are one launch each; third ones raise. Besides x, autograd keeps two numbers a channel and one byte an element
    of y. Works under ``torch.compile(fullgraph=True)``, ``torch.func.grad`` and ``torch.func.vmap``, whose axis becomes
    more tasks. The same bits come out for any number of threads. Ties and NaN in a window are PyTorch's. The kernels
    ignore autocast.

    Args:
        x: [T, S, C, H, W], float32 or float64: S samples of each task. T and S may be zero.
        gamma: [T, C], or None for 1
        beta: [T, C], or None for 0
        running_mean: [T, C], for ``statistics="given"`` alone; it has no derivative
        running_var: [T, C], likewise
        statistics: ``"batch"`` (those of x over S, H and W), ``"given"`` or ``"none"`` (x is not normalised)
        eps: added to the variance
        activation: ``"relu"``, ``"leaky_relu"`` or ``"identity"``
        slope: of the leaky ReLU below zero, at least 0
        pool: whether to take the maximum of windows of 2 by 2, next to each other; a last odd row or column is dropped
        backend: ``"auto"``, ``"cpp"``, ``"triton"`` or ``"reference"``; None is ``"auto"``

    Returns:
        y: [T, S, C, Ho, Wo], contiguous; half of H and W, rounded down, if pooled
        mean, var: [T, C], the statistics that x was normalised with, var the biased one; 0 and 1 if there were none.
            They have no derivative. Running statistics are the caller's to update.

    Raises:
        ValueError: for shapes or options that do not fit, and for batch statistics of one value a channel
        TypeError: for dtypes or types that do not fit
        RuntimeError: for tensors on several devices, and for a backend that cannot run

    Example:
        >>> x = torch.randn(4, 5, 64, 28, 28)  # of T = 4 tasks
        >>> y, mean, var = task_norm_act_pool(x, torch.ones(4, 64), torch.zeros(4, 64))
        >>> y.shape, mean.shape
        (torch.Size([4, 5, 64, 14, 14]), torch.Size([4, 64]))
    """
    check_dense(x, "x")
    others = gamma, beta, running_mean, running_var
    for name, tensor in zip(("gamma", "beta", "running_mean", "running_var"), others, strict=True):
        if tensor is not None:
            check_dense(tensor, name)
            check_same_device(tensor, name, x, "x")
    rule, form = index_of(statistics, "statistics", STATISTICS), index_of(activation, "activation", ACTIVATIONS)
    eps, slope = _number(eps, "eps"), _number(slope, "slope")
    check_type(isinstance(pool, bool), "pool must be a bool, got ", type(pool).__name__)
    kernel = norm.choose(backend, x.device)
    if kernel is None or kernel.implementation != "compiled" or torch.compiler.is_compiling():
        check_norm(x, *others, statistics, eps, slope, pool)
    if kernel is not None:
        found: tuple[Tensor, Tensor, Tensor] = kernel(x, *others, rule, eps, form, slope, pool)
        return found
    with without_autocast(x.device):
        return reference.task_norm_act_pool(x, *others, statistics, eps, activation, slope, pool)


def _number(value: float, name: str) -> float:
    """A number as a float, which the operators take."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    check_type(known, name, " must be a number, got ", type(value).__name__)
    return float(value)


def prepare(backend: str | None) -> None:
    """Import what ``backend`` needs ahead of the first call, as torch.compile cannot trace imports."""
    for operator in (norm, norm_backward, norm_backward_backward):
        operator.prepare(backend)
