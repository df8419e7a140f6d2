"""What a distribution of tasks is: two methods draw batches of tasks, and a batch of few-shot tasks is five tensors.

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

#: The splits of every distribution: to meta-train on, to choose by, and to report.
SPLITS = ("train", "valid", "test")


class ShortRepr:
    """A repr of the class's name and its settings: attributes that are numbers, strings, or others of this kind."""

    def __repr__(self) -> str:
        def is_short(value: Any) -> bool:
            if isinstance(value, tuple):
                return bool(value) and all(isinstance(part, ShortRepr) for part in value)
            return isinstance(value, (bool, int, float, str, ShortRepr))

        shown = {name: value for name, value in vars(self).items() if not name.startswith("_") and is_short(value)}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


class TaskBatch(Protocol):
    """T tasks that are learned side by side."""

    num_tasks: int

    def select(self, tasks: slice) -> TaskBatch:
        """Some of the tasks. They are the same, whatever else is in the batch: so processes share a batch."""
        ...


@runtime_checkable
class TaskDistribution(Protocol):
    """A distribution of tasks. A user's own is a class with these two methods."""

    def sample(self, num_tasks: int, generator: torch.Generator) -> Any:
        """Draw a :class:`TaskBatch` of ``num_tasks`` tasks; ``generator`` decides them and all randomness in them."""
        ...

    def split(self, name: str) -> TaskDistribution:
        """The same kind of tasks, of which no two splits share one: "train", "valid" or "test"."""
        ...


@dataclass(frozen=True, repr=False)
class Episodes:
    """T few-shot tasks; every tensor has the task axis first.

    Inputs of a model that takes several are a tuple of tensors, by position, or a dict of tensors, by keyword. Targets
    may be several tensors too, or None where the loss takes none.

    Attributes:
        support_x: what a task adapts to, [T, S, ...]
        support_y: its targets, [T, S, ...]; classes [T, S], 64-bit integers
        query_x: what the adapted model is judged by, [T, Q, ...]
        query_y: its targets
        modes: [T], 64-bit integers: the component of a mixture, or the domain, that a task comes from; for evaluation:
            no learner sees it but the oracle, :class:`metakern.learners.ClusteredLearner` with ``assign="modes"``

    Raises:
        TypeError: for anything but tensors, tuples and dicts of them.
        ValueError: for tensors that do not share the task axis.
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
        """Every tensor as ``Tensor.to`` makes it; integers keep their dtype, as ``nn.Module.to`` keeps them."""
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
    """Raise ValueError unless it is one of :data:`SPLITS`."""
    if name not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {name!r}")
