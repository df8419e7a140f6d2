"""Helpers for the tests of task distributions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def count_calls(function: Callable[[], Any]) -> int:
    """Number of torch operators that ``function`` calls."""
    with _Count() as count:
        function()
    return count.calls


def assert_same(first: Any, second: Any) -> None:
    """Fail unless two batches of episodes hold the same bits."""
    for name in ("support_x", "support_y", "query_x", "query_y", "modes"):
        one, other = getattr(first, name), getattr(second, name)
        assert (one is None) == (other is None), name
        assert one is None or torch.equal(one, other), name
