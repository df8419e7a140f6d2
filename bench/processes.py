"""Measurements that need a process of their own: peak memory, and a fresh interpreter to take it in."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def _status(key: str) -> int:
    """A memory figure of this process in bytes: VmRSS, the memory it holds now, or VmHWM, the most it ever held."""
    match = re.search(rf"^{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def peak_bytes(work: Callable[[], Result]) -> tuple[int, Result]:
    """Peak resident memory of ``work`` above what the process held before it, and what it returns."""
    baseline = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    result = work()
    return _status("VmHWM") - baseline, result


def in_subprocess(module: str, *arguments: object) -> dict[str, Any]:
    """The JSON that ``python -m module arguments threads`` prints last, with as many threads as this process.

    Raises:
        RuntimeError: with what it wrote on stderr, where it fails
    """
    words = [*map(str, arguments), str(torch.get_num_threads())]
    run = subprocess.run(
        [sys.executable, "-m", module, *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    if run.returncode:
        raise RuntimeError(f"{module} {words} failed:\n{run.stderr}")
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result
