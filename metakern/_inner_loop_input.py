"""Arguments of the batched inner loop: checked, and brought into one form.

Axis legend: T tasks, S samples of a task, K inner steps, ``*shape`` the shape of one parameter tensor of the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metakern._task_loss import TaskLoss
from metakern.ops.mlp_inner_loop_autograd import wants_gradient


@dataclass(frozen=True)
class TaskBatch:
    """The support or the query sets of T tasks.

    Attributes:
        name: "support" or "query"
        x: [T, S, ...]
        y: [T, S, ...]
        mask: bool [T, S], False at padding, or None where there is none
        labels: the smallest and the largest class label, where the loss takes labels
    """

    name: str
    x: Tensor
    y: Tensor
    mask: Tensor | None
    labels: tuple[int, int] | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What differs from task to task."""
        return (self.x, self.y) if self.mask is None else (self.x, self.y, self.mask)

    def with_tensors(self, tensors: Sequence[Tensor]) -> TaskBatch:
        """The batch with others in place of its ``tensors``."""
        mask = tensors[2] if self.mask is not None else None
        return TaskBatch(self.name, tensors[0], tensors[1], mask, self.labels)


# ------------------------------------------------------------------------------------------------------- task batches


def task_batch(name: str, data: Any, mask: Tensor | None, loss: TaskLoss, num_tasks: int | None = None) -> TaskBatch:
    """The sets of T tasks from a pair (x, y), each [T, S, ...]; ``name`` is "support" or "query".

    Padding, where ``mask`` [T, S] is False, is replaced by the task's first sample, so that it may hold anything.
    """
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise TypeError(f"{name} must be a pair ({name}_x, {name}_y), got {type(data).__name__}")
    x, y = data
    for part, tensor in (("x", x), ("y", y)):
        check_samples(f"{name}_{part}", tensor, num_tasks)
    if y.shape[:2] != x.shape[:2]:
        raise ValueError(f"{name}_y must share [T, S] with {name}_x, {list(x.shape[:2])}, got {list(y.shape[:2])}")
    if mask is not None:
        _check_mask(f"{name}_mask", mask, x)
        first = mask.to(torch.int8).argmax(1, keepdim=True)
        source = torch.where(mask, torch.arange(x.shape[1], device=x.device), first)
        tasks = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
        x, y = x[tasks, source], y[tasks, source]
    return TaskBatch(name, x, y, mask, loss.label_range(y, f"{name}_y"))


def check_samples(name: str, x: Any, num_tasks: int | None = None) -> None:
    """Raise unless ``x`` is [T, S, ...] with T and S at least 1, and T as expected if that is given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not torch.compiler.is_compiling() and x.is_inference():
        raise RuntimeError(f"{name} was made in torch.inference_mode(), which forbids gradients; use torch.no_grad()")
    if x.dim() < 2 or not x.shape[0] or not x.shape[1]:
        raise ValueError(f"{name} must be [T, S, ...] with at least 1 task and 1 sample, got shape {list(x.shape)}")
    if num_tasks is not None and x.shape[0] != num_tasks:
        raise ValueError(f"{name} must share the task axis, T = {num_tasks}, got shape {list(x.shape)}")


def _check_mask(name: str, mask: Any, x: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, got {got}")
    if mask.shape != x.shape[:2]:
        raise ValueError(f"{name} must be [T, S], {list(x.shape[:2])}, got {list(mask.shape)}")
    if not torch.compiler.is_compiling() and not bool(mask.any(1).all()):
        empty = (~mask.any(1)).nonzero().flatten().tolist()
        raise ValueError(f"{name} must leave every task a sample, got none for tasks {empty}")


def check_labels(batch: TaskBatch, prediction: Tensor) -> None:
    """Raise ValueError for a label that the model has no output for; ``prediction`` is [S, classes, ...]."""
    if batch.labels is not None and prediction.dim() > 1 and batch.labels[1] >= prediction.shape[1]:
        classes = prediction.shape[1]
        raise ValueError(
            f"{batch.name}_y must be 0 to {classes - 1}, as the model has {classes} outputs, got {batch.labels[1]}"
        )


# ----------------------------------------------------------------------------------------------------------- options


def adapted_names(model: nn.Module, patterns: str | Sequence[str] | None) -> list[str]:
    """Names of the parameters that are adapted: those that require gradients and match a glob pattern, or all.

    In a pattern ``*`` stands for any characters, ``?`` for one.
    A tied parameter goes by its first name and is matched by any of its names.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    names = [name for name, p in model.named_parameters() if wants_gradient(p)]
    if not names:
        raise ValueError("model must have a parameter that requires a gradient, got none")
    if patterns is None:
        return names
    if isinstance(patterns, str):
        patterns = [patterns]
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"parameters must be a glob pattern or a list of them, got {patterns!r}")
    if not patterns:
        raise ValueError("parameters must name at least one pattern, got none")
    first = {id(p): name for name, p in reversed(list(model.named_parameters()))}
    matched: set[str] = set()
    for pattern in patterns:
        aliases = model.named_parameters(remove_duplicate=False)
        # fnmatch would be the same; torch.compile does not trace it.
        expression = "".join({"*": ".*", "?": "."}.get(c) or re.escape(c) for c in pattern)
        hits = {first[id(p)] for name, p in aliases if wants_gradient(p) and re.fullmatch(expression, name)}
        if not hits:
            raise ValueError(f"parameters: {pattern!r} matches none that requires a gradient; there are {names}")
        matched |= hits
    return [name for name in names if name in matched]


def first_order_steps(first_order: bool | Sequence[bool], steps: int) -> list[bool]:
    """One bool for every inner step."""
    if isinstance(first_order, bool):
        return [first_order] * steps
    if not isinstance(first_order, Sequence) or not all(isinstance(flag, bool) for flag in first_order):
        raise TypeError(f"first_order must be a bool or a sequence of bools, got {first_order!r}")
    if len(first_order) != steps:
        raise ValueError(f"first_order must have one bool a step, {steps}, got {len(first_order)}")
    return list(first_order)


def check_clip_norm(clip_norm: Any) -> None:
    """Raise unless it is None or positive and finite."""
    if clip_norm is None:
        return
    if not isinstance(clip_norm, (int, float)) or isinstance(clip_norm, bool):
        raise TypeError(f"clip_norm must be a number, got {clip_norm!r}")
    if not 0 < clip_norm < math.inf:
        raise ValueError(f"clip_norm must be positive and finite, got {clip_norm}")


def check_step_weights(weights: Any, steps: int) -> Sequence[float] | Tensor:
    """Weights of the query loss after every step, one a step: a list of numbers, or a tensor [K]."""
    if isinstance(weights, Tensor):
        if weights.shape != (steps,):
            raise ValueError(f"step_weights must have one weight a step, [{steps}], got {list(weights.shape)}")
        return weights
    if not isinstance(weights, Sequence) or not all(isinstance(w, (int, float)) for w in weights):
        raise TypeError(f"step_weights must be a tensor or a sequence of numbers, got {weights!r}")
    if len(weights) != steps:
        raise ValueError(f"step_weights must have one weight a step, {steps}, got {len(weights)}")
    if not all(math.isfinite(w) for w in weights):
        raise ValueError(f"step_weights must be finite, got {weights}")
    return weights
