"""Training history: a record of every iteration, and the evaluations."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

_COLUMNS = ("iteration", "loss", "tasks_per_second", "lr", "grad_norm", "skipped", "seconds")
_WHOLE_NUMBERS = ("iteration", "skipped")


@dataclass
class Record:
    """One iteration.

    Attributes:
        iteration: iterations so far, this one included
        loss: mean meta-loss of its outer steps over tasks and processes
        tasks_per_second: over all processes
        lr: of the optimizer's first group, in this iteration
        grad_norm: 2-norm of the meta-gradient before clipping, mean over its outer steps
        skipped: outer steps skipped so far
        seconds: duration, without evaluation and checkpoint

    Example:
        >>> learner = MAMLLearner(mlp(1, 40, 1))
        >>> config = TrainerConfig(iterations=2, eval_tasks=32)
        >>> history = Trainer(learner, Sinusoid(), torch.optim.Adam(learner.parameters()), config).fit()
        >>> history.records[-1].iteration
        2
    """

    iteration: int
    loss: float
    tasks_per_second: float
    lr: float
    grad_norm: float
    skipped: int
    seconds: float


@dataclass(repr=False)
class History:
    """History of a training.

    Attributes:
        records: one for each iteration
        evaluations: (iterations so far, measures of the "valid" split)
        best: the best value of the monitored measure, None before there is one
        best_iteration: iteration at which ``best`` was reached

    Example:
        >>> learner = MAMLLearner(mlp(1, 40, 1))
        >>> config = TrainerConfig(iterations=2, eval_tasks=32)
        >>> history = Trainer(learner, Sinusoid(), torch.optim.Adam(learner.parameters()), config).fit()
        >>> len(history.records), history.best_iteration
        (2, 2)
    """

    records: list[Record] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    best: float | None = None
    best_iteration: int | None = None

    def __repr__(self) -> str:
        """A one-line summary."""
        parts = [f"{len(self.records)} iterations"]
        if self.records:
            parts.append(f"last loss {self.records[-1].loss:.4g}")
        parts.append(f"{len(self.evaluations)} evaluations")
        if self.best is not None:
            parts.append(f"best {self.best:.4g} after {self.best_iteration}")
        if self.skipped:
            parts.append(f"{self.skipped} outer steps skipped")
        return f"{type(self).__name__}({', '.join(parts)})"

    @property
    def skipped(self) -> int:
        """Outer steps skipped for a non-finite loss or meta-gradient."""
        return self.records[-1].skipped if self.records else 0

    def state_dict(self) -> dict[str, Any]:
        """Plain data, the records as one tensor for each column."""
        columns = {
            name: torch.tensor(
                [getattr(record, name) for record in self.records],
                dtype=torch.int64 if name in _WHOLE_NUMBERS else torch.float64,
            )
            for name in _COLUMNS
        }
        evaluations = [(iteration, dict(values)) for iteration, values in self.evaluations]
        return {
            "columns": columns,
            "evaluations": evaluations,
            "best": self.best,
            "best_iteration": self.best_iteration,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the history from :meth:`state_dict`."""
        rows = zip(*(state["columns"][name].tolist() for name in _COLUMNS), strict=True)
        self.records = [Record(**dict(zip(_COLUMNS, row, strict=True))) for row in rows]
        self.evaluations = [(iteration, dict(values)) for iteration, values in state["evaluations"]]
        self.best, self.best_iteration = state["best"], state["best_iteration"]

    def as_dict(self) -> dict[str, Any]:
        """Everything as numbers, lists and dicts, for JSON."""
        return {**asdict(self), "skipped": self.skipped}
