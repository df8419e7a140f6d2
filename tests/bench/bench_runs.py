"""Helper: a ``--quick`` run of a benchmark, from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_quick(module: str, folder: Path, expected: str) -> Path:
    """The results of ``python -m bench.<module> --quick``, which prints ``expected``."""
    output = folder / "results.json"
    command = [sys.executable, "-m", f"bench.{module}", "--quick", "--threads", "1", "--output", str(output)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert expected in run.stdout
    return output
