"""task_norm_act_pool by Triton kernels: launch configurations, launches, and the operators.

Triton rather than CUDA C++: the kernels are passes over memory with sums of a block, and one source serves float32 and
float64. A program owns a channel of a task, so no sum crosses programs and the same bits come out each time; calls with
fewer channels than multiprocessors leave some of these idle.

Axis legend: T tasks, S samples, C channels, [H, W] the images of x, [Ho, Wo] those of y.
Needs the package triton, 3.6 or newer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metakern.ops.core.triton_launch import Config, launch_in_parts, split
from metakern.ops.task_norm_act_pool.autograd import norm, norm_backward, norm_backward_backward
from metakern.ops.task_norm_act_pool.reference import output_size
from metakern.ops.task_norm_act_pool.triton_kernels import backward_kernel, forward_kernel, second_kernel

#: Not timed on a GPU.
CONFIG = Config(1024, 8)


def _launch(kernel: Any, a: Any, x: Tensor, tensors: list[Tensor], **constants: Any) -> None:
    """Launch a program for every channel of every task."""
    tasks, samples, channels, *size = x.shape
    sizes = [*size, *(output_size(n, a.pool) for n in size)]
    constants |= {"STATISTICS": a.statistics, "ACTIVATION": a.activation, "POOL": int(a.pool), "BLOCK": CONFIG.block}
    if tasks:
        arguments = (*tensors, samples, channels, *sizes, *split(a.eps, a.slope))
        launch_in_parts(kernel, tasks * channels, CONFIG, *arguments, **constants)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """The tensor without gaps; ``other``, which is not read, where there is none."""
    return other if tensor is None else tensor.contiguous()


@norm.triton_kernel
def task_norm_act_pool_triton(a: Any) -> tuple[Tensor, ...]:
    """y, mean, var and index, as in :data:`metakern.ops.task_norm_act_pool.autograd.norm`."""
    x = a.x.contiguous()
    shape = (*x.shape[:3], *(output_size(n, a.pool) for n in x.shape[3:]))
    y, mean = x.new_empty(shape), x.new_empty((x.shape[0], x.shape[2]))
    var, index = torch.empty_like(mean), x.new_empty(shape, dtype=torch.uint8)
    given = [_or(t, x) for t in (a.gamma, a.beta, a.running_mean, a.running_var)]
    has = {"HAS_GAMMA": int(a.gamma is not None), "HAS_BETA": int(a.beta is not None)}
    _launch(forward_kernel, a, x, [x, *given, y, mean, var, index], **has)
    return y, mean, var, index


@norm_backward.triton_kernel
def task_norm_act_pool_backward_triton(a: Any) -> tuple[Tensor, ...]:
    """The gradients, as in :data:`metakern.ops.task_norm_act_pool.autograd.norm_backward`."""
    x, saved = _saved(a)
    grad_x, grad_gamma = torch.empty_like(x), x.new_empty((x.shape[0], x.shape[2]))
    grads = grad_x, grad_gamma, torch.empty_like(grad_gamma)
    _launch(backward_kernel, a, x, [*saved, *grads], HAS_GAMMA=int(a.gamma is not None))
    return grads


@norm_backward_backward.triton_kernel
def task_norm_act_pool_backward_backward_triton(a: Any) -> tuple[Tensor, ...]:
    """Their gradients, as in :data:`metakern.ops.task_norm_act_pool.autograd.norm_backward_backward`."""
    x, saved = _saved(a)
    by = [a.grad_x.contiguous(), _or(a.grad_gamma, x), _or(a.grad_beta, x)]
    grads = torch.empty_like(saved[0]), torch.empty_like(x), x.new_empty((x.shape[0], x.shape[2]))
    has = {"HAS_GAMMA": a.gamma, "HAS_BY_GAMMA": a.grad_gamma, "HAS_BY_BETA": a.grad_beta}
    flags = {name: int(tensor is not None) for name, tensor in has.items()}
    _launch(second_kernel, a, x, [*by, *saved, *grads], **flags)
    return grads


def _saved(a: Any) -> tuple[Tensor, list[Tensor]]:
    """The x and all tensors that the derivatives take, without gaps."""
    x = a.x.contiguous()
    rest = (t.contiguous() for t in (a.mean, a.var, a.index))
    return x, [a.grad_y.contiguous(), x, _or(a.gamma, x), *rest]
