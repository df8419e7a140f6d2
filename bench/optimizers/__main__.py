"""Compares the learned optimizer "general" with tuned baselines on tasks that it has never seen.

python -m bench.optimizers                    everything (hours of two cores); finished parts are not repeated
python -m bench.optimizers --only validation  the tasks that choices are made on; prints, writes nothing
python -m bench.optimizers --rule FOLDER      another rule in the place of "general"; prints, writes nothing

Every task runs from five seeds for 100, 500 and 2,000 steps. Baselines: SGD, momentum, RMSprop, Adam, AdamW with cosine
decay, (i) each at the learning rate out of 23 that is best for all validation tasks at that length, (ii) each at the
best of 23 for the task itself. Curves of a task are saved in build/optimizers, so that an interrupted command goes on.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track

from bench.optimizers import summary
from bench.optimizers.curves import HORIZONS, all_baselines, all_of_rule
from bench.optimizers.tasks import TEST, VALIDATION, Task
from bench.runs import RESULTS, describe_run, write
from metakern.core.files import write_whole
from metakern.rules import load

#: Folder of finished parts.
PARTS = Path(__file__).parent.parent.parent / "build" / "optimizers"


def main(
    rule: Annotated[str, typer.Option(help="A saved rule: its name or folder.")] = "general",
    only: Annotated[str | None, typer.Option(help="validation or test: run those alone.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="0: as torch chooses.")] = 0,
) -> None:
    """Run what is missing, and write tables and the figure."""
    if threads:
        torch.set_num_threads(threads)
    sets = {name: tasks for name, tasks in (("validation", VALIDATION), ("test", TEST)) if only in (None, name)}
    console = Console()
    jobs = [(name, task) for name, tasks in sets.items() for task in tasks]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sets}
    for name, task in track(jobs, "training", console=console):
        found[name].append({"task": task.name, "curves": curves_of(task, rule)})
    if "validation" not in found:
        return
    rates = summary.common_rates(found["validation"])
    results = {name: summary.summarise(parts, rates) for name, parts in found.items()}
    for name, part in results.items():
        summary.show(console, name, part)
    if rule == "general" and only is None:
        header = describe_run("learned optimizers on unseen tasks", "bench.optimizers")
        write({**header, "rates": rates, **results}, RESULTS / "optimizers.json", console)
        summary.plot(results["test"], RESULTS / "optimizers.png")


def curves_of(task: Task, name: str) -> dict[str, Any]:
    """The curves of a task, from earlier runs where they are there."""
    plain = load(name)
    weights = torch.cat([p.flatten() for p in plain.parameters()])
    key = hashlib.sha256(weights.detach().numpy().tobytes()).hexdigest()[:12]
    told = {h: load(name, total_steps=h) for h in HORIZONS}
    baselines = _kept(f"{_file(task)}-baselines", lambda: all_baselines(task))
    return baselines | _kept(f"{_file(task)}-{key}", lambda: all_of_rule(task, plain, told))


def _file(task: Task) -> str:
    return "".join(c if c.isalnum() else "-" for c in task.name)


def _kept(name: str, make: Any) -> dict[str, Any]:
    path = PARTS / f"{name}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    made: dict[str, Any] = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(made).encode())
    return made


if __name__ == "__main__":
    typer.run(main)
