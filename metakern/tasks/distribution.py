"""Interfaces of task distributions and task batches, and the batch of few-shot tasks.

Axis legend: T tasks, S support and Q query samples of a task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from metakern.core.torch_private import parse_to
from metakern.core.trees import Data, first_tensor, map_tensors, named_tensors

#: The splits of every distribution: for meta-training, for tuning, and for the final test.
SPLITS = ("train", "valid", "test")


class ShortRepr:
    """Mixin: a repr of the class name and its settings, the attributes that are numbers, strings or ShortRepr."""

    def __repr__(self) -> str:
        def is_short(value: Any) -> bool:
            if isinstance(value, tuple):
                return bool(value) and all(isinstance(part, ShortRepr) for part in value)
            return isinstance(value, (bool, int, float, str, ShortRepr))

        shown = {name: value for name, value in vars(self).items() if not name.startswith("_") and is_short(value)}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


class TaskBatch(Protocol):
    """T tasks that are learned side by side.

    Example:
        >>> batch = Sinusoid().sample(32, generator)
        >>> batch.select(slice(0, 8)).num_tasks
        8
    """

    num_tasks: int

    def select(self, tasks: slice) -> TaskBatch:
        """Some of the tasks, independent of the rest of the batch, so that processes can share a batch."""
        ...


@runtime_checkable
class TaskDistribution(Protocol):
    """A distribution of tasks; any class with these two methods is one.

    Example:
        >>> isinstance(Sinusoid(), TaskDistribution)
        True
    """

    def sample(self, num_tasks: int, generator: torch.Generator) -> Any:
        """Draw a :class:`TaskBatch` of ``num_tasks`` tasks; all randomness comes from ``generator``."""
        ...

    def split(self, name: str) -> TaskDistribution:
        """The distribution of one split, "train", "valid" or "test"; no two splits share a task."""
        ...


@dataclass(frozen=True, repr=False)
class Episodes:
    """A batch of T few-shot tasks; every tensor has the task axis first.

    For a model with several inputs they are a tuple of tensors (positional arguments) or a dict of tensors (keyword
    arguments). Targets may be several tensors too, or None if the loss takes none.

    Attributes:
        support_x: inputs to adapt to, [T, S, ...]
        support_y: their targets, [T, S, ...]; class labels [T, S], 64-bit integers
        query_x: inputs to evaluate the adapted model on, [T, Q, ...]
        query_y: their targets
        modes: [T], 64-bit integers: index of the mixture component, or of the domain, of every task; for evaluation:
            only the oracle, :class:`metakern.learners.ClusteredLearner` with ``assign="modes"``, learns from it

    Raises:
        TypeError: for anything but tensors, tuples and dicts of them.
        ValueError: for tensors that do not share the task axis.

    Example:
        >>> batch = Episodes(support_x, support_y, query_x, query_y)
        >>> batch.num_tasks
        8
    """

    support_x: Data
    support_y: Data | None
    query_x: Data
    query_y: Data | None
    modes: Tensor | None = None

    def __post_init__(self) -> None:
        first = next(iter(named_tensors("support_x", self.support_x).values()))
        for name, data in self._tensors().items():
            for part, tensor in named_tensors(name, data).items():
                if tensor.ndim == 0 or tensor.shape[0] != first.shape[0]:
                    raise ValueError(
                        f"{part} must have the task axis of support_x, {list(first.shape)}, first, "
                        f"got {list(tensor.shape)}"
                    )

    def __repr__(self) -> str:
        parts = []
        for name, data in self._tensors().items():
            shapes = {part.removeprefix(name): list(x.shape) for part, x in named_tensors(name, data).items()}
            parts.append(f"{name}={shapes.get('', shapes)}")
        return f"Episodes({', '.join(parts)})"

    @property
    def num_tasks(self) -> int:
        """T."""
        return first_tensor(self.support_x).shape[0]

    @property
    def support(self) -> tuple[Data, Data | None]:
        """(x, y) of the support sets."""
        return self.support_x, self.support_y

    @property
    def query(self) -> tuple[Data, Data | None]:
        """(x, y) of the query sets."""
        return self.query_x, self.query_y

    def select(self, tasks: slice | Tensor) -> Self:
        """Some of the tasks: a slice, indices, or a mask [T]."""
        return self._map(lambda tensor: tensor[tasks])

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Apply ``Tensor.to`` to every tensor; integers keep their dtype, as in ``nn.Module.to``."""
        device, dtype, non_blocking, _ = parse_to(*args, **kwargs)
        return self._map(lambda x: x.to(device, dtype if x.is_floating_point() else None, non_blocking))

    def _tensors(self) -> dict[str, Data]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{**vars(self), **{n: map_tensors(function, data) for n, data in self._tensors().items()}})


def check_num_tasks(num_tasks: int) -> None:
    """Raise ValueError unless there is at least one task."""
    if num_tasks < 1:
        raise ValueError(f"num_tasks must be at least 1, got {num_tasks}")


def check_split(name: str) -> None:
    """Raise ValueError unless ``name`` is one of :data:`SPLITS`."""
    if name not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {name!r}")
