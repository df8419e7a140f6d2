"""Compares the learned optimizer "general" with tuned baselines on tasks that it has never seen.

python -m bench.optimizers                    everything; finished parts are not repeated
python -m bench.optimizers --only validation  the tasks that choices are made on; prints, writes nothing
python -m bench.optimizers --rule FOLDER      another rule in the place of "general"; prints, writes nothing

Every task runs from five seeds for 100, 500 and 2,000 steps. Baselines: SGD, momentum, RMSprop, Adam, AdamW with cosine
decay, (i) each at the learning rate out of 23 that is best for all validation tasks at that length, (ii) each at the
best of 23 for the task itself. Rates are chosen by two of the seeds. Curves of a task are saved in build/optimizers, so
that an interrupted command goes on. Every worker process runs one part at a time on one thread.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from bench.optimizers import summary
from bench.optimizers.curves import HORIZONS, all_of_rule, chosen_curves, tuning_curves
from bench.optimizers.tasks import TEST, VALIDATION, Task
from bench.runs import RESULTS, Advance, Job, describe_run, run_jobs, write
from metakern.core.files import write_whole
from metakern.rules import load

#: Folder of finished parts.
PARTS = Path(__file__).parent.parent.parent / "build" / "optimizers"

#: Settings of glibc's malloc under which freed memory stays with the process: a step frees and takes many megabytes.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_TOP_PAD_": str(2**26)}

TASKS = {task.name: task for task in (*VALIDATION, *TEST)}

#: A part of the work: its kind, the task's name, and what else it depends on.
Part = tuple[str, str, str]


def main(
    rule: Annotated[str, typer.Option(help="A saved rule: its name or folder.")] = "general",
    only: Annotated[str | None, typer.Option(help="validation: run that alone.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes of one thread; 0: as many as processors.")] = 0,
) -> None:
    """Run what is missing, and write tables and the figure."""
    console = Console()
    torch.set_num_threads(1)
    os.environ.update(MALLOC)  # read by a process when it starts
    sets = {"validation": VALIDATION} if only == "validation" else {"validation": VALIDATION, "test": TEST}
    names = [task.name for tasks in sets.values() for task in tasks]

    def run(title: str, parts: Sequence[Part]) -> list[dict[str, Any]]:
        jobs: dict[str, Job] = {f"{title}: {part[1]}": functools.partial(make, part) for part in parts}
        run_jobs(jobs, console, workers or os.cpu_count() or 1)
        return [json.loads(_path(part).read_text()) for part in parts]

    learned = dict(zip(names, run("learned", [("rule", name, rule) for name in names]), strict=True))
    tuning = dict(zip(names, run("baselines", [("tuning", name, "") for name in names]), strict=True))
    rates = summary.common_rates([tuning[task.name] for task in VALIDATION])
    chosen = {name: summary.chosen_rates(tuning[name], rates) for name in names}
    rest = run("chosen rates", [("rest", name, json.dumps(chosen[name])) for name in names])
    found = {
        name: {"task": name, "learned": learned[name], "tuning": tuning[name], "chosen": chosen[name], "rest": curves}
        for name, curves in zip(names, rest, strict=True)
    }
    results = {name: summary.summarise([found[task.name] for task in tasks]) for name, tasks in sets.items()}
    for name, figures in results.items():
        summary.show(console, name, figures)
    if rule == "general" and only is None:
        header = describe_run("learned optimizers on unseen tasks", "bench.optimizers")
        write({**header, "rates": rates, **results}, RESULTS / "optimizers.json", console)
        summary.plot(results["test"], RESULTS / "optimizers.png")


def make(part: Part, _: Advance) -> None:
    """Make a part and save it, unless that was done before."""
    path = _path(part)
    if path.exists():
        return
    kind, name, options = part
    task = TASKS[name]
    made: dict[str, Callable[[], dict[str, Any]]] = {
        "tuning": lambda: tuning_curves(task),
        "rest": lambda: chosen_curves(task, json.loads(options)),
        "rule": lambda: _of_rule(task, options),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(made[kind]()).encode())


def _of_rule(task: Task, name: str) -> dict[str, Any]:
    return all_of_rule(task, load(name), {horizon: load(name, total_steps=horizon) for horizon in HORIZONS})


def _path(part: Part) -> Path:
    """File of a part; its name has a digest of the weights, or of the rates."""
    kind, name, options = part
    if kind == "rule":
        weights = torch.cat([p.detach().flatten() for p in load(options).parameters()])
        key = hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:12]
    else:
        key = hashlib.sha256(options.encode()).hexdigest()[:12]
    return PARTS / f"{''.join(c if c.isalnum() else '-' for c in name)}-{kind}-{key}.json"


if __name__ == "__main__":
    typer.run(main)
