"""Per-model locks for code that swaps a model's tensors temporarily, as torch.func.functional_call does."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

_locks: dict[int, tuple[weakref.ref[nn.Module], Any]] = {}
_guard = threading.Lock()


def exclusive(model: Any) -> AbstractContextManager[Any]:
    """The reentrant lock of a model; a null context under torch.compile and for anything but an nn.Module.

    Without it another thread sees one task's tensors in place of the model's parameters, and may leave them there.
    """
    if torch.compiler.is_compiling() or not isinstance(model, nn.Module):
        return contextlib.nullcontext()
    key = id(model)
    with _guard:
        known = _locks.get(key)
        if known is None or known[0]() is not model:
            known = _locks[key] = weakref.ref(model, lambda gone: _drop(key, gone)), threading.RLock()
    lock: AbstractContextManager[Any] = known[1]
    return lock


def _drop(key: int, gone: Any) -> None:
    known = _locks.get(key)
    if known is not None and known[0] is gone:  # otherwise another model has the id by now
        del _locks[key]


def _reset() -> None:
    """Drop all locks in a forked child, where the threads that hold them do not exist."""
    global _guard
    _guard = threading.Lock()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)
