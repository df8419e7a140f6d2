"""What a run leaves in its folder and shows on the screen, from the command line and from Python alike."""

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
    """A folder's config.yaml, environment.json, metrics.jsonl, TensorBoard events, figures and weights; progress.

    :class:`metakern.training.Trainer` makes one of the folder that it is given; give it one of your own for other
    contents of config.yaml, another console or another word.

    Args:
        folder: of the run
        progress: whether the screen shows it, or the console that shows it
        word: what an iteration is called
        command: the command of ``metakern train`` that this is; None in Python
        settings: content of config.yaml; default: the trainer's configuration, optimizer, schedule and learner
        weights: whether model.safetensors is written when the training ends
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
        """Raise what would go wrong with the records before any work is done.

        Raises:
            ModuleNotFoundError: for a library that is not installed
            OSError: where a directory or a link has the name of a file to write.
        """
        check_installed("tensorboard", "matplotlib")
        check_targets(self.folder, FILES, FOLDERS)

    def on_start(self, trainer: Trainer) -> None:
        """Write down what is about to run."""
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
        """Close the logs, draw the curves; the best weights, if the training came to its end."""
        try:
            if error is None and self.weights and trainer.best_weights is not None:
                save_state(self.folder, type(trainer.learner).__name__, trainer.best_weights)
        finally:
            call_ends(trainer, self._logs, error)


def progress_reports(progress: bool | Console, word: str = "iteration") -> list[Callback]:
    """The callback that shows progress on the screen or a console, if any."""
    if progress is False:
        return []
    return [ProgressReport(Console() if progress is True else progress, word)]
