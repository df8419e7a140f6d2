"""Benchmark of the per-parameter MLP optimizer's step against plain PyTorch, in one process.

python -m bench.mlp_update_step.compare            the measurement (about 10 minutes)
python -m bench.mlp_update_step.compare --quick    smoke test: small cases, no compiled peer, nothing written

Results go to bench/results/<device>-mlp-update-step.json.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench import machine
from bench.mlp_update_step.contenders import Case, compiled, eager, fused, make_call
from bench.mlp_update_step.targets import judge
from bench.mlp_update_step.work import BACKWARD_FORWARDS, bytes_per_coordinate, flops_per_coordinate
from bench.peers import largest_error
from bench.runs import (
    Advance,
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
from bench.timing import Calls, alternate, wall_seconds

#: 1e6 parameters of convolutions and matrices; 6e5 in 600 tensors of 1,000, as many small layers.
MIXED = Case("1e6 parameters of convolutions and matrices", ((256, 256, 3, 3), (128, 128, 3, 3), (512, 512)))
MATRIX = Case("one matrix of 1,000 x 1,000", ((1000, 1000),))
#: torch.compile takes more than ten minutes for a graph of so many tensors.
MANY = Case("600 tensors of 1,000", ((25, 40), (1000,)) * 300, compiled=False)
NETWORKS = ((32, 2), (4, 2))
FULL = (
    *(
        replace(case, width=width, layers=layers, backward=backward)
        for case in (MIXED, MATRIX)
        for width, layers in NETWORKS
        for backward in (False, True)
    ),
    MANY,
)
QUICK = tuple(
    Case("small tensors", ((8, 4, 3, 3), (6, 5), (7,)), width=4, backward=backward) for backward in (False, True)
)

#: Arguments that a case rotates through.
INPUTS = 2


def copy_bandwidth(elements: int) -> float:
    """Bytes a second that a copy of many float32 numbers reads and writes, best of several."""
    source, target = torch.randn(elements), torch.empty(elements)
    target.copy_(source)
    seconds = min(wall_seconds(partial(target.copy_, source)) for _ in range(5))
    return 2 * source.numel() * source.element_size() / seconds


def measure_cell(case: Case, compile_too: bool, rates: tuple[float, float], seconds: float, advance: Advance) -> Any:
    """Measure one case; ``rates`` are GFLOP/s of a matrix product and bytes a second of a copy."""
    torch._dynamo.reset()  # every case is compiled separately
    steps = {"metakern": fused, "eager": eager}
    if compile_too:
        steps["compiled"] = compiled()
    calls: dict[str, Calls] = {n: [make_call(case, step, seed) for seed in range(INPUTS)] for n, step in steps.items()}
    first = {name: wall_seconds(made[0]) for name, made in calls.items()}
    # In float64: in float32, rounding moves some of the many hidden units over their kink, and gradients jump.
    wide = {name: make_call(case, steps[name], 0, torch.float64) for name in ("eager", "metakern")}
    error = largest_error({name: call() for name, call in wide.items()}, 1e-8)
    times = alternate(calls, seconds=seconds, progress=advance)
    ours, flops = times["metakern"]["median_s"], flops_per_coordinate(case.width, case.layers)
    flops *= case.coordinates * (1 + BACKWARD_FORWARDS * case.backward)
    return {
        "title": case.title,
        "coordinates": case.coordinates,
        "width": case.width,
        "layers": case.layers,
        "backward": case.backward,
        "max_relative_difference_float64": error,
        "first_result_s": first,
        "contenders": times,
        "ns_per_coordinate": {name: 1e9 * t["median_s"] / case.coordinates for name, t in times.items()},
        "speedup": {name: t["median_s"] / ours for name, t in times.items() if name != "metakern"},
        "share_of_sgemm": flops / ours / 1e9 / rates[0],
        "share_of_copy": None if case.backward else bytes_per_coordinate() * case.coordinates / ours / rates[1],
    }


def measure(cases: tuple[Case, ...], quick: bool, seconds: float, console: Console) -> dict[str, Any]:
    """Measure all cases, with a progress bar."""
    rates = machine.sgemm_gflops(256 if quick else 2048), copy_bandwidth(10**4 if quick else 5 * 10**7)
    jobs = {case.title: partial(measure_cell, case, case.compiled and not quick, rates, seconds) for case in cases}
    cells = run_jobs(jobs, console)
    return {
        "sgemm_gflops": rates[0],
        "copy_bytes_per_second": rates[1],
        "flops": "of the network's products with all 39 inputs; backward counts three times forward",
        "bytes": f"{bytes_per_coordinate()} a coordinate of a forward step, each number read or written once",
        "cells": cells,
        "targets": judge(cells),
    }


def show(results: dict[str, Any], console: Console) -> None:
    """Tables of the times and of the targets."""
    table = Table(title="one step, ns a coordinate, median (20% to 80%)")
    for column in ("case", "contender", "time", "x metakern", "of sgemm", "of copy"):
        table.add_column(column, justify="left" if column in ("case", "contender") else "right")
    for cell in results["cells"]:
        for index, (name, time) in enumerate(cell["contenders"].items()):
            low, middle, high = (time[key] * 1e9 / cell["coordinates"] for key in ("q20_s", "median_s", "q80_s"))
            shares = [cell[key] if index == 0 else None for key in ("share_of_sgemm", "share_of_copy")]
            table.add_row(
                "" if index else cell["title"],
                name,
                f"{middle:.1f} ({low:.1f} to {high:.1f})",
                f"{cell['speedup'][name]:.1f}" if index else "",
                *("" if share is None else f"{share:.0%}" for share in shares),
            )
    console.print(table)
    show_targets(results["targets"], console)


def main(
    quick: Quick = False,
    threads: Threads = 2,
    seconds: Annotated[float, typer.Option(min=0.01, help="Budget of one case.")] = 20.0,
    output: Output = None,
) -> None:
    """Measure a step of the per-parameter MLP optimizer against eager and compiled PyTorch."""
    console = start(threads)
    found = measure(QUICK if quick else FULL, quick, 0.1 if quick else seconds, console)
    results = describe_run("mlp_update_step", "bench.mlp_update_step.compare") | found
    show(results, console)
    write(results, output or default_output("mlp-update-step", quick), console)


if __name__ == "__main__":
    typer.run(main)
