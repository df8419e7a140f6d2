"""Steps of a training run shared by all training commands: folder, resume, fit, final weights."""

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

#: Final outer learning rate of the cosine schedule, as a fraction of the initial one.
LAST_RATE = 0.03

#: Settings that may change when a run is resumed: length, intervals, location. Others would make it another run.
MAY_CHANGE = frozenset({
    "iterations", "episodes", "patience", "max_skipped", "eval_every", "checkpoint_every", "keep", "test_tasks", "data",
    "device", "threads", "backend",
})  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A requested run; creating this object writes nothing.

    Attributes:
        learner: the subcommand, such as "maml"
        settings: the whole configuration, a dataclass
        options: output options
        word: name for an iteration
    """

    learner: str
    settings: Any
    options: RunOptions
    word: str = "iteration"

    @cached_property
    def folder(self) -> Path:
        """The run's folder; a new one if none is named, resumed or overwritten."""
        if self.options.output is not None:
            return self.options.output
        newest = newest_folder(self.learner)
        if self.options.resume or _began(newest):
            return newest
        return Path("runs") / self.learner if self.options.overwrite else default_folder(self.learner)

    @property
    def console(self) -> Console:
        """The console to print on."""
        return self.options.console

    @cached_property
    def record(self) -> RunRecord:
        """The record for the trainer."""
        settings = {f.name: getattr(self.settings, f.name) for f in own_first(type(self.settings))}
        return RunRecord(
            self.folder,
            progress=self.console,
            word=self.word,
            command=self.learner,
            settings=settings,
            weights=False,  # each command writes weights in its own format
        )


@contextmanager
def begin(run: Run, trainer: Trainer) -> Iterator[None]:
    """Context that opens and locks the folder, and loads the newest checkpoint if the run is resumed.

    Only the first process reads the folder; it decides for all. A run is resumed on request, or if this launch of
    torchrun began it: torchrun then restarted a process that died.

    Raises:
        ValueError: for a run resumed with other settings than it began with, or with fewer iterations than it has done;
            see also :func:`metakern.runs.open_folder` and :meth:`metakern.training.Trainer.resume`
        FolderInUse: if another process trains in the folder
        OSError: for a folder that cannot be created or written.
    """
    first = trainer.processes.is_first
    try:
        with trainer.processes.telling():
            goes_on = _open(run) if first else False
            if trainer.processes.spread_bytes(bytes([goes_on])) == b"\1":
                trainer.resume(required=False)  # without a checkpoint it starts from the beginning
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
    """Lock and open the folder; returns whether its run is resumed."""
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
    """Raise ValueError if the run in the folder has other settings than this one, except :data:`MAY_CHANGE`."""
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
    """Raise ValueError if the run has done more iterations than requested: config.yaml would be wrong."""
    word, done, wanted = run.settings.count, trainer.iteration, trainer.config.iterations
    if done > wanted:
        raise ValueError(
            f"the run in {run.folder} has done {done} {word}: --{word} must be at least as many, got {wanted}"
        )


def fit(run: Run, trainer: Trainer) -> History:
    """Train to the end.

    Raises:
        typer.Exit: with 130 after Ctrl-C and 143 after SIGTERM, after printing how to resume.
    """
    try:
        return trainer.fit()
    except (Interrupted, KeyboardInterrupt) as stop:
        if is_first_process():
            line = f"to go on: metakern train {run.learner} --resume --output {run.folder}"
            Console(stderr=True, soft_wrap=True).print(line, highlight=False, markup=False)
        raise typer.Exit(int(stop.code or 0) if isinstance(stop, Interrupted) else 128 + signal.SIGINT) from stop


def finish(run: Run, trainer: Trainer, save: Callable[[Path], object]) -> bool:
    """Load the best weights by validation and save them; returns whether this process reports the results.

    Raises:
        RuntimeError: if no evaluation was finite.
    """
    trainer.load_best()
    if is_first_process():
        save(run.folder)
    return is_first_process()


def cosine(optimizer: torch.optim.Optimizer, iterations: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Half-cosine decay of the outer learning rate to the fraction :data:`LAST_RATE`, constant afterwards."""

    def factor(iteration: int) -> float:
        return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * min(1, iteration / iterations))) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
