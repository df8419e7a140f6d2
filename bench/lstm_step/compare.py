"""Benchmark of the fused step against its peers, in one process; results go to bench/results/<device>.json.

python -m bench.lstm_step.compare            the documentation's measurement (minutes)
python -m bench.lstm_step.compare --quick    smoke test: small sizes, no compiled peer, nothing written
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
from torch import nn

from bench import machine
from bench.lstm_step.contenders import Eager, Fused, check_agreement, make_contenders, make_problem, make_rule
from bench.lstm_step.targets import judge
from bench.lstm_step.unroll import KINDS, in_subprocess
from bench.lstm_step.work import BACKWARD_FORWARDS, HIDDEN, LAYERS, bytes_per_coordinate, flops_per_coordinate
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
from bench.timing import Calls, alternate, quantiles
from metakern.ops.lstm_step.reference import PREPROCESS
from metakern.optim import LearnedOptimizer

OPS = {"forward": False, "forward_backward": True}

#: Maximum number of input sets that a cell rotates through.
MAX_SETS = 16


@dataclass(frozen=True)
class Plan:
    """Cells and budgets of a run."""

    sizes: tuple[int, ...]
    seconds: float  # per cell
    min_rounds: int
    compiled: bool
    sgemm_size: int
    unroll_n: int
    unroll_steps: int
    unroll_processes: int  # of each contender
    unroll_repeats: int  # in each process


FULL = Plan((10**3, 10**4, 10**5, 10**6), 10.0, 7, True, 2048, 10**5, 20, 2, 3)
QUICK = Plan((100, 2000), 0.1, 2, False, 256, 2000, 5, 1, 1)


def measure_cell(op: str, n: int, plan: Plan, gflops: float, advance: Advance) -> dict[str, Any]:
    """Measure one operation at one size: check agreement, then times, ratios and shares of the floors."""
    torch._dynamo.reset()  # every size is compiled separately
    rule, backward = make_rule(HIDDEN, LAYERS), OPS[op]
    sets = min(MAX_SETS, math.ceil(2 * machine.last_level_cache_bytes() / (n * bytes_per_coordinate() / 2)))
    problems = {
        contender.name: [make_problem(contender, rule, n, seed, backward=backward) for seed in range(sets)]
        for contender in make_contenders(rule, compiled=plan.compiled)
    }
    error = check_agreement([first for first, *_ in problems.values()], backward=backward)
    calls: dict[str, Calls] = {name: [getattr(p, op) for p in ps] for name, ps in problems.items()}
    times = alternate(calls, seconds=plan.seconds, min_rounds=plan.min_rounds, progress=advance)
    flops = flops_per_coordinate() * (1 + BACKWARD_FORWARDS * backward)
    floor = flops / gflops
    fused = times["metakern"]["median_s"]
    traffic = {
        "bytes_per_coordinate": bytes_per_coordinate(),
        "gigabytes_per_second": bytes_per_coordinate() * n / fused / 1e9,
    }
    return {
        "op": op,
        "n": n,
        "input_sets": sets,
        "max_relative_difference": error,
        "contenders": {name: {**time, "ns_per_coordinate": time["median_s"] / n * 1e9} for name, time in times.items()},
        "speedup": {name: time["median_s"] / fused for name, time in times.items() if name != "metakern"},
        "flops_per_coordinate": flops,
        "fma_floor_ns": floor,
        "share_of_fma_floor": floor / (fused / n * 1e9),
    } | ({} if backward else traffic)


def measure_unroll(plan: Plan, advance: Advance) -> dict[str, Any]:
    """Measure a whole unroll, forward and backward, in alternating fresh processes."""
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for index in range(plan.unroll_processes):
        for kind in KINDS:
            runs[kind].append(in_subprocess(kind, plan.unroll_n, plan.unroll_steps, plan.unroll_repeats))
        advance((index + 1) / plan.unroll_processes)
    for key in ("loss", "gradient_norm"):
        ours, peer = (runs[kind][0][key] for kind in ("metakern", "eager"))
        assert math.isclose(ours, peer, rel_tol=1e-3), f"{key} of the unroll differs: {ours} and {peer}"
    result: dict[str, Any] = {
        kind: {
            **quantiles([second for run in of_kind for second in run["seconds"]]),
            "peak_bytes": max(run["peak_bytes"] for run in of_kind),
            "loss": of_kind[0]["loss"],
        }
        for kind, of_kind in runs.items()
    }
    ours, peer = result["metakern"], result["eager"]
    return {
        "n": plan.unroll_n,
        "steps": plan.unroll_steps,
        "memory": "peak resident memory (VmHWM) of the first unroll minus resident memory before it",
        **result,
        "speedup": peer["median_s"] / ours["median_s"],
        "memory_ratio": ours["peak_bytes"] / peer["peak_bytes"],
    }


def measure_overhead(plan: Plan, advance: Advance) -> dict[str, Any]:
    """Microseconds that a call spends outside the compiled operator, at one tile of coordinates."""
    rule, n = make_rule(HIDDEN, LAYERS), 32
    fused = Fused(rule)
    problem = make_problem(fused, rule, n, seed=0)
    data, options = problem.state.data, (PREPROCESS.index(rule.preprocess), rule.preprocess_scale, rule.output_scale, 0)

    def operator() -> None:
        with torch._C._AutoDispatchBelowAutograd():  # the dispatcher's autograd cost counts as overhead
            torch.ops.metakern.lstm_step.default(problem.params, problem.grads, data, fused.weights, *options)

    def with_graph() -> None:
        fused.step(problem.params, problem.grads, problem.state)

    calls: dict[str, Calls] = {"operator": [operator], "call": [problem.forward], "call_with_graph": [with_graph]}
    times = alternate(calls, seconds=plan.seconds / 2, min_rounds=20, progress=advance)
    microseconds = {f"{name}_us": time["median_s"] * 1e6 for name, time in times.items()}
    return {
        "n": n,
        **microseconds,
        "python_us": microseconds["call_us"] - microseconds["operator_us"],
        "python_with_graph_us": microseconds["call_with_graph_us"] - microseconds["operator_us"],
    }


def measure_optimizer(plan: Plan, advance: Advance) -> dict[str, Any]:
    """Time a step of a whole optimizer on an MLP 64-20-10 of four tensors, with given gradients."""
    rule = make_rule(HIDDEN, LAYERS)
    models = [nn.Sequential(nn.Linear(64, 20), nn.Sigmoid(), nn.Linear(20, 10)) for _ in range(3)]
    for model in models:
        model.load_state_dict(models[0].state_dict())
        for index, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(index))
    learned, adam = LearnedOptimizer(models[0].parameters(), rule), torch.optim.Adam(models[1].parameters())
    eager = Eager(rule)
    params: list[torch.Tensor] = list(models[2].parameters())
    n = sum(p.numel() for p in params)
    zeros = torch.zeros(LAYERS, n, HIDDEN)
    state = eager.pack(zeros, zeros)

    @torch.no_grad()
    def plain_step() -> None:
        nonlocal state
        flat = torch.cat([p.view(-1) for p in params])
        grads = torch.cat([p.grad.view(-1) for p in params if p.grad is not None])
        new, state = eager.step(flat, grads, state)
        pieces = new.split([p.numel() for p in params])
        torch._foreach_copy_(params, [piece.view_as(p) for piece, p in zip(pieces, params, strict=True)])

    learned.step()
    plain_step()
    for ours, peer in zip(models[0].parameters(), params, strict=True):
        torch.testing.assert_close(ours, peer, rtol=1e-5, atol=1e-6)
    calls: dict[str, Calls] = {"metakern": [learned.step], "eager": [plain_step], "adam": [adam.step]}
    times = alternate(calls, seconds=plan.seconds / 2, min_rounds=plan.min_rounds, progress=advance)
    return {"coordinates": n, "tensors": len(params), **{f"{k}_us": v["median_s"] * 1e6 for k, v in times.items()}}


def measure(plan: Plan, console: Console) -> dict[str, Any]:
    """Measure all cells, with a progress bar."""
    gflops = machine.sgemm_gflops(plan.sgemm_size)
    sizes = [(op, n) for n in plan.sizes for op in OPS]
    jobs: dict[str, Job] = {
        "unroll": partial(measure_unroll, plan),
        "overhead of a call": partial(measure_overhead, plan),
        "optimizer step": partial(measure_optimizer, plan),
        **{f"{op}, N = {n:,}": partial(measure_cell, op, n, plan, gflops) for op, n in sizes},
    }
    unroll, overhead, optimizer, *cells = run_jobs(jobs, console)
    results = {"unroll": unroll, "overhead": overhead, "optimizer": optimizer, "cells": cells}
    return {
        "hidden_size": HIDDEN,
        "num_layers": LAYERS,
        "sgemm_gflops": gflops,
        "fma_floor": f"FLOPs over the float32 rate of a {plan.sgemm_size}³ matrix product, measured in this run",
        **results,
        "targets": judge(results),
    }


def show(results: dict[str, Any], console: Console) -> None:
    """Tables of the times and of the targets."""
    table = Table(title=f"lstm_step, H = {HIDDEN}, L = {LAYERS}: ns per coordinate, median (20% to 80%)")
    names = list(results["cells"][0]["contenders"])
    for column in ("op", "N", *names, *(f"x {name}" for name in names[1:]), "FMA floor", "share"):
        table.add_column(column, justify="left" if column == "op" else "right")
    for cell in results["cells"]:
        times = []
        for time in cell["contenders"].values():
            low, middle, high = (time[key] / cell["n"] * 1e9 for key in ("q20_s", "median_s", "q80_s"))
            times.append(f"{middle:.0f} ({low:.0f} to {high:.0f})")
        ratios = [f"{cell['speedup'][name]:.1f}" for name in names[1:]]
        floor = (f"{cell['fma_floor_ns']:.1f}", f"{cell['share_of_fma_floor']:.0%}")
        table.add_row(cell["op"], f"{cell['n']:,}", *times, *ratios, *floor)
    console.print(table)
    unroll, overhead, optimizer = results["unroll"], results["overhead"], results["optimizer"]
    console.print(
        f"{unroll['steps']}-step unroll at N = {unroll['n']:,}: {unroll['metakern']['median_s']:.3f} s and "
        f"{unroll['metakern']['peak_bytes'] / 2**20:.0f} MiB, eager {unroll['eager']['median_s']:.3f} s and "
        f"{unroll['eager']['peak_bytes'] / 2**20:.0f} MiB\n"
        f"a call at N = {overhead['n']}: {overhead['call_us']:.0f} µs, {overhead['call_with_graph_us']:.0f} µs with a "
        f"graph, of these the kernel's operator {overhead['operator_us']:.0f} µs\n"
        f"an optimizer step, {optimizer['coordinates']} coordinates: LearnedOptimizer {optimizer['metakern_us']:.0f} "
        f"µs, eager {optimizer['eager_us']:.0f} µs, Adam {optimizer['adam_us']:.0f} µs\n"
        f"float32 matrix product: {results['sgemm_gflops']:.0f} GFLOP/s"
    )
    show_targets(results["targets"], console)


def main(
    quick: Quick = False,
    threads: Threads = 2,
    seconds: Annotated[float, typer.Option(min=0.01, help="Budget of one size and operation.")] = FULL.seconds,
    output: Output = None,
) -> None:
    """Measure metakern against eager and compiled PyTorch."""
    console = start(threads)
    plan = QUICK if quick else replace(FULL, seconds=seconds)
    results = describe_run("lstm_step", "bench.lstm_step.compare") | measure(plan, console)
    show(results, console)
    write(results, output or default_output("", quick), console)


if __name__ == "__main__":
    typer.run(main)
