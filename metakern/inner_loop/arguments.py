"""Validation and normalisation of the batched inner loop's arguments.

Axis legend: T tasks, S samples of a task, K inner steps, ``*shape`` the shape of one parameter tensor of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.core.checks import check_clip_norm, check_count, is_number
from metakern.core.transforms import is_transformed, wants_gradient
from metakern.core.trees import Data, as_data, first_tensor, map_tensors, named_tensors
from metakern.inner_loop.as_shipped import changed_instance
from metakern.inner_loop.task_loss import TaskLoss, divided
from metakern.inner_loop.vectorize import Vectorize, check_vectorize
from metakern.rules.gradient_descent import GradientDescent
from metakern.rules.rates import LearningRates, learning_rates, matching
from metakern.rules.registry import as_rule

#: α of gradient descent where neither lr nor rule is given.
DEFAULT_LR = 0.01


@dataclass(frozen=True)
class SampleSets:
    """The support or the query sets of T tasks.

    Attributes:
        name: "support" or "query"
        x: [T, S, ...], a tensor, or a tuple or dict of tensors
        y: [T, S, ...], likewise, or None where the loss takes no target
        mask: bool [T, S], False at padding, or None where there is none
        labels: the smallest and the largest class label, where the loss takes labels
        by_step: whether every inner step has its own sets: [T, K, S, ...]
    """

    name: str
    x: Data
    y: Data | None
    mask: Tensor | None
    labels: tuple[int, int] | None
    by_step: bool = False

    @property
    def num_tasks(self) -> int:
        """T."""
        return first_tensor(self.x).shape[0]

    @property
    def num_samples(self) -> int:
        """S."""
        return first_tensor(self.x).shape[2 if self.by_step else 1]

    @property
    def device(self) -> torch.device:
        """Device of the samples."""
        return first_tensor(self.x).device

    @property
    def named(self) -> dict[str, Tensor]:
        """The tensors of x and y by their names in error messages."""
        targets = {} if self.y is None else named_tensors(f"{self.name}_y", self.y)
        return {**named_tensors(f"{self.name}_x", self.x), **targets}

    @property
    def tensors(self) -> tuple[Data, ...]:
        """The data with a task axis: x, and y and the mask where given."""
        return tuple(part for part in (self.x, self.y, self.mask) if part is not None)

    def parts(self, x: Data, *rest: Data) -> tuple[Data, Data | None, Tensor | None]:
        """Split :attr:`tensors`, or a transformed copy of them, into x, y and mask."""
        return x, None if self.y is None else rest[0], None if self.mask is None else rest[-1]

    def with_tensors(self, tensors: Sequence[Data]) -> SampleSets:
        """A copy with other :attr:`tensors`."""
        return SampleSets(self.name, *self.parts(*tensors), self.labels, self.by_step)

    def replaced(self, instead: Mapping[int, Tensor]) -> SampleSets:
        """A copy with some tensors replaced, keyed by their ids."""
        if not instead:
            return self
        return self.with_tensors([map_tensors(lambda x: instead.get(id(x), x), part) for part in self.tensors])

    def at_step(self, step: int) -> SampleSets:
        """The sets [T, S, ...] of one inner step."""
        if not self.by_step:
            return self
        tensors = [map_tensors(lambda tensor: tensor[:, step], part) for part in self.tensors]
        return SampleSets(self.name, *self.parts(*tensors), self.labels)


# --------------------------------------------------------------------------------------------------------------- calls


class LoopOptions(NamedTuple):
    """Options that adapt, meta_loss and meta_backward share, with their defaults; see :func:`metakern.adapt`."""

    model: nn.Module
    loss: Callable[..., Tensor] = F.mse_loss
    steps: int = 1
    lr: Any = DEFAULT_LR
    first_order: bool | Sequence[bool] = False
    parameters: str | Sequence[str] | None = None
    clip_norm: float | None = None
    checkpoint_every: int | None = None
    vectorize: Vectorize = "auto"
    backend: str | None = None
    explain: bool = False
    accumulate: int = 1
    support_per_step: bool = False
    rule: Any = None

    def checked(self) -> LoopOptions:
        """The options, validated, with counts and norms as Python numbers."""
        if not is_transformed() and torch.is_inference_mode_enabled():
            raise RuntimeError(
                "the inner loop takes gradients, which torch.inference_mode() forbids; use torch.no_grad()"
            )
        every = self.checkpoint_every
        check_vectorize(self.vectorize)
        if not isinstance(self.support_per_step, bool):
            raise TypeError(f"support_per_step must be a bool, got {self.support_per_step!r}")
        if self.rule is not None and (type(self.lr) is not float or self.lr != DEFAULT_LR):
            raise ValueError(f"lr and rule exclude each other: lr={self.lr!r} is the short form of gradient descent")
        return self._replace(
            steps=check_count("steps", self.steps, minimum=0),
            clip_norm=check_clip_norm(self.clip_norm),
            checkpoint_every=None if every is None else check_count("checkpoint_every", every),
            accumulate=check_count("accumulate", self.accumulate),
            rule=as_rule(self.rule),
        )

    @property
    def descent(self) -> GradientDescent | None:
        """The rule if it is an unmodified GradientDescent (no subclass, no hooks), else None."""
        plain = type(self.rule) is GradientDescent and not changed_instance(self.rule)
        return self.rule if plain else None

    @property
    def is_descent(self) -> bool:
        """Whether the inner steps are gradient descent, by ``lr`` or by a rule."""
        return self.rule is None or self.descent is not None

    def learning_rates(self, params: Mapping[str, Tensor]) -> LearningRates:
        """Learning rates α of gradient descent for the params of one task, [*shape] each, by name."""
        if self.descent is None:
            return learning_rates(self.lr, params, self.steps)
        rates, most = self.descent.learning_rates(params), self.descent.steps
        if not rates.per_step or most == self.steps:
            return rates
        if most is not None and most < self.steps:
            raise ValueError(f"rule must have rates for all {self.steps} steps, got rates for {most}")
        assert isinstance(rates.values, list)
        return LearningRates([rate[: self.steps] for rate in rates.values], True)

    @property
    def largest_norm(self) -> float | None:
        """The smaller of the two clipping norms, this option's and the gradient descent rule's."""
        own = None if self.descent is None else self.descent.clip_norm
        if own is None or self.clip_norm is None:
            return self.clip_norm if own is None else own
        return min(own, self.clip_norm)


@dataclass
class Call:
    """One call of adapt, meta_loss or meta_backward, as the engines see it.

    Attributes:
        name: "adapt", "meta_loss" or "meta_backward"
        options: checked options
        support: (x, y), as the caller gave them
        query: likewise; None for adapt
        masks: masks of support and query sets
        step_weights: weights of the query losses after every step, or None
        moves_statistics: whether the call updates the model's running statistics
        prepared: each engine's prepared plan for the call, by the engine's name
        reasons: why each engine asked so far does not serve the call
    """

    name: str
    options: LoopOptions
    support: Any
    query: Any = None
    masks: tuple[Tensor | None, Tensor | None] = (None, None)
    step_weights: Any = None
    moves_statistics: bool = True
    prepared: dict[str, Any] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    @property
    def is_masked(self) -> bool:
        """Whether support or query sets are padded."""
        return any(mask is not None for mask in self.masks)


# ------------------------------------------------------------------------------------------------------- sample sets


def sample_sets(
    name: str,
    data: Any,
    mask: Tensor | None,
    loss: TaskLoss,
    num_tasks: int | None = None,
    steps: int | None = None,
) -> SampleSets:
    """The sets of T tasks from a pair (x, y), each [T, S, ...]; ``name`` is "support" or "query".

    With ``steps``, K, one set for each inner step: [T, K, S, ...]. Padding, where ``mask`` [T, S] is False, may hold
    anything: it is replaced by the task's first real sample.
    """
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise TypeError(f"{name} must be a pair ({name}_x, {name}_y), got {type(data).__name__}")
    x, y = data
    axes = check_samples(f"{name}_x", x, num_tasks, steps)
    if y is not None:
        legend = "[T, S]" if steps is None else "[T, K, S]"
        check_samples(f"{name}_y", y, num_tasks, steps)
        for part, tensor in named_tensors(f"{name}_y", y).items():
            if tensor.shape[: len(axes)] != axes:
                raise ValueError(
                    f"{part} must share {legend} with {name}_x, {list(axes)}, got {list(tensor.shape[: len(axes)])}"
                )
    elif loss.needs_target:
        function = getattr(loss.loss, "__name__", type(loss.loss).__name__)
        raise TypeError(
            f"{name}_y must be given: {function} compares predictions with targets; None is for a loss that takes the "
            "prediction alone"
        )
    x, y = as_data(x), as_data(y)
    if mask is not None:
        _check_mask(f"{name}_mask", mask, axes, first_tensor(x).device)
        first = mask.to(torch.int8).argmax(-1, keepdim=True)
        source = torch.where(mask, torch.arange(axes[-1], device=mask.device), first)
        leading = torch.meshgrid(*(torch.arange(n, device=mask.device) for n in axes[:-1]), indexing="ij")
        places = (*(index.unsqueeze(-1) for index in leading), source)
        x, y = (map_tensors(lambda tensor: tensor[places], part) for part in (x, y))
    return SampleSets(name, x, y, mask, loss.label_range(y, f"{name}_y"), steps is not None)


def split(batch: SampleSets, parts: int, loss: TaskLoss) -> list[tuple[SampleSets, Tensor]]:
    """Split sets [T, S, ...] into ``parts``, at most S; returns each part and the share [T] of its loss in the whole.

    All parts are masked, as a task may have no sample in some of them.
    """
    samples = batch.num_samples
    loss.check_parts(batch.y)
    mask = batch.mask
    if mask is None:
        mask = torch.ones(batch.num_tasks, samples, dtype=torch.bool, device=batch.device)
    masked = SampleSets(batch.name, batch.x, batch.y, mask, batch.labels)
    parts = min(parts, samples)
    bounds = [samples * index // parts for index in range(parts + 1)]
    made = []
    for begin, end in pairwise(bounds):
        part = masked.with_tensors(
            [map_tensors(itemgetter((slice(None), slice(begin, end))), d) for d in masked.tensors]
        )
        made.append((part, loss.counts(part.y, part.mask)))
    if loss.is_sum:
        return made
    whole = torch.stack([counts for _, counts in made]).sum(0)
    return [(part, divided(counts, whole)) for part, counts in made]


def check_samples(name: str, x: Any, num_tasks: int | None = None, steps: int | None = None) -> torch.Size:
    """The leading axes that all tensors of ``x`` share: [T, S], or [T, K, S] with ``steps``.

    Raises unless T and S are at least 1, and T equals ``num_tasks`` if that is given.
    """
    shape: torch.Size | None = None
    for part, tensor in named_tensors(name, x).items():
        if not torch.compiler.is_compiling() and tensor.is_inference():
            raise RuntimeError(
                f"{part} was made in torch.inference_mode(), which forbids gradients; use torch.no_grad()"
            )
        if steps is None:
            if tensor.dim() < 2 or not tensor.shape[0] or not tensor.shape[1]:
                got = list(tensor.shape)
                raise ValueError(f"{part} must be [T, S, ...] with at least 1 task and 1 sample, got shape {got}")
        elif tensor.dim() < 3 or not tensor.shape[0] or not tensor.shape[2] or tensor.shape[1] != steps:
            raise ValueError(
                f"{part} must be [T, K, S, ...] for support_per_step=True, with K = {steps} inner steps and at least 1 "
                f"task and 1 sample, got shape {list(tensor.shape)}"
            )
        if num_tasks is not None and tensor.shape[0] != num_tasks:
            raise ValueError(f"{part} must share the task axis, T = {num_tasks}, got shape {list(tensor.shape)}")
        axes = tensor.shape[: 2 if steps is None else 3]
        if shape is not None and axes != shape:
            raise ValueError(f"{part} must begin with {list(shape)} as the other tensors, got {list(tensor.shape)}")
        shape = axes
    assert shape is not None
    return shape


def _check_mask(name: str, mask: Any, axes: torch.Size, device: torch.device) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, got {got}")
    if mask.shape != axes:
        legend = "[T, S]" if len(axes) == 2 else "[T, K, S]"
        raise ValueError(f"{name} must be {legend}, {list(axes)}, got {list(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"{name} must be on the device of the samples, {device}, got {mask.device}")
    if not torch.compiler.is_compiling() and not bool(mask.any(-1).all()):
        empty = (~mask.any(-1)).nonzero()[:, 0].unique().tolist()
        raise ValueError(f"{name} must leave every task a sample, got none for tasks {empty}")


def check_labels(batch: SampleSets, prediction: Any) -> None:
    """Raise ValueError for a label without a model output; ``prediction`` is [S, classes, ...]."""
    if batch.labels is None or not isinstance(prediction, Tensor):
        return
    if prediction.dim() > 1 and batch.labels[1] >= prediction.shape[1]:
        classes = prediction.shape[1]
        raise ValueError(
            f"{batch.name}_y must be 0 to {classes - 1}, as the model has {classes} outputs, got {batch.labels[1]}"
        )


# ----------------------------------------------------------------------------------------------------------- options


def adapted_names(model: nn.Module, patterns: str | Sequence[str] | None) -> list[str]:
    """Names of the adapted parameters: those that require gradients and, unless ``patterns`` is None, match one.

    In a glob pattern ``*`` stands for any characters, ``?`` for one.
    A tied parameter is listed under its first name and matched by any of its names.
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
        expression = matching(pattern)
        hits = {first[id(p)] for name, p in aliases if wants_gradient(p) and expression.fullmatch(name)}
        if not hits:
            raise ValueError(f"parameters: {pattern!r} matches none that requires a gradient; there are {names}")
        matched |= hits
    return [name for name in names if name in matched]


def first_order_steps(first_order: bool | Sequence[bool], steps: int) -> list[bool]:
    """One bool for every inner step."""
    if isinstance(first_order, (bool, np.bool_)):
        return [bool(first_order)] * steps
    if not isinstance(first_order, Sequence) or not all(isinstance(flag, (bool, np.bool_)) for flag in first_order):
        raise TypeError(f"first_order must be a bool or a sequence of bools, got {first_order!r}")
    if len(first_order) != steps:
        raise ValueError(f"first_order must have one bool a step, {steps}, got {len(first_order)}")
    return [bool(flag) for flag in first_order]


def check_step_weights(weights: Any, steps: int) -> Sequence[float] | Tensor:
    """Check the weights of the query losses, one per step; returns a list of numbers, or the tensor [K]."""
    if not steps:
        raise ValueError("step_weights weigh the query losses after every inner step, of which steps=0 takes none")
    if isinstance(weights, Tensor):
        if weights.shape != (steps,):
            raise ValueError(f"step_weights must have one weight a step, [{steps}], got {list(weights.shape)}")
        return weights
    if not isinstance(weights, (Sequence, np.ndarray)) or not all(is_number(w) for w in weights):
        raise TypeError(f"step_weights must be a tensor or a sequence of numbers, got {weights!r}")
    if len(weights) != steps:
        raise ValueError(f"step_weights must have one weight a step, {steps}, got {len(weights)}")
    if not all(math.isfinite(w) for w in weights):
        raise ValueError(f"step_weights must be finite, got {weights}")
    return [float(w) for w in weights]
