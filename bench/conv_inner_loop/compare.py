"""Benchmark of MAML's inner loop for convolutional networks against its peers, in one process.

python -m bench.conv_inner_loop.compare             the documentation's measurement (eight minutes on two cores)
python -m bench.conv_inner_loop.compare --large     also 32 tasks with more steps and shots (half an hour more)
python -m bench.conv_inner_loop.compare --quick     smoke test: a small network, nothing written
python -m bench.conv_inner_loop.compare --case TEXT --output FILE    only cases with TEXT in their title

``--compile`` adds the compiled meta-iteration of all tasks, which takes minutes to compile. learn2learn, higher and
torchopt take part if they can be imported; the results say which could not, and why.

Before it is timed, every contender's losses and meta-gradients are compared: in float64 with metakern's to 1e-9 of each
tensor's largest magnitude on up to two tasks of few query samples (ResNet-12 on small images), and in float32 on the
very batch with the plain loop's in float64, to 1e-2 of the norm or 5 times the least error of all. As rounding one unit
across a ReLU's kink changes correct gradients, and batch norm of a channel that is nearly constant multiplies rounding,
the float32 of correct ones differ by as much in some cases; the results hold every contender's error. Second
derivatives of batch norm are wrong under torch.vmap (torch 2.13; pytorch/functorch #534 is on its batching rule): vmap,
and its compiled form, are measured only where their results are right, and named with their error elsewhere.
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
from torch import Tensor

from bench import machine
from bench.conv_inner_loop.cases import ConvCase, conv4_28, conv4_84, resnet12_84
from bench.conv_inner_loop.targets import judge
from bench.mlp_inner_loop.contenders import (
    AGREEMENT,
    Contender,
    Fused,
    doubled,
    iterate,
    make_contender,
    results,
)
from bench.peers import LIBRARIES, find_libraries, largest_error
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
from bench.timing import alternate

#: metakern.meta_loss and backward, by default and one task after another; the first is compared with the peers.
OURS = ("metakern", "metakern, vectorize=False")
PEERS = ("loop", *LIBRARIES, "vmap", "compiled")

#: Peers that need not be right: both compute the same.
BY_VMAP = ("vmap", "compiled")

#: Largest error of losses and meta-gradients in float32, relative to their norm, and as a multiple of the least one.
NORM_ERROR, TIMES_LEAST = 1e-2, 5.0


@dataclass(frozen=True)
class Plan:
    """Cases and budgets of a run."""

    cases: tuple[ConvCase, ...]
    seconds: float  # per case
    min_rounds: int
    sgemm_size: int
    compiled: bool = False


FULL = Plan(
    cases=(
        *(conv4_28(shots, 4, steps) for shots in (1, 5) for steps in (1, 5)),
        conv4_28(1, 4, 1, first_order=True),
        conv4_28(1, 32, 1),
        *(conv4_84(tasks, steps) for tasks in (2, 4) for steps in (1, 5)),
        conv4_84(2, 1, first_order=True),
        *(resnet12_84(tasks) for tasks in (1, 2)),
        resnet12_84(1, first_order=True),
    ),
    seconds=8.0,
    min_rounds=3,
    sgemm_size=2048,
)
LARGE = (conv4_28(1, 32, 5), conv4_28(5, 32, 1), conv4_28(5, 32, 5))
SMALL = replace(conv4_28(1, 2, 2), name="conv4 16x16, 4 filters, 1-shot", shape=(1, 16, 16), widths=(4, 5), query=5)
QUICK = Plan((SMALL, replace(SMALL, first_order=True)), 0.1, 2, 256)


def make(name: str, case: ConvCase, libraries: dict[str, ModuleType]) -> Contender | None:
    """The contender of that name; None if its library is missing or does not support the case."""
    if name in OURS:
        return Fused(case, vectorize="auto" if name == OURS[0] else False)
    return make_contender(name, case, libraries)


def contenders_of(case: ConvCase, plan: Plan, libraries: dict[str, ModuleType]) -> dict[str, Contender]:
    """All contenders that can run the case, metakern first."""
    names = [name for name in (*OURS, *PEERS) if name != "compiled" or plan.compiled]
    made = {name: make(name, case, libraries) for name in names}
    return {name: contender for name, contender in made.items() if contender is not None}


def errors_of(contenders: dict[str, Contender], batch: Any) -> dict[str, float]:
    """:func:`largest_error` of every contender's losses and meta-gradients in float64, against the first one's.

    Raises:
        AssertionError: for one above :data:`AGREEMENT`, unless it is by vmap
    """
    found: dict[str, list[Tensor]] = {}
    for name, contender in contenders.items():
        contender.model.double()
        found[name] = results(contender, doubled(batch))
    first = next(iter(found))
    return {
        name: largest_error({first: found[first], name: result}, math.inf if name in BY_VMAP else AGREEMENT)
        for name, result in found.items()
        if name != first
    }


def norm_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference of all tensors together, relative to the norm of the expected ones."""
    difference = torch.stack([(a - b).norm() for a, b in zip(found, expected, strict=True)]).norm()
    return float(difference / torch.stack([x.norm() for x in expected]).norm())


def first_results(contenders: dict[str, Contender], batch: Any, truth: list[Tensor]) -> dict[str, float]:
    """Run every contender once, which also warms it up; their errors against the true losses and meta-gradients.

    Raises:
        ArithmeticError: for one above the allowed error
    """
    errors = {}
    for name, contender in contenders.items():
        found = [x.double() for x in results(contender, batch)]
        errors[name] = max(norm_difference(found[:1], truth[:1]), norm_difference(found[1:], truth[1:]))
    allowed = max(NORM_ERROR, TIMES_LEAST * min(errors.values()))
    for name, error in errors.items():
        if not error <= allowed:
            raise ArithmeticError(f"{name} differs by {error:.1e} of the norm, allowed {allowed:.0e}")
    return errors


def true_results(case: ConvCase, batch: Any) -> list[Tensor]:
    """The plain loop's losses and meta-gradients in float64."""
    loop = make_contender("loop", case, {})
    assert loop is not None
    loop.model.double()
    return results(loop, doubled(batch))


def measure_cell(
    case: ConvCase, plan: Plan, libraries: dict[str, ModuleType], gflops: float, advance: Advance
) -> dict[str, Any]:
    """Measure one case: agreement, times, ratios and the share of the peak matrix-product rate."""
    torch._dynamo.reset()  # every case is compiled separately
    small = case.compared()
    errors = errors_of(contenders_of(small, replace(plan, compiled=False), libraries), small.batch(0))
    wrong = BY_VMAP if not errors["vmap"] < AGREEMENT else ()
    contenders = {n: c for n, c in contenders_of(case, plan, libraries).items() if n not in wrong}
    batch = case.batch(1)
    errors_float32 = first_results(contenders, batch, true_results(case, batch))
    calls = {name: [partial(iterate, contender, batch)] for name, contender in contenders.items()}
    times = alternate(calls, seconds=plan.seconds, min_rounds=plan.min_rounds, progress=advance, warm=True)
    seconds = {name: time["median_s"] for name, time in times.items()}
    peers = [name for name in times if name not in OURS]
    rate = case.flops() / seconds[OURS[0]] / 1e9
    return {
        **case.describe(),
        "relative_difference_float64": errors,
        "wrong": [name for name in wrong if name != "compiled" or plan.compiled],
        "norm_error_float32": errors_float32,
        "contenders": times,
        "absent": [name for name in PEERS if name not in times],
        "speedup": {name: seconds[name] / seconds[OURS[0]] for name in times if name != OURS[0]},
        "fastest_peer": min(peers, key=seconds.__getitem__),
        "flops": case.flops(),
        "gflops_per_second": rate,
        "share_of_sgemm": rate / gflops,
    }


def measure(plan: Plan, console: Console) -> dict[str, Any]:
    """Measure all cases, with a progress bar."""
    libraries, notes = find_libraries()
    gflops = machine.sgemm_gflops(plan.sgemm_size)
    jobs = {case.title: partial(measure_cell, case, plan, libraries, gflops) for case in plan.cases}
    cells = run_jobs(jobs, console)
    return {
        "libraries": notes if plan.compiled else notes | {"compiled": "not measured: needs --compile"},
        "sgemm_gflops": gflops,
        "flops": f"of the products; share_of_sgemm is of a float32 product of {plan.sgemm_size}³, measured in this run",
        "cells": cells,
        "targets": judge(cells),
    }


def show(found: dict[str, Any], console: Console) -> None:
    """Tables of the times and of the targets."""
    table = Table(title="one meta-iteration of a convolutional network, ms, median (20% to 80%)")
    for column in ("case", "contender", "time", "x metakern"):
        table.add_column(column, justify="left" if column in ("case", "contender") else "right")
    for cell in found["cells"]:
        for index, (name, time) in enumerate(cell["contenders"].items()):
            low, middle, high = (time[key] * 1e3 for key in ("q20_s", "median_s", "q80_s"))
            ratio = f"{cell['speedup'][name]:.2f}" if index else f"{cell['share_of_sgemm']:.0%} of sgemm"
            table.add_row("" if index else cell["title"], name, f"{middle:.1f} ({low:.1f} to {high:.1f})", ratio)
        for name in cell["wrong"]:
            table.add_row("", name, "not measured", f"wrong by {cell['relative_difference_float64']['vmap']:.0e}")
    console.print(table)
    for name, note in found["libraries"].items():
        console.print(f"{name}: {note}")
    show_targets(found["targets"], console)


def main(
    quick: Quick = False,
    threads: Threads = 2,
    seconds: Annotated[float, typer.Option(min=0.01, help="Budget of a case, beyond three rounds.")] = FULL.seconds,
    case: Annotated[str, typer.Option(help="Only cases with this text in their title; needs --output.")] = "",
    large: Annotated[bool, typer.Option("--large", help="Also the cases that take minutes each.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Also the compiled meta-iteration.")] = False,
    output: Output = None,
) -> None:
    """Measure metakern's inner loop for convolutional networks against the plain loop, vmap and other libraries."""
    if case and output is None:
        raise typer.BadParameter("--case needs --output: a part of the cases is no measurement for the documentation")
    plan = QUICK if quick else replace(FULL, seconds=seconds, cases=FULL.cases + (LARGE if large else ()))
    cases = tuple(each for each in plan.cases if case in each.title)
    if not cases:
        titles = "; ".join(each.title for each in plan.cases)
        raise typer.BadParameter(f"--case must be part of a title, got {case!r}; there are: {titles}")
    console = start(threads)
    run = describe_run("conv_inner_loop", "bench.conv_inner_loop.compare")
    found = run | measure(replace(plan, cases=cases, compiled=compiled), console)
    show(found, console)
    write(found, output or default_output("conv-inner-loop", quick), console)


if __name__ == "__main__":
    typer.run(main)
