"""What a user hears of a training while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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
