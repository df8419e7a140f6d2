"""task_conv2d and its companions against PyTorch's convolutions, in one process; JSON to bench/results.

python -m bench.task_conv2d.compare            the measurement (five minutes)
python -m bench.task_conv2d.compare --quick    smoke test: one small layer, nothing written
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench import machine
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
from bench.task_conv2d.contenders import CONTENDERS, MAPS, Layer, Problem
from bench.task_conv2d.targets import judge
from bench.timing import alternate


@dataclass(frozen=True)
class Plan:
    """Layers and budgets of a run."""

    layers: tuple[Layer, ...]
    seconds: float  # per layer and map
    min_rounds: int
    matrix_size: int


FULL = Plan(
    (
        *(Layer(f"conv4 28, image {n}", 4, 5, 64, 64, n) for n in (28, 14, 7, 3)),
        Layer("conv4 28, first", 4, 5, 1, 64, 28),
        Layer("conv4 28, image 14, 32 tasks, 75 samples", 32, 75, 64, 64, 14),
        *(Layer(f"conv4 84, image {n}", 2, 5, 32, 32, n) for n in (84, 42, 21, 10)),
        Layer("conv4 84, first", 2, 5, 3, 32, 84),
        Layer("ResNet-12, 64 to 128", 1, 5, 64, 128, 42),
        Layer("ResNet-12, 256", 1, 5, 256, 256, 21),
        Layer("ResNet-12, 512", 1, 5, 512, 512, 10),
        Layer("ResNet-12, 640", 1, 5, 640, 640, 10),
        Layer("ResNet-12, shortcut 256 to 512", 1, 5, 256, 512, 10, kernel=1),
    ),
    seconds=4.0,
    min_rounds=5,
    matrix_size=2048,
)
QUICK = Plan((Layer("small", 2, 2, 3, 8, 6),), 0.05, 2, 128)


def measure_cell(layer: Layer, which: str, plan: Plan, gflops: float, advance: Advance) -> dict[str, Any]:
    """Check agreement, then times, rates and ratios."""
    problems = [Problem.make(layer, seed) for seed in range(2)]
    calls = {name: [partial(run, problem, which) for problem in problems] for name, run in CONTENDERS.items()}
    error = largest_error({name: of[0]() for name, of in calls.items()})
    times = alternate(calls, seconds=plan.seconds, min_rounds=plan.min_rounds, progress=advance)
    ours = times["metakern"]["median_s"]
    rates = {name: layer.flops / time["median_s"] / 1e9 for name, time in times.items()}
    return {
        "layer": layer.name,
        "map": which,
        "sizes": [layer.tasks, layer.samples, layer.channels, layer.outputs, layer.size, layer.kernel],
        "flops": layer.flops,
        "max_relative_difference": error,
        "contenders": {name: {**time, "gflops": rates[name]} for name, time in times.items()},
        "speedup": {name: time["median_s"] / ours for name, time in times.items() if name != "metakern"},
        "share_of_matrix_product": rates["metakern"] / gflops,
    }


def measure(plan: Plan, console: Console) -> dict[str, Any]:
    """Measure all cells, with a progress bar."""
    gflops = machine.sgemm_gflops(plan.matrix_size)
    jobs: dict[str, Job] = {
        f"{layer.name}, {which}": partial(measure_cell, layer, which, plan, gflops)
        for layer in plan.layers
        for which in MAPS
    }
    results = {
        "matrix_product_gflops": gflops,
        "work": "2 T S O C k² n² FLOPs a map, padding counted; the rate of a large float32 matrix product by as many "
        "threads, measured in this run, is what shares refer to",
        "cells": run_jobs(jobs, console),
    }
    return results | {"targets": judge(results)}


def show(results: dict[str, Any], console: Console) -> None:
    """Tables of the rates and of the targets."""
    table = Table(title="task_conv2d: GFLOP/s, median")
    names = ("metakern", "loop", "grouped")
    for column in ("layer", "map", *names, "share", *(f"x {name}" for name in names[1:])):
        table.add_column(column, justify="left" if column in ("layer", "map") else "right")
    for cell in results["cells"]:
        rates = [f"{cell['contenders'][name]['gflops']:.0f}" for name in names]
        ratios = [f"{cell['speedup'][name]:.2f}" for name in names[1:]]
        table.add_row(cell["layer"], cell["map"], *rates, f"{cell['share_of_matrix_product']:.0%}", *ratios)
    console.print(table)
    console.print(f"matrix product {results['matrix_product_gflops']:.0f} GFLOP/s")
    show_targets(results["targets"], console)


def main(
    quick: Quick = False,
    threads: Threads = 2,
    seconds: Annotated[float, typer.Option(min=0.01, help="Budget of one layer and map.")] = FULL.seconds,
    output: Output = None,
) -> None:
    """Measure the kernels against a loop of PyTorch's convolutions and against a grouped one."""
    console = start(threads)
    plan = QUICK if quick else replace(FULL, seconds=seconds)
    results = describe_run("task_conv2d", "bench.task_conv2d.compare") | measure(plan, console)
    show(results, console)
    write(results, output or default_output("task-conv2d", quick), console)


if __name__ == "__main__":
    typer.run(main)
