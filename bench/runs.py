"""What every comparison does around its measurements: a progress bar, the targets as a table, the results as a file."""

from __future__ import annotations

import json
import multiprocessing
import shlex
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import machine
from bench.targets import measured

RESULTS = Path(__file__).parent / "results"

#: Is told the share of a job that is done.
Advance = Callable[[float], None]
Job = Callable[[Advance], Any]


def run_jobs(jobs: Mapping[str, Job], console: Console, workers: int = 1) -> list[Any]:
    """What the jobs return, in their order, under a progress bar that shows their descriptions.

    More than one worker are processes, which take the jobs up in their order, with as many threads each as this one.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(jobs))
        if workers > 1:
            return _in_processes(jobs, workers, lambda done, name: bar.update(task, completed=done, description=name))
        results = []
        for done, (description, job) in enumerate(jobs.items()):
            bar.update(task, description=description, completed=done)
            results.append(job(lambda share, done=done: bar.update(task, completed=done + share)))  # type: ignore[misc]
    return results


def _in_processes(jobs: Mapping[str, Job], workers: int, advance: Callable[[int, str], None]) -> list[Any]:
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may never return
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=threads) as pool:
        names = {pool.submit(job, _unseen): name for name, job in jobs.items()}
        try:
            for done, future in enumerate(as_completed(names), start=1):
                future.result()
                advance(done, f"{names[future]} done")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in names]


def _unseen(_: float) -> None:
    """The share that is done of one job among several."""


def describe_run(benchmark: str, module: str) -> dict[str, Any]:
    """What heads the results: which benchmark, by which command, on what machine."""
    command = f"python -m {module} {shlex.join(sys.argv[1:])}".strip()
    return {"benchmark": benchmark, "command": command, "machine": machine.describe()}


def show_targets(targets: list[dict[str, Any]], console: Console) -> None:
    """A table of the targets, met and missed."""
    table = Table(title="targets")
    for column in ("kind", "what", "required", "measured", ""):
        table.add_column(column)
    for target in targets:
        verdict = "[green]met[/]" if target["met"] else "[red]missed[/]"
        required = f"{target['relation']} {target['required']:g} {target['unit']}".rstrip()
        table.add_row(target["kind"], target["name"], required, measured(target, 2), verdict)
    console.print(table)


def write(results: dict[str, Any], output: Path | None, console: Console) -> None:
    """The results as JSON, where a file is named."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        console.print(f"written to {output}")
