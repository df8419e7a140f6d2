"""Checks of the arguments: those of csrc/task_norm_act_pool/arguments.h in Python, and the options' names."""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.core.checks import check_same_device, check_shape, check_type, check_value


def index_of(value: str, name: str, choices: tuple[str, ...]) -> int:
    """Index of an option's value.

    Raises:
        TypeError: for something other than a string
        ValueError: for an unknown value
    """
    check_type(isinstance(value, str), name, " must be a string, got ", type(value).__name__)
    check_value(value in choices, name, " must be one of ", ", ".join(choices), ", got ", repr(value))
    return choices.index(value)


def check_norm(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    statistics: str,
    eps: float,
    slope: float,
    pool: bool,
) -> None:
    """Check the arguments of task_norm_act_pool."""
    check_value(0 < eps < float("inf"), "eps must be positive and finite, got ", eps)
    check_value(0 <= slope < float("inf"), "slope must be finite and at least 0, got ", slope)
    check_value(x.dim() == 5, "x must have shape [T, S, C, H, W], got ", x.shape)
    known = x.dtype in (torch.float32, torch.float64)
    check_type(known, "x must be float32 or float64, got ", x.dtype)
    check_value(x.shape[2] >= 1, "x must have at least one channel, got shape ", x.shape)
    for axis, size in zip(("rows", "columns"), x.shape[3:], strict=True):
        check_value(not pool or size >= 2, "x must have at least 2 ", axis, " to be pooled, got ", size)
    for name, tensor in (
        *(("gamma", gamma), ("beta", beta)),
        *(("running_mean", running_mean), ("running_var", running_var)),
    ):
        if tensor is not None:
            check_shape(tensor, name, (x.shape[0], x.shape[2]))
            same = tensor.dtype == x.dtype
            check_type(same, name, " must have the dtype of x, ", x.dtype, ", got ", tensor.dtype)
            check_same_device(tensor, name, x, "x")
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        given = "a tensor" if tensor is not None else "None"
        wanted = "a tensor" if statistics == "given" else "None"
        check_value(given == wanted, name, " must be ", wanted, " with these statistics, got ", given)
    if statistics == "batch" and x.shape[1] * x.shape[3] * x.shape[4] == 1:
        images = f"torch.Size({list(x.shape[1:])})"
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {images}")
