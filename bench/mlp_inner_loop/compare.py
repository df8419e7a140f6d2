"""Benchmark of MAML's batched inner loop against its peers, in one process.

python -m bench.mlp_inner_loop.compare            the documentation's measurement (tens of minutes)
python -m bench.mlp_inner_loop.compare --quick    smoke test: small cases, no compiled peer, nothing written
python -m bench.mlp_inner_loop.compare --cases TEXT --output FILE    only cases with TEXT in their title, and MAML.adapt

Results go to bench/results/<device>-inner-loop.json. learn2learn, higher and torchopt take part if they can be imported
(``pip install --target FOLDER --no-deps``, FOLDER in PYTHONPATH); the results say which could not, and why. learn2learn
0.2.0 no longer builds as released; its source is measured, built by a current Cython.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch._inductor.utils import fresh_cache

from bench import machine
from bench.mlp_inner_loop.cases import MINI_IMAGENET_CONV4, OMNIGLOT_CONV4, OMNIGLOT_MLP, Case, embedding, sinusoid
from bench.mlp_inner_loop.contenders import check_agreement, iterate, make_contender
from bench.mlp_inner_loop.memory import memory_case
from bench.mlp_inner_loop.targets import judge_inner_loop
from bench.peers import LIBRARIES, find_libraries
from bench.processes import in_subprocess
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
from bench.timing import Calls, alternate, quantiles, wall_seconds

BATCHED = ("metakern", "metakern, autograd", "vmap", "compiled")
LOOPS = ("loop", *LIBRARIES)
EVERYONE = (*BATCHED, *LOOPS)

#: The case with learn2learn's calls, one task at a time.
LEARNERS = ("metakern.MAML", "learn2learn", "loop")

#: Number of meta-batches that a case rotates through.
BATCHES = 3

#: Seconds of a timing sample: consecutive meta-iterations of one contender, as in a training loop.
SAMPLE_SECONDS = 20e-3


@dataclass(frozen=True)
class Plan:
    """Cases of a run, each with its contenders; the first contender is compared with the others."""

    cells: tuple[tuple[Case, Sequence[str]], ...]
    adapt: Case
    seconds: float  # per case
    min_rounds: int
    compiled: bool
    sgemm_size: int
    memory_names: tuple[str, ...]  # the first is compared with the others
    memory_tasks: tuple[int, ...]
    memory_steps: int
    memory_repeats: int


FULL = Plan(
    cells=(
        (sinusoid(steps=1), EVERYONE),
        (sinusoid(), EVERYONE),
        (sinusoid(steps=1, first_order=True), EVERYONE),
        (sinusoid(first_order=True), EVERYONE),
        (sinusoid(1), BATCHED),
        (sinusoid(4), BATCHED),
        (sinusoid(1024), BATCHED),
        (embedding(), EVERYONE),
        (OMNIGLOT_MLP, EVERYONE),
        (OMNIGLOT_CONV4, ("metakern", *LOOPS)),
        (MINI_IMAGENET_CONV4, ("metakern", *LOOPS)),
    ),
    adapt=sinusoid(1, 1),
    seconds=10.0,
    min_rounds=7,
    compiled=True,
    sgemm_size=2048,
    memory_names=("metakern", "metakern, checkpoints", "learn2learn", "loop"),
    memory_tasks=(1, 32),
    memory_steps=100,
    memory_repeats=3,
)
QUICK = Plan(
    cells=(
        (sinusoid(3, 2), EVERYONE),
        (sinusoid(3, 2, first_order=True), EVERYONE),
        (
            replace(OMNIGLOT_CONV4, name="conv4 16x16, 4 filters", shape=(1, 16, 16), widths=(4, 5), tasks=2),
            ("metakern", *LOOPS),
        ),
    ),
    adapt=sinusoid(1, 1),
    seconds=0.1,
    min_rounds=2,
    compiled=False,
    sgemm_size=256,
    memory_names=("metakern, checkpoints", "loop"),
    memory_tasks=(2,),
    memory_steps=4,
    memory_repeats=1,
)


def with_cases(plan: Plan, text: str) -> Plan:
    """The plan with only the cases whose titles contain ``text``, without memory; MAML.adapt is always measured.

    Raises:
        typer.BadParameter: if no title contains it
    """
    cells = tuple(cell for cell in plan.cells if text in cell[0].title)
    if not cells:
        titles = "; ".join(case.title for case, _ in plan.cells)
        raise typer.BadParameter(f"--cases must be part of a title, got {text!r}; there are: {titles}")
    return replace(plan, cells=cells, memory_tasks=())


def measure_cell(
    case: Case, names: Sequence[str], plan: Plan, libraries: dict[str, ModuleType], gflops: float, advance: Advance
) -> dict[str, Any]:
    """Measure one case: first results, agreement, times, ratios and the share of the peak matrix-product rate."""
    torch._dynamo.reset()  # every case is compiled separately
    batches = [case.batch(seed) for seed in range(BATCHES)]
    made = {n: make_contender(n, case, libraries) for n in names if plan.compiled or n != "compiled"}
    contenders = {name: contender for name, contender in made.items() if contender is not None}
    # Ignore kernels on disk from an earlier run: a user's first result has none.
    with fresh_cache():
        first = {n: wall_seconds(partial(iterate, c, batches[0])) for n, c in contenders.items() if n in BATCHED}
    error = check_agreement(contenders, batches)
    calls: dict[str, Calls] = {n: [partial(iterate, c, batch) for batch in batches] for n, c in contenders.items()}
    times = alternate(
        calls, seconds=plan.seconds, min_rounds=plan.min_rounds, sample_seconds=SAMPLE_SECONDS, progress=advance
    )
    ours, *peers = times
    rate = case.flops() / times[ours]["median_s"] / 1e9
    return {
        **case.describe(),
        "max_relative_difference_float64": error,
        "first_result_s": first,
        "contenders": times,
        "absent": [name for name in names if name not in times],
        "speedup": {name: times[name]["median_s"] / times[ours]["median_s"] for name in peers},
        "flops": case.flops(),
        "gflops_per_second": rate,
        "share_of_sgemm": rate / gflops,
    }


def measure_memory(plan: Plan, libraries: dict[str, ModuleType], tasks: int, advance: Advance) -> dict[str, Any]:
    """Measure memory of a meta-iteration with many inner steps, each contender in a fresh process."""
    names = [name for name in plan.memory_names if name not in LIBRARIES or name in libraries]
    runs: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(names):
        arguments = (name, tasks, plan.memory_steps, plan.memory_repeats)
        runs[name] = in_subprocess("bench.mlp_inner_loop.memory", *arguments)
        advance((index + 1) / len(names))
    for name, run in runs.items():
        for key in ("loss", "gradient_norm"):
            ours = runs[names[0]][key]
            assert math.isclose(run[key], ours, rel_tol=1e-3), f"{key} of {name} differs: {run[key]} and {ours}"
    case = memory_case(tasks, plan.memory_steps)
    return {
        **case.describe(),
        "memory": "peak resident memory (VmHWM) of the first meta-iteration minus resident memory before it",
        "contenders": {
            name: {**quantiles(run["seconds"]), "peak_bytes": run["peak_bytes"], "loss": run["loss"]}
            for name, run in runs.items()
        },
    }


def measure(plan: Plan, console: Console) -> dict[str, Any]:
    """Measure all cases, with a progress bar."""
    libraries, notes = find_libraries()
    gflops = machine.sgemm_gflops(plan.sgemm_size)
    adapt = {"MAML.adapt": partial(measure_cell, plan.adapt, LEARNERS, plan, libraries, gflops)}
    memories: dict[str, Job] = {
        f"memory, T = {tasks}": partial(measure_memory, plan, libraries, tasks) for tasks in plan.memory_tasks
    }
    cells = {case.title: partial(measure_cell, case, names, plan, libraries, gflops) for case, names in plan.cells}
    first, *others = run_jobs(adapt | memories | cells, console)
    results = {"adapt": first, "memory": others[: len(memories)], "cells": others[len(memories) :]}
    return {
        "libraries": notes,
        "sgemm_gflops": gflops,
        "sample_s": SAMPLE_SECONDS,
        "flops": f"of the products; share_of_sgemm is of a float32 product of {plan.sgemm_size}³, measured in this run",
        **results,
        "targets": judge_inner_loop(results),
    }


def show(results: dict[str, Any], console: Console) -> None:
    """Tables of the times and of the targets."""
    table = Table(title="one meta-iteration, ms, median (20% to 80%)")
    for column in ("case", "contender", "time", "x metakern", "first result"):
        table.add_column(column, justify="left" if column in ("case", "contender") else "right")
    for cell in (*results["cells"], results["adapt"]):
        for index, (name, time) in enumerate(cell["contenders"].items()):
            low, middle, high = (time[key] * 1e3 for key in ("q20_s", "median_s", "q80_s"))
            first = f"{cell['first_result_s'][name]:.2f} s" if name in cell["first_result_s"] else ""
            ratio = f"{cell['speedup'][name]:.1f}" if index else f"{cell['share_of_sgemm']:.1%} of sgemm"
            table.add_row("" if index else cell["title"], name, f"{middle:.2f} ({low:.2f} to {high:.2f})", ratio, first)
    console.print(table)
    for memory in results["memory"]:
        peaks = [f"{name} {run['peak_bytes'] / 2**20:.0f} MiB" for name, run in memory["contenders"].items()]
        console.print(f"peak memory, {memory['title']}: {', '.join(peaks)}")
    for name, note in results["libraries"].items():
        console.print(f"{name}: {note}")
    show_targets(results["targets"], console)


def main(
    quick: Quick = False,
    threads: Threads = 2,
    seconds: Annotated[float, typer.Option(min=0.01, help="Budget of one case.")] = FULL.seconds,
    cases: Annotated[str | None, typer.Option(help="Only cases with this in their title, and MAML.adapt.")] = None,
    output: Output = None,
) -> None:
    """Measure metakern's inner loop against loops over tasks, torch.func and torch.compile."""
    plan = QUICK if quick else replace(FULL, seconds=seconds)
    if cases is not None:
        plan = with_cases(plan, cases)
        if output is None and not quick:
            raise typer.BadParameter("--cases needs --output: the results of all cases stay where they are")
    console = start(threads)
    results = describe_run("mlp_inner_loop", "bench.mlp_inner_loop.compare") | measure(plan, console)
    show(results, console)
    write(results, output or default_output("inner-loop", quick), console)


if __name__ == "__main__":
    typer.run(main)
