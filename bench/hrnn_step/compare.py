"""hrnn_step against its definition in PyTorch, eager and compiled, in one process; JSON to bench/results.

python -m bench.hrnn_step.compare            the measurement (five minutes)
python -m bench.hrnn_step.compare --quick    smoke test: small sizes, no compiled peer, nothing written
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench import machine
from bench.hrnn_step.contenders import Contender, Problem, contenders
from bench.hrnn_step.targets import judge
from bench.hrnn_step.work import FUNCTIONS, Speeds, bytes_per_coordinate, flops_per_coordinate
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
from bench.timing import Calls, alternate

OPS = ("forward", "forward_backward")

#: Maximum number of input sets that a cell rotates through.
MAX_SETS = 8


@dataclass(frozen=True)
class Cell:
    """Tensors of T tasks, by the coordinates of one task."""

    name: str
    sizes: tuple[int, ...]
    tasks: int = 1
    compiled: bool = True  # compiling takes seconds a tensor

    @property
    def coordinates(self) -> int:
        """N, of all tensors and tasks."""
        return self.tasks * sum(self.sizes)


@dataclass(frozen=True)
class Plan:
    """Cells and budgets of a run."""

    cells: tuple[Cell, ...]
    seconds: float  # per cell and operation
    min_rounds: int
    matrix_size: int


MIXED = (10, 20, 50, 100, 200, 500, 1000) * 2

FULL = Plan(
    (
        Cell("1 x 10,000", (10_000,)),
        Cell("10 x 1,000", (1000,) * 10, compiled=False),
        Cell("1 x 100,000", (100_000,)),
        Cell("4 x 25,000", (25_000,) * 4),
        Cell("4 x 250,000", (250_000,) * 4, compiled=False),
        Cell("14 of 10 to 1,000, 64 tasks", MIXED, tasks=64, compiled=False),
    ),
    seconds=12.0,
    min_rounds=9,
    matrix_size=2048,
)
QUICK = Plan((Cell("2 x 100", (100, 100), tasks=2),), 0.1, 2, 256)


def measure_cell(cell: Cell, op: str, plan: Plan, compiled: bool, speeds: Speeds, advance: Advance) -> dict[str, Any]:
    """Check agreement, then times, ratios and the share of the floor."""
    torch._dynamo.reset()
    n = cell.coordinates
    sets = min(MAX_SETS, math.ceil(2 * machine.last_level_cache_bytes() / (n * bytes_per_coordinate())))
    problems = [Problem.make(cell.sizes, cell.tasks, seed) for seed in range(sets)]

    def calls_of(contender: Contender) -> Calls:
        return [partial(getattr(problem, op), contender) for problem in problems]

    calls = {name: calls_of(each) for name, each in contenders(compiled=compiled and cell.compiled).items()}
    error = largest_error({name: of[0]() for name, of in calls.items()})
    times = alternate(calls, seconds=plan.seconds, min_rounds=plan.min_rounds, progress=advance)
    ours = times["metakern"]["median_s"]
    floor = speeds.floor_ns(backward=op != "forward")
    return {
        "tensors": cell.name,
        "tasks": cell.tasks,
        "n": n,
        "op": op,
        "input_sets": sets,
        "max_relative_difference": error,
        "contenders": {name: {**time, "ns_per_coordinate": time["median_s"] / n * 1e9} for name, time in times.items()},
        "speedup": {name: time["median_s"] / ours for name, time in times.items() if name != "metakern"},
        "floor_ns": floor,
        "share_of_floor": floor / (ours / n * 1e9),
    }


def kept_bytes(n: int = 100_000) -> float:
    """Bytes that the graph of a step keeps per coordinate."""
    problem, kept = Problem.make((n,), 1, 0), dict[int, int]()
    for leaf in problem.leaves():
        leaf.requires_grad_()

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step = contenders(compiled=False)["metakern"](*problem.arguments())
    del step
    return sum(kept.values()) / n


def measure(plan: Plan, compiled: bool, console: Console) -> dict[str, Any]:
    """Measure all cells, with a progress bar."""
    speeds = Speeds.measure(plan.matrix_size)
    jobs: dict[str, Job] = {
        f"{cell.name}, {op}": partial(measure_cell, cell, op, plan, compiled, speeds)
        for cell in plan.cells
        for op in OPS
    }
    results = {
        "flops_per_coordinate": flops_per_coordinate(),
        "functions_per_coordinate": FUNCTIONS,
        "bytes_per_coordinate": bytes_per_coordinate(),
        "kept_bytes": kept_bytes(),
        "speeds": speeds.describe(),
        "floor": "products at the rate of a large float32 matrix product plus functions at that of torch.exp in the "
        "cache, or the traffic at that of a large copy if it takes longer; all measured in this run",
        "cells": run_jobs(jobs, console),
    }
    return results | {"targets": judge(results)}


def show(results: dict[str, Any], console: Console) -> None:
    """Tables of the times and of the targets."""
    table = Table(title="hrnn_step: ns per coordinate, median (20% to 80%)")
    names = ("metakern", "eager", "compiled")
    for column in ("coordinates", "op", *names, *(f"x {name}" for name in names[1:]), "floor", "share"):
        table.add_column(column, justify="left" if column in ("coordinates", "op") else "right")
    for cell in results["cells"]:
        times = []
        for name in names:
            time = cell["contenders"].get(name)
            values = [time[key] / cell["n"] * 1e9 for key in ("q20_s", "median_s", "q80_s")] if time else []
            times.append(f"{values[1]:.0f} ({values[0]:.0f} to {values[2]:.0f})" if values else "")
        ratios = [f"{cell['speedup'][name]:.1f}" if name in cell["speedup"] else "" for name in names[1:]]
        floor = (f"{cell['floor_ns']:.1f}", f"{cell['share_of_floor']:.0%}")
        table.add_row(cell["tensors"], cell["op"], *times, *ratios, *floor)
    console.print(table)
    speeds = results["speeds"]
    console.print(
        f"{results['flops_per_coordinate']} FLOP, {results['functions_per_coordinate']} functions and "
        f"{results['bytes_per_coordinate']} bytes a coordinate; {results['kept_bytes']:.1f} bytes kept for backward\n"
        f"matrix product {speeds['gflops']:.0f} GFLOP/s, exp {speeds['exp_ns']:.2f} ns, copy "
        f"{speeds['gigabytes_per_second']:.0f} GB/s"
    )
    show_targets(results["targets"], console)


def main(
    quick: Quick = False,
    compiled: Annotated[bool, typer.Option(help="Measure torch.compile as well.")] = True,
    threads: Threads = 2,
    seconds: Annotated[float, typer.Option(min=0.01, help="Budget of one cell and operation.")] = FULL.seconds,
    output: Output = None,
) -> None:
    """Measure the kernels against eager and compiled PyTorch."""
    console = start(threads)
    plan = QUICK if quick else replace(FULL, seconds=seconds)
    results = describe_run("hrnn_step", "bench.hrnn_step.compare") | measure(plan, compiled and not quick, console)
    show(results, console)
    write(results, output or default_output("hrnn-step", quick), console)


if __name__ == "__main__":
    typer.run(main)
