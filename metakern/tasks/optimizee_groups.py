"""Problems of several kinds in one batch, grouped by kind: problems of one group have the same shapes.

A coordinatewise rule takes all params of such a batch as one long vector, so that one launch serves problems of all
shapes. Axis legend: T problems, G groups of problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from metakern.tasks.distribution import ShortRepr, check_num_tasks
from metakern.tasks.optimizees import Optimizees


class MixedOptimizees(ShortRepr):
    """A mixture of distributions of problems, which may differ in kind and size.

    Args:
        distributions: the kinds
        weights: their probabilities, up to a common factor; default: all the same
        even: whether a sample has the same number of problems of every kind, give or take one: the first kinds have
            one more. Evolution strategies then keep the problems of a kind in one group, which saves most of the
            overhead of small problems

    Raises:
        ValueError: without distributions, and for weights of another number, negative, not finite, or all zero.

    Example:
        >>> problems = MixedOptimizees([DigitsMLP(), DigitsCNN()], weights=[0.75, 0.25])
        >>> batch = problems.sample(8, generator)
        >>> batch.loss(batch.init_params()).shape
        torch.Size([8])
    """

    def __init__(
        self, distributions: Sequence[Optimizees], weights: Sequence[float] | None = None, *, even: bool = False
    ) -> None:
        self.distributions = tuple(distributions)
        self.weights = (1.0,) * len(self.distributions) if weights is None else tuple(weights)
        self._even = even
        if even and weights is not None and len(set(self.weights)) > 1:
            raise ValueError(f"weights must all be the same for even=True, or left out, got {list(self.weights)}")
        if not self.distributions:
            raise ValueError("distributions must hold at least one, got none")
        if len(self.weights) != len(self.distributions):
            raise ValueError(f"weights must be {len(self.distributions)}, one a distribution, got {len(self.weights)}")
        if not all(0 <= weight < math.inf for weight in self.weights) or not any(self.weights):
            raise ValueError(f"weights must be finite, at least 0, and not all 0, got {list(self.weights)}")

    @property
    def even(self) -> bool:
        """Whether samples have the same number of problems of every kind."""
        return self._even

    def split(self, name: str) -> MixedOptimizees:
        """The same mixture of another split."""
        kinds = [distribution.split(name) for distribution in self.distributions]
        return MixedOptimizees(kinds, self.weights, even=self.even)

    def sample(self, num_tasks: int, generator: torch.Generator) -> MixedBatch:
        """Draw the kind of every problem, then the problems, each kind with a generator of its own."""
        check_num_tasks(num_tasks)
        if self.even:
            modes = torch.arange(num_tasks) % len(self.distributions)
        else:
            weights = torch.tensor(self.weights, dtype=torch.float64)
            modes = torch.multinomial(weights, num_tasks, replacement=True, generator=generator)
        seeds = torch.randint(2**63 - 1, (len(self.distributions),), generator=generator).tolist()
        counts = modes.bincount(minlength=len(self.distributions)).tolist()
        groups = [
            distribution.sample(count, torch.Generator().manual_seed(seed))
            for distribution, count, seed in zip(self.distributions, counts, seeds, strict=True)
            if count
        ]
        return MixedBatch(groups, modes.sort().values, even=self.even)


class MixedBatch:
    """T problems in G groups, one group per kind. Params are a tuple of the groups' params, in their order.

    Attributes:
        groups: one batch of problems per kind; the T problems are theirs, group after group
        modes: the kind of each problem, as its index in the mixture's distributions, [T], 64-bit integers, ascending
        even: whether samples of the mixture all have the same modes

    Example:
        >>> batch = MixedOptimizees([Quadratics(), Bowls()]).sample(8, generator)
        >>> isinstance(batch, MixedBatch), len(batch.init_params())
        (True, 2)
    """

    def __init__(self, groups: Sequence[Any], modes: Tensor, *, even: bool = False) -> None:
        self.even = even
        self.groups, self.modes, self.num_tasks = tuple(groups), modes, len(modes)

    def __repr__(self) -> str:
        return f"MixedBatch({', '.join(map(repr, self.groups))})"

    def init_params(self) -> tuple[Any, ...]:
        """Fresh starting points of every group."""
        return tuple(group.init_params() for group in self.groups)

    def loss(self, params: tuple[Any, ...]) -> Tensor:
        """Losses [T] on the next minibatch of each problem."""
        return torch.cat([group.loss(piece) for group, piece in zip(self.groups, params, strict=True)])

    def full_loss(self, params: tuple[Any, ...]) -> Tensor:
        """Losses [T] on all data of each problem."""
        return torch.cat([group.full_loss(piece) for group, piece in zip(self.groups, params, strict=True)])

    def draw(self, function: Callable[..., Tensor], *shape: int) -> Tensor:
        """Random numbers [T, *shape] from ``function``, which is called like ``torch.randn``."""
        return torch.cat([group.draw(function, *shape) for group in self.groups])

    def kinds(self) -> list[tuple[tuple[int, ...], Any]]:
        """Each group with its place in the mixture's distributions; of nested mixtures the groups within."""
        found: list[tuple[tuple[int, ...], Any]] = []
        for kind, group in zip(self.modes.unique().tolist(), self.groups, strict=True):
            inner = group.kinds() if isinstance(group, MixedBatch) else [((), group)]
            found += [((kind, *place), each) for place, each in inner]
        return found

    def held_out_loss(self, params: tuple[Any, ...]) -> Tensor:
        """Losses [T] on held-out samples of each problem."""
        return torch.cat([group.held_out_loss(piece) for group, piece in zip(self.groups, params, strict=True)])

    @property
    def has_held_out(self) -> bool:
        """Whether every group has held-out samples."""
        return all(getattr(group, "has_held_out", False) for group in self.groups)

    def select(self, tasks: slice | Tensor) -> MixedBatch:
        """Some of the problems, in their order: a slice, ascending indices, or a mask [T].

        Raises:
            ValueError: where no problem is left, or indices do not ascend.
        """
        tasks = tasks.cpu() if isinstance(tasks, Tensor) else tasks
        rows = torch.arange(self.num_tasks)[tasks]
        if not len(rows) or bool((rows.diff() < 0).any()):
            raise ValueError(f"tasks must select at least one of the {self.num_tasks} problems, ascending, got {tasks}")
        groups, first = [], 0
        for group in self.groups:
            kept = rows[(rows >= first) & (rows < first + group.num_tasks)] - first
            first += group.num_tasks
            if len(kept):
                groups.append(group.select(_slice(kept, tasks.step) if isinstance(tasks, slice) else kept))
        return MixedBatch(groups, self.modes[rows.to(self.modes.device)], even=self.even)

    def to(self, device: torch.device | str) -> Self:
        """The same problems on another device."""
        return type(self)([group.to(device) for group in self.groups], self.modes.to(device), even=self.even)


def _slice(rows: Tensor, step: int | None) -> slice:
    """Rows as a slice: batches of problems need not support other selections."""
    return slice(int(rows[0]), int(rows[-1]) + 1, step)
