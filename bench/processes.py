"""Peak-memory measurement, and running a module in a fresh Python process."""

from __future__ import annotations

import ctypes
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
    """A memory figure of this process in bytes: VmRSS, current, or VmHWM, peak."""
    match = re.search(rf"^{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def peak_bytes(work: Callable[[], Result]) -> tuple[int, Result]:
    """Additional peak resident memory of ``work``, and its return value."""
    ctypes.CDLL(None).malloc_trim(0)  # else what an earlier call has freed would serve, unseen
    baseline = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    result = work()
    return _status("VmHWM") - baseline, result


def in_subprocess(module: str, *arguments: object) -> dict[str, Any]:
    """Run ``python -m module arguments threads`` with this process's thread count; returns its last line of JSON.

    Raises:
        RuntimeError: if it fails; with its stderr
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
