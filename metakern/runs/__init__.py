"""Runs that are kept: folders as commands open them, and trained learners as they are loaded."""

from metakern.core.requirements import required

with required():
    from metakern.runs.folder import load_weights, open_folder, read_config, save_weights, write_config, write_json
    from metakern.runs.loading import LoadedRun, load
    from metakern.training.metrics import LearningCurves, MetricsLog, TensorBoardLog, read_metrics
    from metakern.training.progress import ProgressReport

__all__ = [
    "LearningCurves",
    "LoadedRun",
    "MetricsLog",
    "ProgressReport",
    "TensorBoardLog",
    "load",
    "load_weights",
    "open_folder",
    "read_config",
    "read_metrics",
    "save_weights",
    "write_config",
    "write_json",
]
