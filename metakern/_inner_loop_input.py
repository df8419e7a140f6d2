"""Arguments of the batched inner loop: checked, and brought into one form.

Axis legend: T tasks, S samples of a task, K inner steps, ``*shape`` the shape of one parameter tensor of the model.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.ops.mlp_inner_loop_autograd import wants_gradient

#: Losses of integer class labels, which index memory.
_LABEL_LOSSES = (F.cross_entropy, F.nll_loss)
_LABEL_MODULES = (nn.CrossEntropyLoss, nn.NLLLoss)


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


@dataclass(frozen=True)
class LearningRates:
    """α in the form of :func:`metakern.reference.inner_update.inner_update`: ``values``, selected by step or not."""

    values: float | Tensor | list[Tensor]
    per_step: bool


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


def check_labels(batch: TaskBatch, prediction: Tensor) -> None:
    """Raise ValueError for a label that the model has no output for; ``prediction`` is [S, classes, ...]."""
    if batch.labels is not None and prediction.dim() > 1 and batch.labels[1] >= prediction.shape[1]:
        classes = prediction.shape[1]
        raise ValueError(
            f"{batch.name}_y must be 0 to {classes - 1}, as the model has {classes} outputs, got {batch.labels[1]}"
        )


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


def check_count(name: str, value: Any, minimum: int = 1) -> None:
    """Raise unless it is an integer of at least ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


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


def learning_rates(lr: Any, params: Mapping[str, Tensor], steps: int) -> LearningRates:
    """α from a number, a tensor of one element, a mapping by name, or a sequence in the order of ``params``.

    Args:
        lr: see :func:`metakern.adapt`
        params: what is adapted, each [*shape]
        steps: K
    """
    if isinstance(lr, float) and math.isfinite(lr):  # what most calls bring, before the kinds that cost to recognise
        return LearningRates(lr, False)
    if isinstance(lr, (Mapping, nn.ParameterDict)):
        missing, unknown = [n for n in params if n not in lr], [n for n in lr if n not in params]
        if missing or unknown:
            raise ValueError(
                f"lr must name the adapted parameters, {list(params)}: missing {missing}, not among them {unknown}"
            )
        return _rates_of_tensors({name: lr[name] for name in params}, params, steps)
    if isinstance(lr, (list, tuple, nn.ParameterList)):
        if len(lr) != len(params):
            raise ValueError(f"lr must have one entry an adapted parameter, {len(params)}, got {len(lr)}")
        return _rates_of_tensors(dict(zip(params, lr, strict=True)), params, steps)
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(
                f"lr as one tensor must have 1 element, got shape {list(lr.shape)}; "
                "for one a parameter or step give a dict or a list"
            )
        return LearningRates(lr.reshape(()), False)
    check_rate("lr", lr)
    return LearningRates(float(lr), False)


def check_rate(name: str, lr: Any) -> None:
    """Raise unless a learning rate is a finite number or a floating tensor of one element."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor of 1 element, got shape {list(lr.shape)}")
        return
    if not isinstance(lr, (int, float)) or isinstance(lr, bool):
        raise TypeError(f"{name} must be a number or a tensor, got {type(lr).__name__}")
    if not math.isfinite(lr):
        raise ValueError(f"{name} must be finite, got {lr}")


def _rates_of_tensors(rates: Mapping[str, Any], params: Mapping[str, Tensor], steps: int) -> LearningRates:
    """α from one entry a parameter tensor."""
    values, layouts = {}, {}
    for name, rate in rates.items():
        p = params[name]
        if not isinstance(rate, Tensor):
            check_rate(f"lr[{name!r}]", rate)
        value = rate if isinstance(rate, Tensor) else torch.tensor(float(rate), dtype=p.dtype, device=p.device)
        layouts[name] = _layouts(name, value, p, steps)
        values[name] = value
    kinds = {layout for found in layouts.values() if len(found) == 1 for layout in found if layout != "tensor"}
    ambiguous = [name for name, found in layouts.items() if len(found) > 1]
    if ambiguous and len(kinds) != 1:
        raise ValueError(
            f"lr[{ambiguous[0]!r}] of shape [{steps}] may mean one a parameter or one a step: give "
            f"[{steps}, {steps}], one a step and parameter"
        )
    per_step = bool(kinds & {"step"})
    if not per_step:
        return LearningRates(list(values.values()), False)
    spread = [
        value if layouts[name] & {"step"} else value.expand(steps, *value.shape) for name, value in values.items()
    ]
    return LearningRates(spread, True)


def _layouts(name: str, value: Tensor, p: Tensor, steps: int) -> set[str]:
    """What the shape of a learning rate may mean: "tensor" [], "parameter" [*shape], "step" [K] or [K, *shape]."""
    if value.dim() == 0:
        return {"tensor"}
    if value.dtype != p.dtype:
        raise TypeError(f"lr[{name!r}] must have the parameter's dtype, {p.dtype}, got {value.dtype}")
    found = set()
    if value.shape == p.shape:
        found.add("parameter")
    if value.shape in ((steps,), (steps, *p.shape)):
        found.add("step")
    if not found:
        shapes = " or ".join(str(list(s)) for s in ((), tuple(p.shape), (steps,), (steps, *p.shape)))
        raise ValueError(f"lr[{name!r}] must have shape {shapes}, got {list(value.shape)}")
    return found
