"""Record of a run: its files and screen output, for the command line and for Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from metakern.core.files import check_targets
from metakern.core.requirements import check_installed
from metakern.runs.metrics import LearningCurves, MetricsLog, TensorBoardLog
from metakern.runs.progress import ProgressReport
from metakern.runs.run_files import FILES, FOLDERS, save_state, write_config, write_environment
from metakern.training.callbacks import Callback, FolderRecord, call_ends
from metakern.training.history import History, Record
from metakern.training.identity import plain_settings
from metakern.training.lock import FolderLock

if TYPE_CHECKING:
    from metakern.training.trainer import Trainer


class RunRecord(FolderRecord):
    """Writes config.yaml, environment.json, metrics.jsonl, TensorBoard events, figures and weights; shows progress.

    :class:`metakern.training.Trainer` creates one for a plain folder; pass a record of your own to change the content
    of config.yaml, the console or the word for an iteration.

    Args:
        folder: of the run
        progress: whether to show progress on the screen, or the console to show it on
        word: name for an iteration
        command: the subcommand of ``metakern train``; None in Python
        settings: content of config.yaml; default: the trainer's configuration, optimizer, schedule and learner
        weights: whether to write model.safetensors when the training ends

    Example:
        >>> learner = MAMLLearner(mlp(1, 40, 1))
        >>> record = RunRecord("runs/quiet", progress=False, settings={"tasks": "sinusoid"})
        >>> config = TrainerConfig(iterations=1, eval_tasks=32)
        >>> optimizer = torch.optim.Adam(learner.parameters())
        >>> history = Trainer(learner, Sinusoid(), optimizer, config, folder=record).fit()
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        progress: bool | Console = True,
        word: str = "iteration",
        command: str | None = None,
        settings: Mapping[str, object] | None = None,
        weights: bool = True,
    ) -> None:
        self.folder, self.command, self.settings, self.weights = Path(folder), command, settings, weights
        self.lock = FolderLock(self.folder)
        self._logs: list[Callback] = [
            *progress_reports(progress, word),
            MetricsLog(self.folder),
            TensorBoardLog(self.folder),
            LearningCurves(self.folder, word),
        ]

    def prepare(self) -> None:
        """Fail early: check libraries and file names before any work is done.

        Raises:
            ModuleNotFoundError: for a library that is not installed
            OSError: if a directory or link has the name of a file to write.
        """
        check_installed("tensorboard", "matplotlib")
        check_targets(self.folder, FILES, FOLDERS)

    def on_start(self, trainer: Trainer) -> None:
        """Write environment.json and config.yaml, and start the logs."""
        write_environment(self.folder, command=self.command is not None)
        if self.command is not None:
            write_config(self.folder, self.command, self.settings or {})
        else:
            settings = self.settings or plain_settings(
                trainer.learner, trainer.optimizer, trainer.scheduler, trainer.config
            )
            write_config(self.folder, type(trainer.learner).__name__, settings, command=False)
        for log in self._logs:
            log.on_start(trainer)

    def on_iteration(self, trainer: Trainer, record: Record) -> None:
        """To all logs."""
        for log in self._logs:
            log.on_iteration(trainer, record)

    def on_evaluation(self, trainer: Trainer, measures: dict[str, float]) -> None:
        """To all logs."""
        for log in self._logs:
            log.on_evaluation(trainer, measures)

    def on_end(self, trainer: Trainer, history: History, error: BaseException | None) -> None:
        """Save the best weights if the training completed; close the logs and draw the curves."""
        try:
            if error is None and self.weights and trainer.best_weights is not None:
                save_state(self.folder, type(trainer.learner).__name__, trainer.best_weights)
        finally:
            call_ends(trainer, self._logs, error)


def progress_reports(progress: bool | Console, word: str = "iteration") -> list[Callback]:
    """The progress callback for the screen or a console, if wanted."""
    if progress is False:
        return []
    return [ProgressReport(Console() if progress is True else progress, word)]
