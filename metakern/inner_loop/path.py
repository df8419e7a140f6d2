"""Dispatch of adapt, meta_loss and meta_backward to an engine, and how the choice is reported."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from metakern.core import backend as _backend
from metakern.inner_loop.arguments import Call
from metakern.inner_loop.engines import ENGINES, Engine, Unserved

_log = logging.getLogger("metakern")

Result = TypeVar("Result")


def serve(call: Call, run: Callable[[Engine], Result]) -> Result:
    """Run a call on the first engine that serves it.

    Args:
        call: the call, with checked options
        run: calls one of the engine's methods

    Raises:
        RuntimeError: for a backend requested by name that does not serve the call
    """
    refused: list[tuple[Engine, str]] = []
    for engine in ENGINES:
        reason = engine.serves(call)
        cause = reason or ""
        if reason is None:
            try:
                result = run(engine)
            except Unserved as unserved:
                reason = str(unserved)
                cause = unserved.cause or reason
            else:
                _say(call, engine)
                for other, why in refused:
                    other.missed(call, why)
                return result
        call.reasons.append(reason)
        refused.append((engine, cause))
    name = _backend.requested(call.options.backend)
    raise RuntimeError(f"backend {name!r} cannot run: {'; '.join(call.reasons[:-1])}")


def _say(call: Call, engine: Engine) -> None:
    """Report how a call was served: to the log at DEBUG, and on stdout with ``explain``."""
    if torch.compiler.is_compiling() or not (call.options.explain or _log.isEnabledFor(logging.DEBUG)):
        return
    line = f"{call.name}: {engine.described(call)}"
    _log.debug(line)
    if call.options.explain:
        print(line)
