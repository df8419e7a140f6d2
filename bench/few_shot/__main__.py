"""Learned update rules in the inner loop of few-shot learning, beside MAML, Meta-SGD and ANIL.

python -m bench.few_shot            everything (half an hour of one thread); finished runs are not repeated
python -m bench.few_shot --quick    smoke test: two iterations, nothing kept

5-way digits, 1-shot and 5-shot, the images of a task in one of four domains. Every method trains the same network from
the same weights on as many tasks; each is trained again for no more processor time than MAML took, with the learning
rate's schedule shortened alike. Runs are files in build/few_shot, so that an interrupted command continues. Learning
rates were chosen on validation tasks by bench.few_shot.tune; a run looks at test tasks once, at its end.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown

from bench.few_shot.cases import MAML, METHODS, UNIFORM, Case, Plan, cases
from bench.few_shot.learning import kept
from bench.few_shot.tables import few_shot_lines
from bench.runs import RESULTS, Job, describe_run, run_jobs, write
from bench.train_sinusoid import summary

#: Folder of finished runs.
PARTS = Path(__file__).parent.parent.parent / "build" / "few_shot"

FULL, QUICK = Plan(), Plan(iterations=2, points=1, valid=4, test=4, seeds=2)

Runs = dict[Case, list[dict[str, Any]]]


def runs_of(plans: Mapping[Case, Plan], folder: Path | None, console: Console, workers: int) -> Runs:
    """The runs of all seeds, one seed after the other."""
    seeds = range(next(iter(plans.values())).seeds)
    keys = [(seed, case) for seed in seeds for case in plans]
    jobs: dict[str, Job] = {
        f"{case.method}, {case.shots}-shot, {case.sampler}, seed {seed}": partial(kept, folder, case, seed, plans[case])
        for seed, case in keys
    }
    done = dict(zip(keys, run_jobs(jobs, console, workers), strict=True))
    return {case: [done[seed, case] for seed in seeds] for case in plans}


def shortened(runs: Runs, plan: Plan) -> dict[Case, Plan]:
    """Plans that take each case no more processor time than MAML with the uniform sampler, by medians over seeds."""
    seconds = {case: statistics.median(run["seconds"] for run in found) for case, found in runs.items()}
    plans = {}
    for case, own in seconds.items():
        share = min(1.0, seconds[Case(MAML, case.shots, UNIFORM)] / own)
        plans[case] = replace(plan, points=1, iterations=max(1, math.floor(share * plan.iterations)))
    return plans


def measure(
    chosen: Sequence[Case], plan: Plan, folder: Path | None, console: Console, workers: int = 1
) -> dict[str, Any]:
    """All runs of these cases, MAML's among them, for equal tasks and for equal time."""
    full = runs_of(dict.fromkeys(chosen, plan), folder, console, workers)
    timed = runs_of(shortened(full, plan), folder, console, workers)
    return {
        "tasks": plan.iterations * plan.num_tasks,
        "num_tasks": plan.num_tasks,
        "iterations": plan.iterations,
        "seeds": plan.seeds,
        "valid_tasks": plan.valid,
        "test_tasks": plan.test,
        "interval": "Student's t over the seeds, 95 %",
        "cases": [gathered(case, full, timed, plan) for case in full],
    }


def gathered(case: Case, full: Runs, timed: Runs, plan: Plan) -> dict[str, Any]:
    """Results of a case over the seeds; differences from MAML with the same sampler are paired by seed."""
    runs, short, maml = full[case], timed[case], full[replace(case, method=MAML)]
    return {
        "method": case.method,
        "title": METHODS[case.method].title,
        "shots": case.shots,
        "steps": case.settings(0, plan).steps,
        "sampler": case.sampler,
        "command": case.command(plan),
        "test": summary([run["test"] for run in runs]),
        "difference": summary([run["test"] - other["test"] for run, other in zip(runs, maml, strict=True)]),
        "seconds": summary([run["seconds"] for run in runs]),
        "equal_time": {
            "tasks": short[0]["iterations"] * plan.num_tasks,
            "test": summary([run["test"] for run in short]),
            "seconds": summary([run["seconds"] for run in short]),
        },
        "curve": [
            {
                "tasks": points[0]["tasks"],
                "seconds": statistics.fmean(point["seconds"] for point in points),
                "valid": summary([point["accuracy"] for point in points]),
            }
            for points in zip(*(run["curve"] for run in runs), strict=True)
        ],
    }


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Two iterations, nothing kept.")] = False,
    seeds: Annotated[int, typer.Option(min=2, help="Seeds of every case.")] = FULL.seeds,
    threads: Annotated[int, typer.Option(min=1, help="Tensors this small gain nothing from more.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Runs side by side, each in a process of its own.")] = 1,
    parts: Annotated[Path, typer.Option(help="Where runs are kept.")] = PARTS,
    output: Annotated[Path | None, typer.Option(help="JSON to write; default bench/results/few-shot.json.")] = None,
) -> None:
    """Train what is missing, and compare."""
    torch.set_num_threads(threads)
    console = Console()
    plan = QUICK if quick else replace(FULL, seeds=seeds)
    found = measure(cases(), plan, None if quick else parts, console, workers)
    results = describe_run("few_shot", "bench.few_shot") | found
    console.print(Markdown("\n".join(few_shot_lines(results))))
    write(results, output or (None if quick else RESULTS / "few-shot.json"), console)


if __name__ == "__main__":
    typer.run(main)
