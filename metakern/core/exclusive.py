"""One thread at a time where a model's tensors are replaced for a moment, as torch.func.functional_call does."""

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
    """The lock of a model, which a thread may take several times; none within torch.compile, and for no module.

    Without it another thread finds tensors of one task where the model's parameters belong, and may leave them there.
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
    if known is not None and known[0] is gone:  # else the id is another model's by now
        del _locks[key]


def _reset() -> None:
    """In a forked child no thread is left that would release a lock."""
    global _guard
    _guard = threading.Lock()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)
