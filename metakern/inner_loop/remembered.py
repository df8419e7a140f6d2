"""A small cache per model, keyed by the model's identity, that dies with the model."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Generic, TypeVar

from torch import nn

Value = TypeVar("Value")


class Remembered(Generic[Value]):
    """Cache of values by model and key. Models are held weakly.

    A key must contain everything that the value depends on, besides the model's identity: its layers and modes, dtypes,
    shapes. It is computed anew for every call, so a changed model finds no stale entry.

    Args:
        most: maximum entries per model; the oldest is dropped first
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._of_models: dict[int, tuple[weakref.ref[nn.Module], dict[Hashable, Value]]] = {}

    def get(self, model: nn.Module, key: Hashable) -> Value | None:
        """The cached value, or None."""
        return self._of(model).get(key)

    def put(self, model: nn.Module, key: Hashable, value: Value) -> None:
        """Cache a value."""
        entries = {k: v for k, v in self._of(model).items() if k != key}  # a copy, as other threads may read
        entries[key] = value
        while len(entries) > self.most:
            del entries[next(iter(entries))]
        own = id(model)
        self._of_models[own] = weakref.ref(model, lambda gone: self._drop(own, gone)), entries

    def clear(self) -> None:
        """Forget everything."""
        self._of_models.clear()

    def __len__(self) -> int:
        """Number of entries over all models."""
        return sum(len(entries) for _, entries in list(self._of_models.values()))

    def _of(self, model: nn.Module) -> dict[Hashable, Value]:
        known = self._of_models.get(id(model))
        return known[1] if known is not None and known[0]() is model else {}

    def _drop(self, own: int, gone: weakref.ref[nn.Module]) -> None:
        known = self._of_models.get(own)
        if known is not None and known[0] is gone:  # else the id belongs to another model by now
            del self._of_models[own]
