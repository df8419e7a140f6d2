"""Meta-training with and without clusters, over seeds: curves on validation tasks, final figures on test tasks.

python -m bench.paper.curves                 every rule, way and seed (minutes); finished runs are not repeated
python -m bench.paper.curves --rule lstm     one rule
python -m bench.paper.curves --way soft --seeds 2   a way of training that is not in the table (bench/NOTES.md)
python -m bench.paper.curves --quick         smoke test: a few iterations, nothing kept

Each run is a file in build/paper/curves, made by one thread. The sequential, batched and compiled ways of computing a
meta-iteration take the same steps as metakern's one rule, so its curve is theirs too; bench.paper.report puts their
seconds to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from bench.paper.learning import REPORTED, RULES, WAYS, Plan, kept
from bench.paper.timing import PARTS
from bench.runs import Job, run_jobs

FULL, QUICK = Plan(), Plan(iterations=2, tasks=4, steps=2, unroll=1, points=1, seeds=1)


def jobs_of(rules: Sequence[str], ways: Sequence[str], plan: Plan, folder: Path | None) -> dict[str, Job]:
    """All runs, one seed after the other."""
    return {
        f"{rule}, seed {seed}, {way}": partial(kept, folder, rule, way, seed, plan)
        for seed in range(plan.seeds)
        for rule in rules
        for way in ways
    }


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A few iterations, nothing kept.")] = False,
    rule: Annotated[list[str] | None, typer.Option(help="Of these rules alone: lstm, hrnn.")] = None,
    way: Annotated[list[str] | None, typer.Option(help=f"Of these ways: {', '.join(WAYS)}.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each.")] = FULL.seeds,
    workers: Annotated[int, typer.Option(min=1, help="Runs side by side, one thread each.")] = 1,
    parts: Annotated[Path, typer.Option(help="Where runs are kept.")] = PARTS / "curves",
) -> None:
    """Meta-train and measure."""
    torch.set_num_threads(1)
    chosen = rule or list(RULES)
    if unknown := set(chosen) - RULES.keys():
        raise typer.BadParameter(f"rule must be one of {', '.join(RULES)}, got {', '.join(sorted(unknown))}")
    ways = way or list(REPORTED)
    if unknown := set(ways) - WAYS.keys():
        raise typer.BadParameter(f"way must be one of {', '.join(WAYS)}, got {', '.join(sorted(unknown))}")
    console = Console()
    plan = QUICK if quick else replace(FULL, seeds=seeds)
    for run in run_jobs(jobs_of(chosen, ways, plan, None if quick else parts), console, workers):
        last = run["curve"][-1]
        console.print(
            f"{run['rule']}, {run['way']}, seed {run['seed']}: validation meta-loss {last['loss']:.3f}, "
            f"{run['seconds']:.0f} s"
        )


if __name__ == "__main__":
    typer.run(main)
