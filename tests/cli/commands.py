"""Helpers that run the command line: in a separate process, or in this one, which saves seconds of imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from metakern.cli import app

ENVIRONMENT = {"COLUMNS": "120", "HF_HUB_OFFLINE": "1"}

#: A small train maml.
SMALL = "--num-tasks 4 --steps 2 --eval-tasks 6 --test-tasks 6 --hidden 8"
DIGITS = f"train maml --tasks digits --queries 3 --iterations 4 --eval-every 2 --checkpoint-every 2 {SMALL}"
SINUSOID = f"train maml {SMALL} --scheduler none --eval-every 4 --checkpoint-every 3"

#: Timing keys of metrics.jsonl, which differ between runs.
TIMES = {"seconds", "tasks_per_second"}


def metakern(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m metakern`` in a separate process."""
    command = [sys.executable, "-m", "metakern", *arguments]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | ENVIRONMENT | environment,
    )  # fmt: skip


def invoke(arguments: str, **environment: str) -> Result:
    """Run the command in this process."""
    return CliRunner(env=ENVIRONMENT | environment).invoke(app, arguments.split())


def succeed(arguments: str) -> str:
    """Run a command that must succeed; returns its output."""
    result = invoke(arguments)
    assert result.exit_code == 0, result.stderr or result.exception
    return result.stdout


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without timings."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
