"""The stateful parts of a training, saved and restored together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from metakern.learners import MetaLearner
from metakern.tasks import TaskDistribution
from metakern.training.averaging import MovingAverage
from metakern.training.checkpoints import FORMAT, from_bytes, to_bytes
from metakern.training.distributed import Processes
from metakern.training.outer import OuterLoop

#: Optional parts.
_OPTIONAL = ("scheduler", "average", "tasks")


@dataclass(frozen=True)
class Parts:
    """Parts that change during training; ``tasks`` has a state if it has ``state_dict`` and ``load_state_dict``."""

    learner: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None
    average: MovingAverage | None
    outer: OuterLoop
    tasks: Any

    def state_dict(self) -> dict[str, Any]:
        """Each part's state by name, None if it has none; tensors are not copied."""
        return {name: part.state_dict() if hasattr(part, "state_dict") else None for name, part in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore every part from :meth:`state_dict`.

        Raises:
            ValueError: for a state without its part in this training, or the reverse; no part has changed.
        """
        for name in _OPTIONAL:
            saved, here = state[name] is not None, hasattr(getattr(self, name), "state_dict")
            if saved != here:
                words = {True: "with", False: "without"}
                raise ValueError(f"it is {words[saved]} a state of {name}, this training is {words[here]} one")
        for name, part in vars(self).items():
            if state[name] is not None:
                part.load_state_dict(state[name])


def collect_states(learner: Any, processes: Processes) -> None:
    """Give a learner in every process what each process knows alone, for a checkpoint.

    For learners with ``process_state()``, plain data or None, and ``set_process_states(states)``.
    """
    if processes.world == 1 or not hasattr(learner, "process_state"):
        return
    payload = to_bytes({"format": FORMAT, "own": learner.process_state()})
    states = [from_bytes(each, "a process's state")["own"] for each in processes.gather_bytes(payload)]
    if all(state is not None for state in states):
        learner.set_process_states(states)


def weights_of(learner: Any) -> dict[str, Any]:
    """A learner's state without what only training needs; see ``without_process_states``."""
    state: dict[str, Any] = learner.state_dict()
    return learner.without_process_states(state) if hasattr(learner, "without_process_states") else state


def check_parts(learner: Any, tasks: Any, optimizer: Any) -> None:
    """Raise TypeError or ValueError for an invalid learner, tasks or optimizer."""
    if not isinstance(learner, nn.Module) or not isinstance(learner, MetaLearner):
        raise TypeError(
            f"learner must be an nn.Module with meta_losses and evaluate, as metakern.learners.MetaLearner says, got "
            f"{type(learner).__name__}"
        )
    if not isinstance(tasks, TaskDistribution):
        raise TypeError(
            f"tasks must have sample and split, as metakern.tasks.TaskDistribution says, got {type(tasks).__name__}"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    own = {id(p) for p in learner.parameters()}
    strange = sum(id(p) not in own for group in optimizer.param_groups for p in group["params"])
    if strange:
        raise ValueError(f"optimizer must hold parameters of learner only, got {strange} others")
