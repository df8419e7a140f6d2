"""task_norm_act_pool in plain PyTorch: batch norm of each task's own, an activation, max-pooling.

Axis legend: T tasks, S samples, C channels, [H, W] the images of x, [Ho, Wo] those of y.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Names of the options, at the index that the operators take.
STATISTICS = ("batch", "given", "none")
ACTIVATIONS = ("relu", "leaky_relu", "identity")


def output_size(size: int, pool: bool) -> int:
    """Length of y along one axis; pooling drops the last of an odd number of rows or columns."""
    return size // 2 if pool else size


def task_norm_act_pool(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    statistics: str,
    eps: float,
    activation: str,
    slope: float,
    pool: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y [T, S, C, Ho, Wo], and the mean and biased variance [T, C] that x was normalised with, as constants."""
    normalised, mean, var = _normalised(x, running_mean, running_var, statistics, eps)
    if gamma is not None:
        normalised = normalised * per_channel(gamma)
    if beta is not None:
        normalised = normalised + per_channel(beta)
    if activation == "relu":
        normalised = F.relu(normalised)
    elif activation == "leaky_relu":
        normalised = F.leaky_relu(normalised, slope)
    if pool:
        images = F.max_pool2d(normalised.flatten(0, 1), 2)
        normalised = images.unflatten(0, x.shape[:2])
    return normalised, mean.detach(), var.detach()


def per_channel(values: Tensor) -> Tensor:
    """[T, C] as [T, 1, C, 1, 1]."""
    return values[:, None, :, None, None]


def _normalised(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, statistics: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x̂, and the statistics."""
    channels = (x.shape[0], x.shape[2])
    if statistics == "none":
        return x, x.new_zeros(channels), x.new_ones(channels)
    if statistics == "given":
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean.clone(), running_var.clone()
    elif not x.numel():
        mean, var = x.new_zeros(channels), x.new_zeros(channels)
    else:
        mean = x.mean((1, 3, 4))
        var = (x - per_channel(mean)).square().mean((1, 3, 4))
    return (x - per_channel(mean)) * per_channel(torch.rsqrt(var + eps)), mean, var
