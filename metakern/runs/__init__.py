"""What a person keeps of a training run: the folder with its configuration, logs, figures and weights."""

from metakern._requirements import required

with required():
    from metakern.runs.folder import load_weights, open_folder, read_config, save_weights, write_config, write_json
    from metakern.runs.metrics import LearningCurves, MetricsLog, TensorBoardLog, read_metrics
    from metakern.runs.progress import ProgressReport

__all__ = [
    "LearningCurves",
    "MetricsLog",
    "ProgressReport",
    "TensorBoardLog",
    "load_weights",
    "open_folder",
    "read_config",
    "read_metrics",
    "save_weights",
    "write_config",
    "write_json",
]
