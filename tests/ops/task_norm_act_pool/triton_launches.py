"""Calls of task_norm_act_pool and of its derivatives whose Triton kernels are launched and compiled without a GPU."""

from __future__ import annotations

from typing import Any

import torch

from tests.conformance.ops.task_norm_act_pool import TaskNormActPool


def _twice(dtype: torch.dtype, **sizes: Any) -> None:
    row = TaskNormActPool()
    leaves = row.make(dtype, **sizes).map(lambda name, x: x.requires_grad_(name in row.differentiable))
    y = row.call(leaves, "triton")["y"]
    (first,) = torch.autograd.grad(y.sum(), leaves.tensors["x"], create_graph=True)
    torch.autograd.grad(first.sum(), leaves.tensors["x"])


def task_norm_act_pool() -> None:
    _twice(torch.float32)


def task_norm_act_pool_leaky() -> None:
    _twice(torch.float32, activation="leaky_relu", pool=False, statistics="given", affine=False)


def task_norm_act_pool_float64() -> None:
    _twice(torch.float64, size=(5, 7))


LAUNCHES = {
    80: (task_norm_act_pool,),
    90: (task_norm_act_pool, task_norm_act_pool_leaky, task_norm_act_pool_float64),
    100: (task_norm_act_pool,),
}
