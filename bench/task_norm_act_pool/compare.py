"""task_norm_act_pool and its derivatives against PyTorch's three operators, in one process; JSON to bench/results.

python -m bench.task_norm_act_pool.compare            the measurement (three minutes)
python -m bench.task_norm_act_pool.compare --quick    smoke test: one small block, nothing written
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.peers import largest_error
from bench.runs import (
    Advance,
    Job,
    Output,
    Quick,
    Threads,
    default_output,
    describe_run,
    run_jobs,
    show_targets,
    start,
    write,
)
from bench.task_norm_act_pool.contenders import CONTENDERS, PASSES, Block, Problem, prepared
from bench.task_norm_act_pool.targets import judge
from bench.timing import alternate


@dataclass(frozen=True)
class Plan:
    """Blocks and budgets of a run."""

    blocks: tuple[Block, ...]
    seconds: float  # per block and pass
    min_rounds: int


FULL = Plan(
    (
        *(Block(f"conv4 28, image {n}", 4, 75, 64, n) for n in (28, 14, 7, 3)),
        Block("conv4 28, image 28, 25 samples", 4, 25, 64, 28),
        Block("conv4 28, image 28, 5 samples", 4, 5, 64, 28),
        Block("conv4 84, image 84", 4, 80, 32, 84),
        Block("conv4 84, image 21", 4, 80, 32, 21),
    ),
    seconds=4.0,
    min_rounds=3,
)
QUICK = Plan((Block("small", 2, 2, 3, 6),), 0.05, 2)


def measure_cell(block: Block, which: str, plan: Plan, advance: Advance) -> dict[str, Any]:
    """Check agreement, then times, ratios, and the rate at which x is read, compared with that of a copy of x."""
    problem = Problem.make(block, 0)
    calls = {name: [prepared(problem, run, which)] for name, run in CONTENDERS.items()}
    error = largest_error({name: of[0]() for name, of in calls.items()})
    x = problem.leaves[0].detach()
    copy = torch.empty_like(x)
    timed: dict[str, Any] = {**calls, "copy": [partial(copy.copy_, x)]}
    times = alternate(timed, seconds=plan.seconds, min_rounds=plan.min_rounds, progress=advance)
    ours, copied = times["metakern"]["median_s"], times.pop("copy")
    return {
        "block": block.name,
        "pass": which,
        "sizes": [block.tasks, block.samples, block.channels, block.size],
        "bytes_of_x": block.bytes,
        "max_relative_difference": error,
        "contenders": times,
        "copy_of_x": copied,
        "times_a_copy": ours / copied["median_s"],
        "speedup": {name: time["median_s"] / ours for name, time in times.items() if name != "metakern"},
    }


def measure(plan: Plan, console: Console) -> dict[str, Any]:
    """Measure all cells, with a progress bar."""
    jobs: dict[str, Job] = {
        f"{block.name}, {which}": partial(measure_cell, block, which, plan) for block in plan.blocks for which in PASSES
    }
    results = {
        "work": "float32, batch statistics, ReLU, max-pool 2; gradients by x, gamma and beta, those of these by x, "
        "gamma and y's gradient; a copy of x reads and writes it once",
        "cells": run_jobs(jobs, console),
    }
    return results | {"targets": judge(results)}


def show(results: dict[str, Any], console: Console) -> None:
    """Tables of the times and of the targets."""
    table = Table(title="task_norm_act_pool: ms, median")
    for column in ("block", "pass", *CONTENDERS, "x copy", *(f"x {name}" for name in CONTENDERS if name != "metakern")):
        table.add_column(column, justify="left" if column in ("block", "pass") else "right")
    for cell in results["cells"]:
        times = [f"{cell['contenders'][name]['median_s'] * 1e3:.2f}" for name in CONTENDERS]
        ratios = [f"{ratio:.2f}" for ratio in cell["speedup"].values()]
        table.add_row(cell["block"], cell["pass"], *times, f"{cell['times_a_copy']:.2f}", *ratios)
    console.print(table)
    show_targets(results["targets"], console)


def main(
    quick: Quick = False,
    threads: Threads = 2,
    seconds: Annotated[float, typer.Option(min=0.01, help="Budget of one block and pass.")] = FULL.seconds,
    output: Output = None,
) -> None:
    """Measure the kernels against PyTorch's operators, task by task and with the tasks as channels."""
    console = start(threads)
    plan = QUICK if quick else replace(FULL, seconds=seconds)
    results = describe_run("task_norm_act_pool", "bench.task_norm_act_pool.compare") | measure(plan, console)
    show(results, console)
    write(results, output or default_output("task-norm-act-pool", quick), console)


if __name__ == "__main__":
    typer.run(main)
