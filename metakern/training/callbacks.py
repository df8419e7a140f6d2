"""What a user hears of a training while it runs, and what a folder keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metakern.core.warn import warn_user
from metakern.training.lock import FolderLock

if TYPE_CHECKING:
    from metakern.training.history import History, Record
    from metakern.training.trainer import Trainer


class Callback:
    """Called by a trainer, in process 0 only; a callback overrides the methods that it needs.

    An exception in one ends the training.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first iteration of a call of ``fit``."""

    def on_iteration(self, trainer: Trainer, record: Record) -> None:
        """After each iteration, before its evaluation and its checkpoint."""

    def on_evaluation(self, trainer: Trainer, measures: dict[str, float]) -> None:
        """After each evaluation on the "valid" split."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """After a checkpoint was written to ``path``."""

    def on_end(self, trainer: Trainer, history: History, error: BaseException | None) -> None:
        """When ``fit`` ends, whatever ends it: ``error`` is None at the end of a training.

        Where there is an error, one that is raised here becomes a warning.
        """


class FolderRecord(Callback):
    """What a run leaves in its folder beside checkpoints; :class:`metakern.runs.RunRecord` is the one in use.

    Attributes:
        folder: of the run
        lock: held while a process trains in the folder
    """

    folder: Path
    lock: FolderLock

    def prepare(self) -> None:
        """Raise what would go wrong with the record before any work is done."""


def call_ends(trainer: Trainer, callbacks: Sequence[Callback], error: BaseException | None) -> None:
    """Call every ``on_end``; one that fails hides neither the others nor the error that ended the training."""
    failure: Exception | None = None
    for callback in callbacks:
        try:
            callback.on_end(trainer, trainer.history, error)
        except Exception as problem:
            if error is None and failure is None:
                failure = problem
            else:
                warn_user(f"{type(callback).__name__}.on_end failed: {problem}", RuntimeWarning)
    if failure is not None:
        raise failure
