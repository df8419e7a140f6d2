"""A training run from its folder to its weights, whatever is trained."""

from __future__ import annotations

import json
import math
import os
import platform
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

from metakern.cli.common import RunOptions, checked_settings, default_output, is_first_process, own_first
from metakern.runs import LearningCurves, MetricsLog, ProgressReport, TensorBoardLog
from metakern.runs.folder import CONFIG, ENVIRONMENT, open_folder, read_config, write_config, write_environment
from metakern.training import Callback, History, Interrupted, Trainer

#: Share of the outer learning rate that is left at the end of the cosine.
LAST_RATE = 0.03

#: Settings that a run may go on with changed: how long, how often and where. Others would make it another run.
MAY_CHANGE = frozenset({
    "iterations", "episodes", "patience", "max_skipped", "eval_every", "checkpoint_every", "keep", "test_tasks", "data",
    "device", "threads", "backend",
})  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run as it was asked for; nothing is written yet.

    Attributes:
        learner: the command, "maml"
        settings: the whole configuration, a dataclass
        options: where it goes and what it shows
        word: what an iteration is called
    """

    learner: str
    settings: Any
    options: RunOptions
    word: str = "iteration"

    @property
    def folder(self) -> Path:
        """Where it goes."""
        return self.options.output or default_output(self.learner)

    @property
    def console(self) -> Console:
        """Where it prints."""
        return self.options.console

    def callbacks(self) -> list[Callback]:
        """Progress, metrics and figures."""
        folder = self.folder
        logs: list[Callback] = [MetricsLog(folder), TensorBoardLog(folder), LearningCurves(folder, self.word)]
        return [ProgressReport(self.console, self.word), *logs]


def begin(run: Run, trainer: Trainer) -> None:
    """Open the folder, take the newest checkpoint where the run goes on, then write down what is about to run.

    The first process alone looks at the folder and decides for all. A run goes on if that is asked for, or if this
    launch of torchrun began it: a process that died was started anew.

    Raises:
        ValueError: for a run that goes on with other settings than it began with; see also
            :func:`metakern.runs.open_folder` and :meth:`metakern.training.Trainer.resume`
        OSError: for a folder that cannot be made or written.
    """
    goes_on = False
    if trainer.processes.is_first:
        goes_on = run.options.resume or _began(run.folder)
        if goes_on:
            _check_unchanged(run)
        open_folder(run.folder, resume=goes_on, overwrite=run.options.overwrite)
    if trainer.processes.spread_bytes(bytes([goes_on])) == b"\1":
        trainer.resume(required=False)  # one that ended before its first checkpoint starts again
    if trainer.processes.is_first:
        write_environment(run.folder, launch())
        write_config(
            run.folder, run.learner, {f.name: getattr(run.settings, f.name) for f in own_first(type(run.settings))}
        )


def launch() -> str | None:
    """What all processes that one ``torchrun`` starts and starts anew have in common; None without torchrun.

    Its job's id, which is "none" where no one has given it any: then the process that started this one.
    """
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    if job != "none":
        return job
    parent = os.getppid()
    try:  # numbers of processes are used again; clock ticks from the machine's start to theirs are not
        since = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        since = ""
    return f"{platform.node()} {parent} {since}"


def _began(folder: Path) -> bool:
    """Whether this launch of torchrun began the run in the folder."""
    if launch() is None or not (folder / CONFIG).is_file():
        return False
    try:
        return bool(json.loads((folder / ENVIRONMENT).read_text()).get("launch") == launch())
    except (OSError, ValueError):
        return False


def _check_unchanged(run: Run) -> None:
    """Raise ValueError where the run in the folder has other settings than this one, but for :data:`MAY_CHANGE`."""
    path = run.folder / CONFIG
    before = checked_settings(type(run.settings), read_config(path, run.learner), path) if path.is_file() else {}
    changed = [
        f"{name} from {before[name]} to {value}"
        for name, value in asdict(run.settings).items()
        if name in before and before[name] != value and name not in MAY_CHANGE
    ]
    if changed:
        raise ValueError(
            f"the run in {run.folder} goes on as it began, not with {'; '.join(changed)}: --output starts another"
        )


def fit(run: Run, trainer: Trainer) -> History:
    """Train to the end.

    Raises:
        typer.Exit: with 130 after Ctrl-C and 143 after SIGTERM, after a line that says how to go on.
    """
    try:
        return trainer.fit()
    except (Interrupted, KeyboardInterrupt) as stop:
        if is_first_process():
            line = f"to go on: metakern train {run.learner} --resume --output {run.folder}"
            Console(stderr=True, soft_wrap=True).print(line, highlight=False, markup=False)
        raise typer.Exit(int(stop.code or 0) if isinstance(stop, Interrupted) else 128 + signal.SIGINT) from stop


def finish(run: Run, trainer: Trainer, save: Callable[[Path], object]) -> bool:
    """The best weights by validation into the learner and the folder; whether this process is the one that reports.

    Raises:
        RuntimeError: where no evaluation was finite.
    """
    trainer.load_best()
    if is_first_process():
        save(run.folder)
    return is_first_process()


def cosine(optimizer: torch.optim.Optimizer, iterations: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The outer rate falls along half a cosine to :data:`LAST_RATE` of itself."""

    def factor(iteration: int) -> float:
        return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * iteration / iterations)) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
