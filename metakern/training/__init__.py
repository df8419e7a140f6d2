"""The outer loop that a person runs: training, checkpoints, many processes."""

from metakern.core.requirements import required

with required():
    from metakern.training.callbacks import Callback
    from metakern.training.checkpoints import CheckpointError, Checkpoints, load_checkpoint
    from metakern.training.config import HIGHER_IS_BETTER, PRECISIONS, TrainerConfig
    from metakern.training.distributed import Processes, ProcessLost
    from metakern.training.history import History, Record
    from metakern.training.lock import FolderInUse, FolderLock
    from metakern.training.record import RunRecord
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
    "History",
    "Interrupted",
    "ProcessLost",
    "Processes",
    "Record",
    "RunRecord",
    "Trainer",
    "TrainerConfig",
    "load_checkpoint",
]
