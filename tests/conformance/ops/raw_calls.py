"""Direct calls of every raw operator torch.ops.metakern.*, bypassing Python's argument checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from metakern.ops.core.registry import operators
from tests.conformance.ops.rows import ROWS

#: Operators of the compiled library.
COMPILED = tuple(name for op in ROWS for name in (*op.operators, *op.cpu_operators))

#: Those of them that also serve a GPU.
ON_GPU = tuple(name for op in ROWS for name in op.operators)

#: Operators of Triton's kernels.
TRITON = tuple(
    f"{op.name}_triton{name.removeprefix(op.name)}"
    for op in ROWS
    if op.serves("interpreted", torch.float32)
    for name in op.operators
)


def operator(name: str) -> Callable[..., Any]:
    """torch.ops.metakern.``name``; Triton's are registered on first use."""
    if "_triton" in name:
        for found in operators().values():
            found.prepare("triton")
    overloads: Callable[..., Any] = getattr(torch.ops.metakern, name)
    return overloads


def arguments(name: str, seed: int = 0, tasks: int = 3, loss: int = 0) -> list[Any]:
    """Arguments of an operator call, in order."""
    kind = name.replace("_triton", "")
    row = next(op for op in ROWS if kind in (*op.operators, *op.cpu_operators))
    return row.raw(kind, seed, tasks, loss, "_triton" if kind != name else "")


def places(args: list[Any]) -> Iterator[tuple[int, int | None]]:
    """Positions of tensors: index of the argument, and index within a list."""
    for index, value in enumerate(args):
        if isinstance(value, Tensor):
            yield index, None
        elif isinstance(value, list):
            yield from ((index, inner) for inner, x in enumerate(value) if isinstance(x, Tensor))


def tensor_at(args: list[Any], place: tuple[int, int | None]) -> Tensor:
    index, inner = place
    found: Tensor = args[index] if inner is None else args[index][inner]
    return found


def replaced(args: list[Any], place: tuple[int, int | None], value: Any) -> list[Any]:
    """The arguments with the tensor at one position replaced."""
    index, inner = place
    new = list(args)
    if inner is None:
        new[index] = value
    else:
        new[index] = [*args[index][:inner], value, *args[index][inner + 1 :]]
    return new
