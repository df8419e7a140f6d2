"""Checkpoints on disk: written atomically, plain data only, verified before loading.

A checkpoint is two files: ``00000100.pt``, a torch file loaded with ``weights_only=True``, so that it can run no code,
and ``00000100.sha256`` beside it, which ``sha256sum -c`` reads. Each is written to a temporary file, synced and
renamed. A process killed in between leaves the earlier checkpoints intact.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from metakern.core.files import TEMPORARY, check_target, write_whole
from metakern.core.text import one_line

#: The folder of checkpoints in the folder of a run.
CHECKPOINTS = "checkpoints"

#: Version of the checkpoint format; other versions are refused.
FORMAT = 1

_NAME = re.compile(r"(\d{8,})\.pt")
_ASIDE = ".aside"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or has invalid content.

    Example:
        >>> file = Path("damaged.pt")
        >>> _ = file.write_bytes(b"no checkpoint"), Path("damaged.pt.sha256").write_text("0")
        >>> load_checkpoint(file)
        Traceback (most recent call last):
        metakern.training.checkpoints.CheckpointError: ...
    """


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint's state after verifying its digest; tensors are on the CPU.

    Args:
        path: of the ``.pt`` file; its ``.sha256`` lies beside it

    Raises:
        FileNotFoundError: where there is no such file.
        CheckpointError: for a missing digest, a digest that does not match, or content other than tensors and plain
            data. No code in it is run.

    Example:
        >>> learner = MAMLLearner(mlp(1, 40, 1))
        >>> config = TrainerConfig(iterations=1, eval_tasks=32)
        >>> optimizer = torch.optim.Adam(learner.parameters())
        >>> trainer = Trainer(learner, Sinusoid(), optimizer, config, folder="runs/one", progress=False)
        >>> history = trainer.fit()
        >>> state = load_checkpoint(sorted(Path("runs/one/checkpoints").glob("*.pt"))[-1])
    """
    return from_bytes(read_verified(Path(path)), str(path))


def read_verified(path: Path) -> bytes:
    """The bytes of a checkpoint; errors are those of :func:`load_checkpoint`."""
    payload = path.read_bytes()
    sidecar = _sidecar(path)
    try:
        digest = sidecar.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no digest beside it, {sidecar.name}, so it may be incomplete") from None
    if digest != _digest_line(path.name, payload):
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {sidecar.name}")
    return payload


def from_bytes(payload: bytes, name: str) -> dict[str, Any]:
    """The state in the bytes of a checkpoint; ``name`` is for errors."""
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{name} holds more than tensors and plain data and is refused: it may run code"
        ) from error
    except Exception as error:  # a broken archive may raise any exception
        raise CheckpointError(f"{name} is no torch file: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{name} is a torch file, but no checkpoint of a trainer")
    if state["format"] != FORMAT:
        raise CheckpointError(f"{name} must have format {FORMAT}, got {state['format']!r}")
    return state


def to_bytes(state: dict[str, Any]) -> bytes:
    """Serialize a state to a checkpoint's bytes.

    Raises:
        TypeError: for a state that could not be loaded again; names the part that is not plain data.
    """
    payload = _serialised(state)
    if not _is_plain(payload):
        parts = [name for name, part in state.items() if not _is_plain(_serialised(part))]
        raise TypeError(
            f"a checkpoint must hold tensors, numbers, strings, lists and dicts only, got others in {parts}: what "
            "state_dict() and get_extra_state() give must be made of these"
        )
    return payload


def _serialised(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _is_plain(payload: bytes) -> bool:
    try:
        torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: holds only checkpoints
        keep: number of newest checkpoints to keep

    Example:
        >>> checkpoints = Checkpoints(Path("runs/mine/checkpoints"), keep=3)
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def prepare(self) -> None:
        """Make the folder and test that it is writable before the run starts.

        Raises:
            OSError: says what is wrong with the folder or disk.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if _NAME.fullmatch(path.with_suffix(".pt").name) and path.suffix in (".pt", ".sha256"):
                    check_target(path)
            probe = self.folder / f"probe-{os.getpid()}"
            write_whole(probe, b"metakern")
            probe.unlink()
        except OSError as error:
            raise _explained(error, self.folder, "no checkpoint can be written") from error

    def numbered(self) -> list[Path]:
        """Checkpoint files by iteration, oldest first."""
        found = [path for path in self.folder.glob("*.pt") if _NAME.fullmatch(path.name)]
        return sorted(found, key=_number)

    def save(self, state: dict[str, Any], *, best: int | None = None) -> Path:
        """Write a checkpoint, then remove all but the newest ``keep`` and the best.

        Args:
            state: what to write; ``state["iteration"]`` names it
            best: iteration of the best one

        Raises:
            OSError: for a full disk, a read-only folder and the like; older checkpoints stay intact.
            TypeError: for a state that is not plain data.
        """
        path = self.folder / f"{state['iteration']:08d}.pt"
        payload = to_bytes(state)
        try:
            self._set_aside(state["iteration"])
            # The digest first: a checkpoint without one would look damaged.
            for target, data in ((_sidecar(path), _digest_line(path.name, payload)), (path, payload)):
                write_whole(target, data)
            _sync_folder(self.folder)
            self._prune(best)
        except OSError as error:
            self._discard(path)
            problem = f"checkpoint {path.name} ({len(payload) / 1e6:.3g} MB) was not written"
            raise _explained(error, self.folder, problem) from error
        return path

    def load_newest(self) -> tuple[Path, bytes]:
        """The newest intact checkpoint and its bytes; a warning names damaged ones.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            CheckpointError: if all are damaged.
        """
        problems = []
        for path in reversed(self.numbered()):
            try:
                payload = read_verified(path)
                from_bytes(payload, str(path))
            except (CheckpointError, OSError) as error:
                problems.append(str(error))
                continue
            for problem in problems:
                warnings.warn(f"{problem}; {path.name} is taken in its place", RuntimeWarning, stacklevel=3)
            return path, payload
        if problems:
            raise CheckpointError("no checkpoint is whole: " + "; ".join(problems))
        raise FileNotFoundError(errno.ENOENT, "there is no checkpoint", str(self.folder))

    def _set_aside(self, iteration: int) -> None:
        """Rename checkpoints of this iteration and later ones, damaged or of an abandoned run, to ``.aside``."""
        for path in self.numbered():
            if _number(path) >= iteration:
                for file in (path, _sidecar(path)):
                    if file.exists():
                        file.replace(file.with_name(file.name + _ASIDE))

    def _prune(self, best: int | None) -> None:
        for path in self.numbered()[: -self.keep]:
            if _number(path) != best:
                path.unlink()
                _sidecar(path).unlink(missing_ok=True)
        for path in self.folder.glob(f"*{TEMPORARY}"):  # left by killed processes; removes a link, not its target
            if path.is_symlink() or path.is_file():
                path.unlink()

    def _discard(self, path: Path) -> None:
        """Remove the digest of a checkpoint that was not written, if the folder is writable."""
        sidecar = _sidecar(path)
        if sidecar.is_file() and not path.exists() and os.access(self.folder, os.W_OK):
            sidecar.unlink()


def find_checkpoint(path: str | Path | None, own: Checkpoints | None) -> tuple[Path, bytes]:
    """Find a checkpoint by path and return it with its verified bytes.

    Args:
        path: a file, or a folder of checkpoints or of a run, from which the newest intact one is taken; None: ``own``
        own: checkpoints of the calling run

    Raises:
        FileNotFoundError: if there is no checkpoint
        CheckpointError: for a damaged file, or a folder without an intact one
    """
    if path is None:
        if own is None:
            raise FileNotFoundError("path must name a checkpoint, as the trainer has no folder, got None")
        return own.load_newest()
    path = Path(path)
    if not path.is_dir():
        return path, read_verified(path)
    inner = path / CHECKPOINTS
    return Checkpoints(inner if inner.is_dir() else path, keep=1).load_newest()


def _number(path: Path) -> int:
    return int(path.stem)


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest_line(name: str, payload: bytes) -> bytes:
    return f"{hashlib.sha256(payload).hexdigest()}  {name}\n".encode()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(error: OSError, folder: Path, problem: str) -> OSError:
    if error.errno in _FULL:
        reason = "the disk, or what you may use of it, is full: free some space"
    elif error.errno in _READ_ONLY:
        reason = "the folder is read-only, or not yours to write into"
    else:
        reason = error.strerror or str(error)
        if error.filename is not None and Path(error.filename).parent == folder:
            reason = f"{Path(error.filename).name}: {reason}"
    return OSError(error.errno, f"{problem}, {reason}; older checkpoints are untouched", str(folder))
