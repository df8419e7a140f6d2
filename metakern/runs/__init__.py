"""Run folders on disk: opening them, recording a training, loading trained learners."""

from metakern.core.requirements import required

with required():
    from metakern.runs.folder import load_weights, open_folder, read_config, save_weights, write_config, write_json
    from metakern.runs.loading import LoadedRun, load
    from metakern.runs.metrics import LearningCurves, MetricsLog, TensorBoardLog, read_metrics
    from metakern.runs.progress import ProgressReport
    from metakern.runs.record import RunRecord

__all__ = [
    "LearningCurves",
    "LoadedRun",
    "MetricsLog",
    "ProgressReport",
    "RunRecord",
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
