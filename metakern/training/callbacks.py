"""Callbacks of a training: the interface, and the record kept in a run's folder."""

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
    """Base class of callbacks, called in process 0 only; a subclass overrides the methods that it needs.

    An exception in a callback ends the training.

    Example:
        >>> class Printer(Callback):
        ...     def on_evaluation(self, trainer, measures):
        ...         print(measures["loss"])
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
        """When ``fit`` ends, for any reason; ``error`` is None if training completed.

        If there is an error, an exception raised here becomes a warning.
        """


class FolderRecord(Callback):
    """Base class for the files of a run besides checkpoints; :class:`metakern.runs.RunRecord` implements it.

    Attributes:
        folder: of the run
        lock: held while a process trains in the folder

    Example:
        >>> issubclass(RunRecord, FolderRecord)
        True
    """

    folder: Path
    lock: FolderLock

    def prepare(self) -> None:
        """Fail early: raise any error that writing the record would meet."""


def call_ends(trainer: Trainer, callbacks: Sequence[Callback], error: BaseException | None) -> None:
    """Call every ``on_end``; a failing one hides neither the others nor the error that ended the training."""
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
