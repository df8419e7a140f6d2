"""Shared by all comparisons: a progress bar, the table of targets, the results file."""

from __future__ import annotations

import json
import multiprocessing
import shlex
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import machine
from bench.targets import measured
from metakern import build_info

RESULTS = Path(__file__).parent / "results"

#: Progress callback with the finished share of a job.
Advance = Callable[[float], None]
Job = Callable[[Advance], Any]

#: Options that the comparisons of kernels share.
Quick = Annotated[bool, typer.Option("--quick", help="Small sizes, no compiled peer, nothing written.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of every contender.")]
Output = Annotated[Path | None, typer.Option(help="JSON to write; default: a file of the device's in bench/results.")]


def start(threads: int) -> Console:
    """Set threads and seed of a comparison of kernels; it ends here where there are none."""
    console = Console()
    if not build_info()["compiled"]:
        console.print(f"there is nothing to measure: {build_info()['reason']}")
        raise typer.Exit(1)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    return console


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


def default_output(name: str, quick: bool) -> Path | None:
    """File of a comparison on this device, by the name of what was compared; a quick run has none."""
    return None if quick else RESULTS / f"{'-'.join(filter(None, (machine.device_name(), name)))}.json"


def write(results: dict[str, Any], output: Path | None, console: Console) -> None:
    """Write the results as JSON, if a file is named."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        console.print(f"written to {output}")
