"""Batch norm with per-step running statistics: MAML++, Antoniou et al. 2018, arXiv 1810.09502.

Axis legend: N samples, C channels, K inner steps.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.core.checks import check_count

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class PerStepBatchNorm(nn.Module):
    """Batch norm with separate running statistics, and optionally weights, for the model after 0 to K inner steps.

    Antoniou et al. 2018, "How to train your MAML", arXiv 1810.09502: activations before and after adaptation are
    distributed differently, so one set of running statistics fits none of them. Row k belongs to the model after k
    steps, on support and query sets alike. (The authors' code lets the query set share the row of the step before.)

    In ``train()`` mode normalisation uses the statistics of the task's current batch, so predictions are transductive.
    :func:`metakern.meta_loss` moves row k towards the mean over tasks of their batches' means and unbiased variances,
    once for every evaluation after k steps, in their order: the same bits in every run. :func:`metakern.adapt` moves
    none. In ``eval()`` mode row k normalises, and samples do not depend on each other. A call outside the inner loop
    uses row ``step``, 0 unless the buffer is written, and moves that row in ``train()``.

    Args:
        num_features: C
        steps: K, the maximum number of inner steps of a call
        eps: added to the variance
        momentum: weight of the new statistics, 0 to 1
        affine: whether to learn a weight and a bias
        affine_per_step: whether each step has a weight and bias of its own. An inner step then changes only its own
            row, which is not used again, so in effect only the outer loop learns them.

    Attributes:
        running_mean, running_var: buffers [K+1, C]
        step: buffer [], int64, not in the state_dict
        weight, bias: [C], with ``affine_per_step`` [K+1, C], or None

    Raises:
        TypeError, ValueError: for sizes that are no integers of at least 1; ``eps`` or ``momentum`` out of range.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 64, 3), PerStepBatchNorm(64, steps=5), nn.ReLU())
    """

    running_mean: Tensor
    running_var: Tensor
    step: Tensor

    def __init__(
        self,
        num_features: int,
        steps: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        affine_per_step: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("num_features", num_features)
        check_count("steps", steps)
        if not isinstance(momentum, (int, float)) or isinstance(momentum, bool):
            raise TypeError(f"momentum must be a number, got {momentum!r}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be 0 to 1, got {momentum}")
        if not 0 < eps < math.inf:
            raise ValueError(f"eps must be positive and finite, got {eps}")
        self.num_features, self.steps, self.eps, self.momentum = num_features, steps, eps, momentum
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("running_mean", torch.zeros(steps + 1, num_features, **options))
        self.register_buffer("running_var", torch.ones(steps + 1, num_features, **options))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        shape = (steps + 1, num_features) if affine_per_step else (num_features,)
        self.weight = nn.Parameter(torch.ones(shape, **options)) if affine else None
        self.bias = nn.Parameter(torch.zeros(shape, **options)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [N, C, ...] normalised for each channel; ValueError for another shape."""
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"input must be [N, {self.num_features}, ...], got shape {list(x.shape)}")
        weight, bias = self._row(self.weight), self._row(self.bias)
        if not self.training:
            mean, var = self._row(self.running_mean), self._row(self.running_var)
            return F.batch_norm(x, mean, var, weight, bias, False, self.momentum, self.eps)
        # Statistics are computed separately, as torch.vmap's batch norm loses writes into a row of a tensor; and first,
        # as a kernel joins the batch norm with what follows it. A single value has no variance: F.batch_norm raises.
        if x.numel() > x.shape[1]:
            dims = [0, *range(2, x.dim())]
            var, mean = torch.var_mean(x.detach().to(self.running_var.dtype), dims)
            for running, new in ((self.running_mean, mean), (self.running_var, var)):
                running.copy_(self.replaced(running, running.lerp(new, self.momentum), self.step))
        return F.batch_norm(x, None, None, weight, bias, True, self.momentum, self.eps)

    @staticmethod
    def replaced(running: Tensor, new: Tensor, step: Tensor) -> Tensor:
        """Running statistics [K+1, C] with row ``step`` [] replaced by that of ``new`` [K+1, C]."""
        # A product with zeros would spread NaN to the other rows, and reading the step would wait for the GPU.
        rows = torch.arange(running.shape[0], device=running.device)
        return torch.where((rows == step).unsqueeze(1), new, running)

    def extra_repr(self) -> str:
        """The options that repr(layer) shows."""
        per_step = self.weight is not None and self.weight.dim() > 1
        return (
            f"{self.num_features}, steps={self.steps}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.weight is not None}, affine_per_step={per_step}"
        )

    def _row(self, tensor: Tensor | None) -> Tensor | None:
        """The current step's row of [K+1, C]; a tensor [C] as it is."""
        if tensor is None or tensor.dim() == 1:
            return tensor
        return tensor.index_select(0, self.step.reshape(1)).squeeze(0)


def per_step_batch_norm(model: nn.Module, steps: int, affine_per_step: bool = False) -> nn.Module:
    """A copy of the model in which :class:`PerStepBatchNorm` replaces batch norm with running statistics.

    Every row starts from the layer's statistics, weight and bias. Layers without running statistics, which use those of
    the current batch in any mode, stay as they are; so do subclasses of torch's layers.

    Args:
        model: any module that can be deep-copied; it is not changed
        steps: K, the maximum number of inner steps of a call of :func:`metakern.adapt` or :func:`metakern.meta_loss`
        affine_per_step: whether each step has a learned weight and bias of its own

    Raises:
        TypeError, ValueError: for a model that is no module or has no such layer; for a layer with ``momentum=None``,
            as the average over all batches is not supported.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 5))
        >>> net = per_step_batch_norm(net, steps=5)
        >>> support, options = (support_x, support_y), {"loss": F.cross_entropy, "steps": 5, "lr": 0.01}
        >>> meta_loss(net, support, (query_x, query_y), **options).mean().backward()  # moves running statistics
        >>> accuracy = (adapt(net.eval(), support, **options)(query_x).argmax(-1) == query_y).float().mean()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    check_count("steps", steps)
    layers = {name: m for name, m in model.named_modules() if type(m) in _PLAIN and m.running_mean is not None}
    if not layers:
        raise ValueError("model must have an nn.BatchNorm1d, 2d or 3d with running statistics, got none")
    for name, layer in layers.items():
        if layer.momentum is None:
            raise ValueError(f"model: {name or 'the layer'} must have a number as momentum, got None")
    model = copy.deepcopy(model)
    converted = {id(m): _converted(m, steps, affine_per_step) for m in map(model.get_submodule, layers)}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            module._modules[name] = converted.get(id(child), child)
    return converted.get(id(model), model)


def _converted(layer: Any, steps: int, affine_per_step: bool) -> PerStepBatchNorm:
    """PerStepBatchNorm for a batch norm layer, with its statistics, weight and bias."""
    options: dict[str, Any] = {"device": layer.running_mean.device, "dtype": layer.running_mean.dtype}
    sizes = layer.num_features, steps, layer.eps, layer.momentum, layer.affine, affine_per_step
    converted = PerStepBatchNorm(*sizes, **options)
    converted.running_mean.copy_(layer.running_mean)
    converted.running_var.copy_(layer.running_var)
    for name, p in layer.named_parameters():
        rows = p.detach().repeat(steps + 1, 1)
        setattr(converted, name, nn.Parameter(rows, requires_grad=p.requires_grad) if affine_per_step else p)
    return converted.train(layer.training)
