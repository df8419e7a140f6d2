"""Configuration of the trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from metakern.core.renamed import renamed
from metakern.core.text import quoted

#: Measures where higher is better; for all others lower is.
HIGHER_IS_BETTER = ("accuracy",)

#: Accepted values of ``non_finite``.
NON_FINITE = ("skip", "zero")

#: Accepted values of ``mixed_precision``.
PRECISIONS = ("bf16", "fp16")

_COUNTS = (
    "iterations",
    "num_tasks",
    "batch_parts",
    "eval_every",
    "eval_tasks",
    "checkpoint_every",
    "keep",
    "max_skipped",
)


@renamed(clip_norm="max_grad_norm", precision="mixed_precision", accumulate="batch_parts")
@dataclass(frozen=True)
class TrainerConfig:
    """Configuration of a :class:`Trainer`.

    Attributes:
        iterations: meta-batches to train on
        num_tasks: tasks of a meta-batch, over all processes
        seed: decides every draw
        max_grad_norm: largest 2-norm of the meta-gradient; None: no clipping
        max_grad_element: largest element of the meta-gradient in size, limited before its norm; None: no clipping
        non_finite: what becomes of a meta-gradient that is not finite: "skip" skips the outer step, "zero" takes its
            non-finite elements as 0
        batch_parts: parts in which a process computes its share of a meta-batch, to save memory; the meta-gradient is
            still that of the whole meta-batch
        eval_every: iterations between two evaluations on the "valid" split; the last iteration is followed by one
        eval_tasks: tasks of an evaluation, over all processes
        patience: evaluations in a row without a better ``monitor`` before training stops; None trains to the end
        monitor: the measure that selects the best weights: higher is better for "accuracy", lower for any other
        ema: β of the exponential moving average of the parameters; the average is then evaluated and kept as best;
            None: no average
        mixed_precision: one of :data:`PRECISIONS` for autocast, where the device supports it
        checkpoint_every: iterations between two checkpoints; the last iteration is followed by one
        keep: number of newest checkpoints to keep, besides the best
        max_skipped: consecutive outer steps with a non-finite loss or meta-gradient before training stops
        device: where the learner and the tasks are; "cuda" is the process's own GPU under torchrun

    Raises:
        TypeError, ValueError: for a value of another type, or out of range.

    Example:
        >>> config = TrainerConfig(iterations=5000, num_tasks=32, eval_every=250, monitor="accuracy", ema=0.99)
    """

    iterations: int = 1000
    num_tasks: int = 32
    seed: int = 0
    max_grad_norm: float | None = None
    max_grad_element: float | None = None
    non_finite: str = "skip"
    batch_parts: int = 1
    eval_every: int = 100
    eval_tasks: int = 256
    patience: int | None = None
    monitor: str = "loss"
    ema: float | None = None
    mixed_precision: str | None = None
    checkpoint_every: int = 100
    keep: int = 3
    max_skipped: int = 10
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in (*_COUNTS, *(("patience",) if self.patience is not None else ())):
            _check_integer(name, getattr(self, name))
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        _check_integer("seed", self.seed)
        for name in ("monitor", "device"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a string, got {quoted(getattr(self, name))}")
        for name, limit in (("max_grad_norm", math.inf), ("max_grad_element", math.inf), ("ema", 1.0)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number or None, got {quoted(value)}")
            if value is not None and not 0 < value < limit:
                raise ValueError(f"{name} must be above 0 and below {limit}, got {value}")
        if self.non_finite not in NON_FINITE:
            raise ValueError(f"non_finite must be one of {', '.join(NON_FINITE)}, got {quoted(self.non_finite)}")
        if self.mixed_precision is not None and self.mixed_precision not in PRECISIONS:
            raise ValueError(
                f"mixed_precision must be None or one of {', '.join(PRECISIONS)}, got {quoted(self.mixed_precision)}"
            )


def _check_integer(name: str, value: object) -> None:
    if type(value) is not int:
        raise TypeError(f"{name} must be an integer, got {quoted(value)}")
