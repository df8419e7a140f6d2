"""The files of a run's folder, written atomically.

config.yaml        every setting; ``metakern train … --config run/config.yaml --output again`` repeats the run
environment.json   versions, build, command line, threads, date, launch of torchrun
metrics.jsonl      one JSON object a line: iterations and evaluations
events.out.*       the same for TensorBoard
figures/*.png      learning curves, adaptation steps, clusters
checkpoints/       the trainer's checkpoints
model.safetensors  the best weights by validation
results.json       measures on test tasks
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]  # its stubs are another package
from safetensors.torch import save
from torch import Tensor

from metakern.core.backend import build_info
from metakern.core.checksum import digest
from metakern.core.files import write_whole
from metakern.core.version import __version__
from metakern.training.checkpoints import CHECKPOINTS

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
FIGURES = "figures"
WEIGHTS = "model.safetensors"
RESULTS = "results.json"

#: Fixed file and folder names of a training; see :func:`metakern.core.files.check_targets`.
FILES = (CONFIG, ENVIRONMENT, METRICS, WEIGHTS, f"{FIGURES}/learning.png")
FOLDERS = (FIGURES, CHECKPOINTS)

#: Packages whose versions are recorded, besides torch's in build_info.
_PACKAGES = ("numpy", "scikit-learn", "safetensors", "triton", "tensorboard", "matplotlib")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; creates its folder if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write results as JSON with the command, date and installation that produced them.

    Example:
        >>> write_json(Path("results.json"), {"accuracy": 0.9})
    """
    header: dict[str, object] = {
        "command": " ".join(["metakern", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": build_info() | {"threads": torch.get_num_threads()},
    }
    write_text(path, json.dumps(finite(header | dict(content)), indent=1, allow_nan=False) + "\n")


def finite(content: Any) -> Any:
    """Replace infinity and NaN, which JSON lacks, by null."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_environment(folder: Path, *, command: bool = True) -> None:
    """Write environment.json: versions, machine and launch, which may influence a run's numbers.

    Args:
        folder: of the run
        command: whether ``metakern train`` runs; otherwise the Python program's command line is recorded
    """
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    machine = {"python": platform.python_version(), "platform": platform.platform(), "packages": versions}
    processes: dict[str, object] = {"processes": int(os.environ.get("WORLD_SIZE", "1")), "launch": launch()}
    program: dict[str, object] = {} if command else {"command": " ".join(["python", *sys.argv])}
    write_json(folder / ENVIRONMENT, machine | processes | program)


def launch() -> str | None:
    """Identifier of the ``torchrun`` launch, the same after restarts; None without torchrun.

    This is the job's id; if it is unset ("none"), host, PID and start time of the parent process.
    """
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    if job != "none":
        return job
    parent = os.getppid()
    try:  # the start time in clock ticks since boot, as PIDs are reused
        since = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        since = ""
    return f"{platform.node()} {parent} {since}"


def write_config(folder: Path, learner: str, settings: Mapping[str, object], *, command: bool = True) -> None:
    """Write config.yaml: every setting of a run by name.

    Args:
        folder: of the run
        learner: the subcommand of ``metakern train``, or the learner's class
        settings: names and values
        command: whether ``metakern train LEARNER`` accepts them

    Example:
        >>> open_folder(Path("runs/mine"))
        >>> write_config(Path("runs/mine"), "maml", {"steps": 5})
    """
    head = (
        f"# metakern train {learner} --config {folder / CONFIG} --output FOLDER repeats this run in another folder; "
        "options given beside it override.\n"
        if command
        else f"# What a Trainer of {learner} was given in Python.\n"
    )
    content = {"learner": learner, "metakern": __version__, **settings}
    write_text(folder / CONFIG, head + yaml.safe_dump(content, sort_keys=False))


def save_state(folder: Path, learner: str, state: Mapping[str, Any]) -> None:
    """Write model.safetensors: a learner's state tensors and their checksum; extra state is only in checkpoints."""
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in state.items() if isinstance(x, Tensor)}
    metadata = {"format": "pt", "learner": learner, "sha256": digest(tensors)}
    write_bytes(folder / WEIGHTS, save(tensors, metadata=metadata))
