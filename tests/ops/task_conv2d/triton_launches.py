"""Calls of task_conv2d and its companions whose Triton kernels are launched and compiled without a GPU."""

from __future__ import annotations

import torch

from tests.conformance.ops.implementations import with_gradients
from tests.conformance.ops.task_conv2d import TaskConv2d


def task_conv2d() -> None:
    row = TaskConv2d()
    example = row.make(torch.float32, padding=(1, 1))
    with_gradients(row, example, lambda leaves: row.call(leaves, "triton"))


def task_conv2d_float64() -> None:
    row = TaskConv2d()
    example = row.make(torch.float64, size=(7, 7), stride=(2, 2), padding=(1, 1))
    with_gradients(row, example, lambda leaves: row.call(leaves, "triton"))


LAUNCHES = {80: (task_conv2d,), 90: (task_conv2d, task_conv2d_float64), 100: (task_conv2d,)}
