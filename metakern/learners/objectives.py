"""Meta-objectives of update rules: which losses of an unroll count, and by which function.

Axis legend: T problems.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

_LOG_OFFSET = 1e-3
_RELATIVE_OFFSET = 1e-6


@dataclass(frozen=True)
class Objective:
    """A function of the losses f_t of an unroll, averaged over its steps.

    Attributes:
        value: maps losses [T] and first losses f_0 [T] to the objective [T]
        slope: its derivative by f_t, of the same arguments
        last: whether only the loss before the unroll's last update counts, instead of the mean over its steps
        relative: whether it depends on f_0, the loss at the start of the episode
    """

    value: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor | float]
    last: bool = False
    relative: bool = False


def _relative_log(losses: Tensor, first: Tensor) -> Tensor:
    return (losses / (first + _RELATIVE_OFFSET) + _RELATIVE_OFFSET).log()


def _relative_log_slope(losses: Tensor, first: Tensor) -> Tensor:
    return 1 / (losses + _RELATIVE_OFFSET * (first + _RELATIVE_OFFSET))


def _itself(losses: Tensor, first: Tensor) -> Tensor:
    del first
    return losses


def _one(losses: Tensor, first: Tensor) -> float:
    del losses, first
    return 1.0


#: Objectives by name. "sum": f, as Andrychowicz et al. 2016, arXiv 1606.04474. "log": log(f + 1e-3), which gives small,
#: late losses more weight. "relative-log": log(f/(f_0 + 1e-6) + 1e-6), as Wichrowska et al. 2017, arXiv 1703.04813; it
#: makes problems of different scales comparable. "last": f before the last update, as Lv et al. 2017, arXiv 1703.03633.
OBJECTIVES = {
    "sum": Objective(_itself, _one),
    "log": Objective(lambda losses, _: (losses + _LOG_OFFSET).log(), lambda losses, _: 1 / (losses + _LOG_OFFSET)),
    "relative-log": Objective(_relative_log, _relative_log_slope, relative=True),
    "last": Objective(_itself, _one, last=True),
}

#: Data of the meta-objective: the minibatches that the rule sees, or samples that are held out from it.
LOSS_DATA = ("train", "held-out")


def check_objective(name: str, unroll: int) -> Objective:
    """The objective of a name.

    Raises:
        ValueError: for an unknown name, and for "last" with an unroll too short for it.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {name!r}")
    if OBJECTIVES[name].last and unroll < 2:
        raise ValueError(
            f"objective {name!r} needs an unroll of at least 2, got {unroll}: the loss before the only update does not "
            "depend on the rule"
        )
    return OBJECTIVES[name]
