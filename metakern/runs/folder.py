"""Opening and reading run folders; :mod:`metakern.runs.run_files` lists their files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from metakern.core.checksum import check_digest
from metakern.core.files import check_targets
from metakern.core.plain_data import CONFIG_BYTES, check_flat, parse_yaml, read_text
from metakern.core.text import one_line, quoted
from metakern.runs.run_files import (
    CONFIG,
    ENVIRONMENT,
    FIGURES,
    FILES,
    FOLDERS,
    METRICS,
    RESULTS,
    WEIGHTS,
    launch,
    save_state,
    write_bytes,
    write_config,
    write_environment,
    write_json,
    write_text,
)
from metakern.training.checkpoints import CHECKPOINTS
from metakern.training.lock import is_in_use

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "ENVIRONMENT",
    "FIGURES",
    "METRICS",
    "RESULTS",
    "WEIGHTS",
    "default_folder",
    "holds_run",
    "launch",
    "load_weights",
    "make_folder",
    "newest_folder",
    "open_folder",
    "read_config",
    "save_weights",
    "write_bytes",
    "write_config",
    "write_environment",
    "write_json",
    "write_text",
]

#: Patterns of the files of a run: ``overwrite`` removes these and nothing else.
_WRITTEN = (
    CONFIG, ENVIRONMENT, METRICS, WEIGHTS, RESULTS, "training.json", "config.json", "curves.png",
    "events.out.tfevents.*", f"{FIGURES}/*.png",
    f"{CHECKPOINTS}/*.pt", f"{CHECKPOINTS}/*.sha256", f"{CHECKPOINTS}/*.aside",
)  # fmt: skip

#: Files that commands write besides those of a training.
_COMMANDS_FILES = (
    RESULTS, "training.json", "config.json", "README.md", "curves.png",
    *(f"{FIGURES}/{name}.png" for name in ("adaptation", "clusters", "fits")),
)  # fmt: skip


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a checkpoint or weights, which a new run would destroy.

    A run that failed before its first checkpoint left neither, so its folder can be reused.
    """
    return (folder / WEIGHTS).is_file() or any((folder / CHECKPOINTS).glob("*.pt"))


def open_folder(folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Create the folder of a run and test that it is writable, before any work is done.

    Raises:
        ValueError: if it holds a run that is neither resumed nor overwritten, or no run to resume.
        OSError: if it cannot be created or written, or if a directory or link has the name of a file to write.

    Example:
        >>> open_folder(Path("runs/mine"))
    """
    exists = (folder / CONFIG).is_file()
    if holds_run(folder) and not resume and not overwrite:
        raise ValueError(
            f"{folder} holds a run already: --resume continues it, --overwrite replaces it, --output takes another"
        )
    if resume and not exists:
        raise ValueError(f"{folder} holds no run to resume: it has no {CONFIG}")
    make_folder(folder)
    if not resume:
        for pattern in _WRITTEN:
            for path in folder.glob(pattern):
                path.unlink()


def make_folder(folder: Path) -> None:
    """Create a folder if missing, and test that it is writable.

    Raises:
        OSError: if it cannot be created or written, or if a directory or link has the name of a file that commands
            write; the message names it and says why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"folder {folder} cannot be written: {error.strerror or error}") from error
    check_targets(folder, (*FILES, *_COMMANDS_FILES), FOLDERS)


def default_folder(learner: str) -> Path:
    """Default folder of a new run: the first free one of runs/LEARNER, runs/LEARNER-2 and so on."""
    return next(folder for folder in _numbered(learner) if not holds_run(folder) and not is_in_use(folder))


def newest_folder(learner: str) -> Path:
    """The newest default folder that holds a run; runs/LEARNER if none does."""
    newest = Path("runs") / learner
    for folder in _numbered(learner):
        if not (folder / CONFIG).is_file():
            return newest
        newest = folder
    raise AssertionError("there are always more folders")


def _numbered(learner: str) -> Iterator[Path]:
    first = Path("runs") / learner
    yield first
    number = 2
    while True:
        yield first.with_name(f"{learner}-{number}")
        number += 1


def read_config(path: Path, learner: str | None = None) -> dict[str, Any]:
    """Read the settings of a config.yaml; without ``learner``, the learner's name is among them.

    Raises:
        ValueError: for a file that is missing, belongs to another learner, or is not a short YAML mapping of settings
            to scalars and short lists.

    Example:
        >>> open_folder(Path("runs/mine"))
        >>> write_config(Path("runs/mine"), "maml", {"steps": 5})
        >>> read_config(Path("runs/mine/config.yaml"), "maml")["steps"]
        5
    """
    try:
        text = read_text(path, CONFIG_BYTES)
    except OSError as error:
        raise ValueError(f"configuration {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"configuration {path} cannot be read: {error}") from error
    try:
        content = check_flat(parse_yaml(text))
    except ValueError as error:
        raise ValueError(f"configuration {path}: {error}") from error
    found = content.pop("learner", learner)
    if learner is not None and found != learner:
        raise ValueError(f"configuration {path} must be of learner {learner!r}, got {quoted(found)}")
    content.pop("metakern", None)
    return content if learner is not None else {"learner": found, **content}


def save_weights(folder: Path, module: nn.Module) -> None:
    """Write model.safetensors: parameters and buffers of a learner, and their checksum.

    Example:
        >>> open_folder(Path("runs/weights"))
        >>> save_weights(Path("runs/weights"), net)
    """
    save_state(folder, type(module).__name__, module.state_dict())


def load_weights(folder: Path, module: nn.Module) -> None:
    """Load a run's model.safetensors into the learner that its config.yaml describes.

    Raises:
        ValueError: for a file that is missing, damaged, or of another learner.

    Example:
        >>> open_folder(Path("runs/weights"))
        >>> save_weights(Path("runs/weights"), net)
        >>> load_weights(Path("runs/weights"), net)
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder} holds no trained learner: it has no {WEIGHTS}; a run writes it when it ends")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated, damaged or not a safetensors file: {one_line(error)}") from error
    check_digest(path, metadata, tensors)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights that {CONFIG} describes: {one_line(error)}") from error
