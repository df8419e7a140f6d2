"""Helpers to run tests in separate processes, forked from one that has imported torch, which takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Seconds after which a process counts as hanging; the machine may be busy.
PATIENCE = 120

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.training.problems", "torch._dynamo"])  # the first outer step imports the latter


def start(target: Callable[..., Any], *arguments: Any, output: Path, environment: dict[str, str] | None = None) -> Any:
    """A process that calls ``target``, with its standard error in a file."""
    process = _context.Process(target=_call, args=(target, arguments, output, environment or {}), daemon=True)
    process.start()
    return process


def start_ranks(world: int, target: Callable[..., Any], *arguments: Any, output: Path) -> list[Any]:
    """Processes as torchrun starts them; output of rank r in the folder's file r."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    output.mkdir(exist_ok=True)
    return [
        start(target, *arguments, output=output / str(rank), environment={**common, "RANK": str(rank)})
        for rank in range(world)
    ]


def ended(process: Any) -> int:
    """The exit code of a process, waited for."""
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"a process did not end within {PATIENCE} s")
    return int(process.exitcode)


def wait_for(condition: Callable[[], Any], what: str) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {PATIENCE} s"
        time.sleep(0.01)


def _call(target: Callable[..., Any], arguments: tuple[Any, ...], output: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    sys.stderr = output.open("w", buffering=1)
    target(*arguments)
