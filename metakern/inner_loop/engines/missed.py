"""Warns once per cause that a small MLP misses the fused inner loop, which would take a fraction of the time."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from metakern.core import backend as _backend
from metakern.core.transforms import is_transformed
from metakern.core.warn import warn_user
from metakern.inner_loop.arguments import LoopOptions
from metakern.ops.mlp_inner_loop import unserved

#: Slowdown of plain PyTorch for MLPs of 1,761 to 247,000 parameters: the smallest and largest entry of the columns
#: "vmap" in bench/results/amd-epyc-2-threads-avx512-inner-loop.json.
_RATIO = "3 to 56 times"

#: Modules of torch.nn, besides nn.Linear, that a small MLP may have.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign),
    *(nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid, nn.Softshrink, nn.Hardshrink),
    *(nn.Tanhshrink, nn.Threshold),
)
_POINTWISE = (*_ACTIVATIONS, nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout)

#: Causes already warned about, without their numbers, and the maximum number of them.
_said: set[str] = set()
_MOST_SAID = 64


def warn_if_missed(options: LoopOptions, x: Any, cause: str) -> None:
    """Warn at the caller's line, once for each reason, that a small MLP misses the fused inner loop.

    Args:
        options: options of a call that plain PyTorch has served
        x: support samples [T, S, ...]
        cause: why the fused inner loop does not serve
    """
    if is_transformed() or not options.steps or not options.vectorize or _backend.requested(options.backend) != "auto":
        return  # compiled, transformed, or chosen by the user on purpose
    if not _backend.is_compiled():
        return  # another warning says so
    key = re.sub(r"\d+", "", cause)
    if key in _said or len(_said) >= _MOST_SAID or not is_small_mlp(options.model, x):
        return
    _said.add(key)
    warn_user(
        f"plain PyTorch serves this small MLP, which takes it {_RATIO} as long as the fused inner loop: {cause}. "
        "backend='reference' chooses plain PyTorch without this warning",
        _backend.FallbackWarning,
    )


def is_small_mlp(model: nn.Module, x: Any) -> bool:
    """Whether a model has only nn.Linear of matching widths and pointwise activations, and fits the fused inner loop.

    Judges by the modules alone, not by what the forward does with them.
    """
    widths: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            if widths and widths[-1] != module.in_features:
                return False
            widths += [module.out_features] if widths else [module.in_features, module.out_features]
        elif not _is_pointwise(module):
            return False
    if not widths or not isinstance(x, Tensor) or x.dim() < 2 or x[0, 0].numel() != widths[0]:
        return False
    return not unserved(tuple(widths), x.shape[1], next(model.parameters()).dtype)


def _is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a known activation, a container or a user-defined class, without tensors of its own."""
    if any(held is not None for held in (*module._parameters.values(), *module._buffers.values())):
        return False
    kind = type(module)
    if kind.__module__.split(".")[0] != "torch":
        return True
    return kind in _CONTAINERS or (kind in _POINTWISE and not (kind is nn.Dropout and module.training))
