"""A training run from its folder to its weights, whatever is trained."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from rich.console import Console

from metakern.cli.common import RunOptions, default_output, is_first_process, is_restart
from metakern.runs import LearningCurves, MetricsLog, ProgressReport, TensorBoardLog
from metakern.runs.folder import CONFIG, open_folder, write_config, write_environment
from metakern.training import Callback, History, Interrupted, Trainer

#: Share of the outer learning rate that is left at the end of the cosine.
LAST_RATE = 0.03


@dataclass(frozen=True)
class Run:
    """A run under way.

    Attributes:
        learner: the command, "maml"
        folder: where it goes
        console: where it prints
        resume: whether it continues what is in the folder
        word: what an iteration is called
    """

    learner: str
    folder: Path
    console: Console
    resume: bool
    word: str = "iteration"

    def callbacks(self) -> list[Callback]:
        """Progress, metrics and figures."""
        logs: list[Callback] = [MetricsLog(self.folder), TensorBoardLog(self.folder), LearningCurves(self.folder)]
        return [ProgressReport(self.console, self.word), *logs]


def begin(learner: str, settings: Mapping[str, object], options: RunOptions, word: str = "iteration") -> Run:
    """Open the folder and write down what is about to run there; the first process alone does.

    Raises:
        ValueError, OSError: see :func:`metakern.runs.open_folder`.
    """
    folder = options.output or default_output(learner)
    if is_first_process():
        begun = is_restart() and (folder / CONFIG).is_file()
        open_folder(folder, resume=options.resume or begun, overwrite=options.overwrite)
        write_config(folder, learner, settings)
        write_environment(folder)
    return Run(learner, folder, options.console, options.resume or is_restart(), word)


def fit(run: Run, trainer: Trainer) -> History:
    """Train, from the newest checkpoint where the run is resumed.

    Raises:
        typer.Exit: with 130 after Ctrl-C and 143 after SIGTERM, after a line that says how to go on.
    """
    if run.resume:
        trainer.resume(required=False)  # one that ended before its first checkpoint starts again
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
