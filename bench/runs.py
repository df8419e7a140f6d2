"""Shared by all comparisons: a progress bar, the table of targets, the results file."""

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

#: Progress callback with the finished share of a job.
Advance = Callable[[float], None]
Job = Callable[[Advance], Any]


def run_jobs(jobs: Mapping[str, Job], console: Console, workers: int = 1) -> list[Any]:
    """Run jobs under a progress bar with their descriptions; returns their results in order.

    Several workers are processes that take the jobs in order, each with as many threads as this process.
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
    context = multiprocessing.get_context("spawn")  # forking a process with threads may deadlock
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
    """Ignore the progress of a single job among several."""


def describe_run(benchmark: str, module: str) -> dict[str, Any]:
    """Header of the results: benchmark, command, machine."""
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
    """Write the results as JSON, if a file is named."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        console.print(f"written to {output}")
