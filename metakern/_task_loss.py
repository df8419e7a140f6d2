"""The loss of one task: with or without padding, in sums and counts.

Axis legend: T tasks, S samples of a task.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Losses of integer class labels, which index memory.
_LABEL_LOSSES = (F.cross_entropy, F.nll_loss)
_LABEL_MODULES = (nn.CrossEntropyLoss, nn.NLLLoss)


class TaskLoss:
    """The user's loss of one task, with or without padding among its samples."""

    def __init__(self, loss: Callable[..., Tensor], masked: bool) -> None:
        if not callable(loss):
            raise TypeError(f"loss must be callable as loss(prediction, y), got {type(loss).__name__}")
        self.loss = loss
        self.per_sample = _without_reduction(loss) if masked else None

    def __call__(self, prediction: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss [] of predictions [S, ...] and targets [S, ...]; with ``mask`` [S] the mean over its samples."""
        if mask is None:
            loss = self.loss(prediction, y)
            if not isinstance(loss, Tensor) or loss.dim():
                got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"loss must return one number a task, a tensor of shape [], got {got}")
            return loss
        assert self.per_sample is not None
        losses = self.per_sample(prediction, y)
        if losses.dim() == 0 or losses.shape[0] != mask.shape[0]:
            raise ValueError(
                f"loss must return one value a sample with reduction='none', {mask.shape[0]} here, got shape "
                f"{list(losses.shape)}"
            )
        losses = losses.flatten(1).mean(1) if losses.dim() > 1 else losses
        return torch.where(mask, losses, torch.zeros_like(losses)).sum() / mask.sum()

    def label_range(self, y: Tensor, name: str) -> tuple[int, int] | None:
        """The smallest and the largest label in ``y``, None where the loss takes none or they cannot be read."""
        function: Any = self.loss
        options: dict[str, Any] = {}
        if isinstance(function, functools.partial):
            function, options = function.func, function.keywords
        if isinstance(function, _LABEL_MODULES):
            ignored = function.ignore_index
        elif function in _LABEL_LOSSES:
            ignored = options.get("ignore_index", -100)
        else:
            return None
        if y.dtype not in (torch.int64, torch.int32) and (not y.is_floating_point() or y.dim() == 2):
            raise TypeError(f"{name} must hold class labels as int64, got {y.dtype}")
        capturing = y.is_cuda and torch.cuda.is_current_stream_capturing()
        if y.is_floating_point() or torch.compiler.is_compiling() or capturing:
            return None
        labels = y[y != ignored]
        if not labels.numel():
            return None
        smallest, largest = (int(label) for label in torch.aminmax(labels))
        if smallest < 0:
            raise ValueError(f"{name} must hold class labels from 0, got {smallest}")
        return smallest, largest


def _without_reduction(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss that returns a value for every sample."""
    if isinstance(loss, nn.Module) and hasattr(loss, "reduction"):
        per_sample: Any = copy.copy(loss)
        per_sample.reduction = "none"
        return per_sample  # type: ignore[no-any-return]
    if torch.compiler.is_compiling():  # which cannot look at signatures
        return functools.partial(loss, reduction="none")
    parameters = inspect.signature(loss).parameters.values()
    if any(p.name == "reduction" or p.kind is p.VAR_KEYWORD for p in parameters):
        return functools.partial(loss, reduction="none")
    raise TypeError(
        "loss must take reduction='none', as the functions of torch.nn.functional do, where a mask is given: its mean "
        f"is to leave padding out; got {loss!r}, which has no such argument"
    )
