"""Which path serves a call of adapt or meta_loss, the fused inner loop or the generic one, and how users hear of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from metakern.core import backend as _backend
from metakern.core.transforms import is_transformed
from metakern.inner_loop.arguments import TaskBatch
from metakern.inner_loop.engines.mlp import Options
from metakern.inner_loop.engines.mlp_model import Unserved
from metakern.inner_loop.loop import InnerLoop

_log = logging.getLogger("metakern")


def attempt(call: str, options: Options, fused: Callable[[], Any]) -> tuple[Any, str]:
    """What the fused inner loop returns, or None and the reason why it does not serve.

    Raises:
        RuntimeError: where it was asked for by name, and where the transforms around the call refuse the generic path
    """
    if options.steps == 0:  # nothing to fuse, whatever backend is asked for
        _backend.requested(options.backend)
        return None, "steps=0 takes the model as it is"
    try:
        result = fused()
    except Unserved as unserved:
        name = _backend.requested(options.backend)
        if name not in ("auto", "reference"):
            raise RuntimeError(f"backend {name!r} cannot run: {unserved}") from unserved
        if is_transformed() and (options.checkpoint_every is not None or not options.vectorize):
            raise RuntimeError(
                "checkpoint_every and vectorize=False do not work in torch.compile and torch.func where the fused "
                f"inner loop does not serve: {unserved}"
            ) from unserved
        return None, str(unserved)
    if is_heard(options):
        _say(options, f"{call}: K={options.steps}: fused inner loop, {type(options.model).__name__}")
    return result, ""


def say_generic(call: str, options: Options, loop: InnerLoop, support: TaskBatch, reason: str) -> None:
    """Tell how the generic path serves a call, and why."""
    if not is_heard(options):
        return
    tasks, samples = support.num_tasks, support.num_samples
    how = "all tasks at once by torch.vmap" if loop.model.vectorization.at_once else "one task after another"
    _say(
        options,
        f"{call}: T={tasks}, S={samples}, K={loop.num_steps}: generic path, {how}; "
        f"the fused inner loop does not serve: {reason}",
    )


def is_heard(options: Options) -> bool:
    """Whether anyone is told which path serves a call."""
    return not torch.compiler.is_compiling() and (options.explain or _log.isEnabledFor(logging.DEBUG))


def _say(options: Options, line: str) -> None:
    _log.debug(line)
    if options.explain:
        print(line)
