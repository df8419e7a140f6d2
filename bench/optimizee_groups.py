"""Speed-up by grouping: meta-iterations over problems one by one, grouped by shape, and grouped with one launch.

python -m bench.optimizee_groups            the documentation's measurement (minutes)
python -m bench.optimizee_groups --quick    smoke test: small mixtures, nothing written (seconds)

One CoordinatewiseLSTM solves the same problems of several kinds in three ways, each with the backward of the unroll.
Their meta-gradients are compared before timing. This measures speed alone; the effect of the problems on accuracy is
measured elsewhere. Results go to bench/results/<device>-optimizee-groups.json.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils import _pytree as pytree

from bench import machine
from bench.runs import RESULTS, Advance, Job, describe_run, run_jobs, write
from bench.timing import alternate
from metakern.learners import RuleLearner
from metakern.rules import CoordinatewiseLSTM
from metakern.tasks import (
    ClassicFunction,
    DigitsCNN,
    DigitsMLP,
    DigitsRegression,
    DigitsRNN,
    MixedOptimizees,
    Quadratics,
)
from metakern.tasks.classic_functions import FUNCTIONS

#: Minibatch size of the networks.
BATCH_SIZE = 64

FUNCTION_KINDS = ("quadratics", *FUNCTIONS)
NETWORK_KINDS = ("regression", "mlp", "cnn", "rnn")
MIXTURES = {
    "test functions": FUNCTION_KINDS,
    "digit networks": NETWORK_KINDS,
    "both": (*FUNCTION_KINDS, *NETWORK_KINDS),
}

#: Largest relative difference between the meta-gradients of two ways: float32 rounding that grows along the unroll.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Plan:
    """Cells of a run."""

    mixtures: tuple[str, ...]
    tasks: tuple[int, ...]
    steps: int  # of the one unroll of a meta-iteration
    seconds: float  # per cell
    min_rounds: int


FULL = Plan(tuple(MIXTURES), (16, 64), 20, 20.0, 5)
QUICK = Plan(("both",), (6,), 3, 0.1, 2)


def kind(name: str) -> Any:
    """A distribution of problems, by name."""
    networks = {"regression": DigitsRegression, "mlp": DigitsMLP, "cnn": DigitsCNN, "rnn": DigitsRNN}
    if name in networks:
        return networks[name](batch_size=BATCH_SIZE)
    return Quadratics(10) if name == "quadratics" else ClassicFunction(name)


def mixture(name: str) -> MixedOptimizees:
    """A mixture of kinds in equal shares."""
    return MixedOptimizees([kind(each) for each in MIXTURES[name]])


def meta_iteration(learner: RuleLearner, batches: Sequence[Any]) -> None:
    """Compute the gradient of the mean loss over all problems, batch by batch, into the weights' ``grad``."""
    learner.zero_grad()
    total = sum(batch.num_tasks for batch in batches)
    for batch in batches:
        for losses in learner.meta_losses(batch):
            (losses.sum() / total).backward()


def meta_gradient(learner: RuleLearner, batches: Sequence[Any]) -> Tensor:
    """The meta-gradient as a vector."""
    meta_iteration(learner, batches)
    return torch.cat([weight.grad.flatten() for weight in learner.parameters() if weight.grad is not None])


def ways(problems: MixedOptimizees, tasks: int) -> dict[str, list[Any]]:
    """Batches of each way, with the same kinds of problems; none samples more problems than it solves."""
    whole = problems.sample(tasks, torch.Generator().manual_seed(0))
    alone = [
        problems.distributions[mode].sample(1, torch.Generator().manual_seed(seed))
        for seed, mode in enumerate(whole.modes.tolist())
    ]
    return {"one launch": [whole], "grouped": list(whole.groups), "one by one": alone}


def difference(learner: RuleLearner, problems: MixedOptimizees, tasks: int) -> float:
    """Largest relative difference of the other ways' meta-gradients from one launch's, on the same draws."""

    def sample() -> Any:
        return problems.sample(tasks, torch.Generator().manual_seed(0))

    expected = meta_gradient(learner, [sample()])
    single = [sample().select(slice(task, task + 1)) for task in range(tasks)]
    found = (meta_gradient(learner, batches) for batches in (sample().groups, single))
    return max(float((gradient - expected).norm() / expected.norm()) for gradient in found)


def measure_cell(name: str, tasks: int, plan: Plan, advance: Advance) -> dict[str, Any]:
    """Measure one mixture and number of problems: check agreement, then times and ratios."""
    torch.manual_seed(0)
    # Logarithmic features, as the functions' gradients span ten orders of magnitude.
    learner = RuleLearner(CoordinatewiseLSTM(), steps=plan.steps, unroll=plan.steps)
    problems = mixture(name)
    error = difference(learner, problems, tasks)
    if not error <= TOLERANCE:
        raise RuntimeError(f"the meta-gradients of {name} differ by {error:.1e} relative, allowed are {TOLERANCE}")
    batches = ways(problems, tasks)
    calls: dict[str, list[Callable[[], None]]] = {
        way: [partial(meta_iteration, learner, each)] for way, each in batches.items()
    }
    times = alternate(calls, seconds=plan.seconds, min_rounds=plan.min_rounds, progress=advance)
    (whole,) = batches["one launch"]
    slowest = times["one by one"]["median_s"]
    return {
        "mixture": name,
        "kinds": list(MIXTURES[name]),
        "tasks": tasks,
        "groups": len(whole.groups),
        "coordinates": sum(leaf.numel() for leaf in pytree.tree_leaves(whole.init_params())),
        "max_relative_difference": error,
        "contenders": times,
        "speedup_over_one_by_one": {way: slowest / time["median_s"] for way, time in times.items()},
    }


def measure(plan: Plan, console: Console) -> dict[str, Any]:
    """Measure all cells."""
    jobs: dict[str, Job] = {
        f"{name}, {tasks} problems": partial(measure_cell, name, tasks, plan)
        for name in plan.mixtures
        for tasks in plan.tasks
    }
    return {"steps": plan.steps, "batch_size": BATCH_SIZE, "cells": run_jobs(jobs, console)}


def show(results: dict[str, Any], console: Console) -> None:
    """A table of the seconds of a meta-iteration."""
    table = Table(title=f"a meta-iteration of {results['steps']} steps, and times as fast as one by one")
    for column in ("problems", "tasks", "groups", *results["cells"][0]["contenders"]):
        table.add_column(column, justify="left" if column == "problems" else "right")
    for cell in results["cells"]:
        figures = [
            f"{time['median_s'] * 1e3:.1f} ms ({cell['speedup_over_one_by_one'][way]:.1f}x)"
            for way, time in cell["contenders"].items()
        ]
        table.add_row(cell["mixture"], str(cell["tasks"]), str(cell["groups"]), *figures)
    console.print(table)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Small mixtures, nothing written.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads; tensors this small gain little.")] = 1,
    output: Annotated[
        Path | None, typer.Option(help="JSON to write; default bench/results/<device>-optimizee-groups.json.")
    ] = None,
) -> None:
    """Time meta-iterations over problems one by one, grouped by shape, and grouped with one launch."""
    console = Console()
    torch.set_num_threads(threads)
    results = describe_run("optimizee_groups", "bench.optimizee_groups") | measure(QUICK if quick else FULL, console)
    show(results, console)
    if not quick:
        output = output or RESULTS / f"{machine.device_name()}-optimizee-groups.json"
    write(results, output, console)


if __name__ == "__main__":
    typer.run(main)
