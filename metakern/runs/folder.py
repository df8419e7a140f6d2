"""The folder of a run: configuration, environment, weights and results, each file whole or not there.

config.yaml        every setting; ``metakern train … --config run/config.yaml --output again`` repeats the run
environment.json   versions, build, command line, threads, date, launch of torchrun
metrics.jsonl      one JSON object a line: iterations and evaluations
events.out.*       the same for TensorBoard
figures/*.png      learning curves, adaptation steps, clusters
checkpoints/       of the trainer
model.safetensors  the weights that the run ended with, the best by validation
results.json       measures on test tasks
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]  # its stubs are another package
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from metakern._backend import build_info
from metakern._digest import check_digest, digest
from metakern._version import __version__

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
FIGURES = "figures"
CHECKPOINTS = "checkpoints"
WEIGHTS = "model.safetensors"
RESULTS = "results.json"

#: What a run writes, as patterns: what ``overwrite`` removes, and nothing else.
_WRITTEN = (
    CONFIG, ENVIRONMENT, METRICS, WEIGHTS, RESULTS, "training.json", "config.json", "curves.png",
    "events.out.tfevents.*", f"{FIGURES}/*.png",
    f"{CHECKPOINTS}/*.pt", f"{CHECKPOINTS}/*.sha256", f"{CHECKPOINTS}/*.aside",
)  # fmt: skip

#: Packages whose versions a run notes, beside torch's in build_info.
_PACKAGES = ("numpy", "scikit-learn", "safetensors", "triton", "tensorboard", "matplotlib")


def open_folder(folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Make the folder of a run and write to it once: better an error now than after the work.

    Raises:
        ValueError: where it holds a run already, unless that is resumed or overwritten; where it holds none to resume.
        OSError: where it cannot be made or written.
    """
    exists = (folder / CONFIG).is_file()
    if exists and not resume and not overwrite:
        raise ValueError(
            f"{folder} holds a run already: --resume continues it, --overwrite replaces it, --output takes another"
        )
    if resume and not exists:
        raise ValueError(f"{folder} holds no run to resume: it has no {CONFIG}")
    make_folder(folder)
    if overwrite and not resume:
        for pattern in _WRITTEN:
            for path in folder.glob(pattern):
                path.unlink()


def make_folder(folder: Path) -> None:
    """Make a folder where there is none, and write to it once.

    Raises:
        OSError: where it cannot be made or written; the message names it and says why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"folder {folder} cannot be written: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to a temporary file beside it, synced and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write figures with the command, date and installation that made them."""
    header: dict[str, object] = {
        "command": " ".join(["metakern", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": build_info() | {"threads": torch.get_num_threads()},
    }
    write_text(path, json.dumps(finite(header | dict(content)), indent=1, allow_nan=False) + "\n")


def finite(content: Any) -> Any:
    """The same with null for infinity and NaN, which JSON does not have."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_environment(folder: Path, launch: str | None = None) -> None:
    """environment.json: what a run's numbers may depend on, beside its configuration.

    Args:
        folder: of the run
        launch: what tells this launch of several processes from others, if there are some
    """
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    machine = {"python": platform.python_version(), "platform": platform.platform(), "packages": versions}
    processes: dict[str, object] = {"processes": int(os.environ.get("WORLD_SIZE", "1")), "launch": launch}
    write_json(folder / ENVIRONMENT, machine | processes)


def write_config(folder: Path, learner: str, settings: Mapping[str, object]) -> None:
    """config.yaml: every setting of ``metakern train LEARNER`` by its name."""
    head = (
        f"# metakern train {learner} --config {folder / CONFIG} --output FOLDER repeats this run in another folder; "
        "options given beside it override.\n"
    )
    content = {"learner": learner, "metakern": __version__, **settings}
    write_text(folder / CONFIG, head + yaml.safe_dump(content, sort_keys=False))


def read_config(path: Path, learner: str) -> dict[str, Any]:
    """The settings that :func:`write_config` wrote.

    Raises:
        ValueError: for a file that is missing, is no YAML mapping, or belongs to another learner.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"configuration {path} cannot be read: {reason}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"configuration {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"configuration {path} must map settings to values, got {type(content).__name__}")
    found = content.pop("learner", learner)
    if found != learner:
        raise ValueError(f"configuration {path} must be of learner {learner!r}, got {found!r}")
    content.pop("metakern", None)
    return content


def save_weights(folder: Path, module: nn.Module) -> None:
    """model.safetensors: parameters and buffers of a learner, and their digest."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    metadata = {"format": "pt", "learner": type(module).__name__, "sha256": digest(tensors)}
    write_bytes(folder / WEIGHTS, save(tensors, metadata=metadata))


def load_weights(folder: Path, module: nn.Module) -> None:
    """Load model.safetensors of a run into the learner that its config.yaml describes.

    Raises:
        ValueError: for a file that is missing, damaged, or of another learner.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder} holds no trained learner: it has no {WEIGHTS}; a run writes it when it ends")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated, damaged or not a safetensors file: {error}") from error
    check_digest(path, metadata, tensors)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not hold the weights that {CONFIG} describes: {reason}") from error
