"""Peak memory of a meta-iteration against the number of inner steps K, each contender in a fresh process.

python -m bench.memory_steps [--output FILE]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from bench import machine
from bench.mlp_inner_loop.memory import memory_case
from bench.processes import in_subprocess

NAMES = ("metakern", "metakern, checkpoints", "vmap", "loop")
STEPS = (1, 3, 10, 30, 100, 300)
TASKS = 32
OUTPUT = Path(__file__).parent / "results" / "memory-steps.json"


def main(output: Annotated[Path, typer.Option(help="The results file.")] = OUTPUT) -> None:
    """Measure and write the results; progress goes to standard error."""
    peaks: dict[str, dict[str, int]] = {name: {} for name in NAMES}
    for steps in STEPS:
        for name in NAMES:
            run = in_subprocess("bench.mlp_inner_loop.memory", name, TASKS, steps, 1)
            peaks[name][str(steps)] = run["peak_bytes"]
        print(f"K = {steps} measured", file=sys.stderr)
    results = {
        "benchmark": "memory_steps",
        "command": "python -m bench.memory_steps",
        "machine": machine.describe(),
        "case": memory_case(TASKS, 1).describe()["title"].replace(", K = 1", ""),
        "memory": "peak resident memory (VmHWM) of the first meta-iteration minus resident memory before it",
        "peak_bytes": peaks,
    }
    output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
