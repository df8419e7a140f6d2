"""torch.func.vmap of operators: the input of a batching rule, and the default rule, a loop over elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from metakern.ops.core.define_op import Operator


class Batch:
    """A batched call of one operator.

    Attributes:
        size: number of elements
        arguments: by name
        dims: batch axis of each tensor by argument name; None where it has none
        wants: names of the arguments whose gradients may be requested
    """

    def __init__(
        self,
        operator: Operator,
        run: Callable[[Any], Sequence[Any]],
        size: int,
        arguments: Sequence[Any],
        dims: Sequence[Any],
        wants: frozenset[str],
    ) -> None:
        self._operator, self._run, self.size, self.wants = operator, run, size, wants
        self.arguments, self.dims = operator.schema.Arguments(*arguments), operator.schema.Arguments(*dims)

    def call(self, *arguments: Any, **named: Any) -> Any:
        """Call the operator with these arguments; returns all results by name, private ones included."""
        schema = self._operator.schema
        return schema.Results(*self._run(schema.Arguments(*arguments, **named)))

    def element(self, index: int) -> Any:
        """The arguments of one element, by name."""
        pairs = zip(self.arguments, self.dims, strict=True)
        return type(self.arguments)(*(_selected(x, dim, index) for x, dim in pairs))

    def has_axis(self, name: str) -> bool:
        """Whether an argument has a batch axis."""
        dims = getattr(self.dims, name)
        return any(dim is not None for dim in dims) if isinstance(dims, (list, tuple)) else dims is not None

    def leading(self, name: str) -> Any:
        """An argument's tensors with the batch axis first; tensors without one are repeated along it."""
        value, dims = getattr(self.arguments, name), getattr(self.dims, name)
        if isinstance(value, (list, tuple)):
            return [leading(x, dim, self.size) for x, dim in zip(value, dims, strict=True)]
        return None if value is None else leading(value, dims, self.size)

    def check_not_empty(self) -> None:
        """Raise ValueError for an empty batch, whose results have unknown shapes."""
        if self.size == 0:
            raise ValueError(f"{self._operator.title} under vmap needs at least one element, got 0")


def leading(x: Tensor, dim: int | None, size: int) -> Tensor:
    """A tensor with the batch axis first; a tensor without one is repeated along it."""
    return x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def looped(batch: Batch) -> tuple[Any, Any]:
    """Default batching rule: loop over the elements.

    Returns:
        results, and their batch axes
    """
    batch.check_not_empty()
    rows = [batch.call(*batch.element(index)) for index in range(batch.size)]
    results = [_stacked(column) for column in zip(*rows, strict=True)]
    return results, [[0] * len(x) if isinstance(x, list) else 0 for x in results]


def _selected(x: Any, dim: Any, index: int) -> Any:
    if isinstance(dim, (list, tuple)):
        return [_selected(part, d, index) for part, d in zip(x, dim, strict=True)]
    return x if dim is None else x.select(dim, index)


def _stacked(column: Sequence[Any]) -> Any:
    if isinstance(column[0], (list, tuple)):
        return [torch.stack(parts) for parts in zip(*column, strict=True)]
    return torch.stack(list(column))
