"""A training run from its folder to its weights, whatever is trained."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

from metakern.cli.common import RunOptions, checked_settings, is_first_process, own_first
from metakern.core.plain_data import read_json
from metakern.runs import RunRecord
from metakern.runs.folder import (
    CONFIG,
    ENVIRONMENT,
    default_folder,
    launch,
    make_folder,
    newest_folder,
    open_folder,
    read_config,
)
from metakern.training import History, Interrupted, Trainer

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

    @cached_property
    def folder(self) -> Path:
        """Where it goes: a run that names no folder and replaces none has one of its own."""
        if self.options.output is not None:
            return self.options.output
        newest = newest_folder(self.learner)
        if self.options.resume or _began(newest):
            return newest
        return Path("runs") / self.learner if self.options.overwrite else default_folder(self.learner)

    @property
    def console(self) -> Console:
        """Where it prints."""
        return self.options.console

    @cached_property
    def record(self) -> RunRecord:
        """What it leaves and shows."""
        settings = {f.name: getattr(self.settings, f.name) for f in own_first(type(self.settings))}
        return RunRecord(
            self.folder,
            progress=self.console,
            word=self.word,
            command=self.learner,
            settings=settings,
            weights=False,  # each command writes them in its own format
        )


@contextmanager
def begin(run: Run, trainer: Trainer) -> Iterator[None]:
    """Open the folder, and take the newest checkpoint where the run goes on; within it the folder is this process's.

    The first process alone looks at the folder and decides for all. A run goes on if that is asked for, or if this
    launch of torchrun began it: a process that died was started anew.

    Raises:
        ValueError: for a run that goes on with other settings than it began with, or to fewer iterations than it has
            done; see also :func:`metakern.runs.open_folder` and :meth:`metakern.training.Trainer.resume`
        FolderInUse: where another process trains in the folder
        OSError: for a folder that cannot be made or written.
    """
    first = trainer.processes.is_first
    try:
        with trainer.processes.telling():
            goes_on = _open(run) if first else False
            if trainer.processes.spread_bytes(bytes([goes_on])) == b"\1":
                trainer.resume(required=False)  # one that ended before its first checkpoint starts again
                _check_length(run, trainer)
        if run.options.output is None:
            run.console.print(f"the run is in {run.folder}/", highlight=False, markup=False, soft_wrap=True)
        if schedule := run.settings.describe_schedule():
            run.console.print(schedule, highlight=False)
        yield
    finally:
        if first:
            run.record.lock.release()


def _open(run: Run) -> bool:
    """Open the folder, locked; whether its run goes on."""
    goes_on = run.options.resume or _began(run.folder)
    if goes_on and not (run.folder / CONFIG).is_file():
        raise ValueError(f"{run.folder} holds no run to resume: it has no {CONFIG}")
    make_folder(run.folder)
    run.record.lock.acquire()
    if goes_on:
        _check_unchanged(run)
    open_folder(run.folder, resume=goes_on, overwrite=run.options.overwrite)
    return goes_on


def _began(folder: Path) -> bool:
    """Whether this launch of torchrun began the run in the folder."""
    if launch() is None or not (folder / CONFIG).is_file():
        return False
    try:
        return bool(read_json(folder / ENVIRONMENT).get("launch") == launch())
    except (OSError, ValueError, AttributeError):
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


def _check_length(run: Run, trainer: Trainer) -> None:
    """Raise ValueError where the run has done more already than it is asked for: config.yaml would not be true."""
    word, done, wanted = run.settings.count, trainer.iteration, trainer.config.iterations
    if done > wanted:
        raise ValueError(
            f"the run in {run.folder} has done {done} {word}: --{word} must be at least as many, got {wanted}"
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
    """The outer rate falls along half a cosine to :data:`LAST_RATE` of itself, and stays there."""

    def factor(iteration: int) -> float:
        return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * min(1, iteration / iterations))) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
