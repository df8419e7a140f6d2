"""Meta-training: the outer loop, checkpoints, distributed processes."""

from typing import Any

from metakern.core.provided import provided
from metakern.core.requirements import required
from metakern.core.warn import warn_user

with required():
    from metakern.training.callbacks import Callback, FolderRecord
    from metakern.training.checkpoints import CheckpointError, Checkpoints, load_checkpoint
    from metakern.training.config import HIGHER_IS_BETTER, PRECISIONS, TrainerConfig
    from metakern.training.distributed import Processes, ProcessLost
    from metakern.training.history import History, Record
    from metakern.training.lock import FolderInUse, FolderLock
    from metakern.training.signals import Interrupted
    from metakern.training.trainer import Trainer

__all__ = [
    "HIGHER_IS_BETTER",
    "PRECISIONS",
    "Callback",
    "CheckpointError",
    "Checkpoints",
    "FolderInUse",
    "FolderLock",
    "FolderRecord",
    "History",
    "Interrupted",
    "ProcessLost",
    "Processes",
    "Record",
    "Trainer",
    "TrainerConfig",
    "load_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name == "RunRecord":
        text = "metakern.training.RunRecord is now metakern.runs.RunRecord; the old name goes in the next release"
        warn_user(text, DeprecationWarning)
        return provided("record")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
