"""Folder lock: one training per folder; the operating system releases it when the holder ends or is killed."""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
import warnings
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from metakern.core.files import check_targets, write_whole
from metakern.core.plain_data import read_json
from metakern.core.text import one_line

#: The lock file, and the file that describes its holder.
LOCK, HOLDER = ".lock", ".lock.json"

#: Seconds to wait for a holder that is about to end: torchrun restarts processes right after killing the old ones.
_PATIENCE = 1.0

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderInUse(RuntimeError):
    """Another process, or another trainer in this process, trains in the folder.

    Example:
        >>> with FolderLock(Path("runs/mine")):
        ...     pass  # a second process that trains there raises FolderInUse
    """


class FolderLock:
    """Reentrant lock for writing a run's folder; reading needs no lock.

    It is the operating system's (``flock``): when a process is killed, its lock is free at once.

    Args:
        folder: of the run; created if missing

    Example:
        >>> with FolderLock(Path("runs/mine")):
        ...     pass  # write files
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: FileLock | None = None
        self._times = 0

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            FolderInUse: if another holds it; says who, and since when
            OSError: for a folder that cannot be created or written.
        """
        if not self._times:
            self.folder.mkdir(parents=True, exist_ok=True)
            check_targets(self.folder, (LOCK, HOLDER))
            lock = FileLock(self.folder / LOCK, thread_local=False)
            try:
                lock.acquire(timeout=_PATIENCE, poll_interval=0.05)
            except Timeout:
                raise FolderInUse(
                    f"folder {self.folder} is in use: {_holder(self.folder)} trains in it; wait until that ends, or "
                    "take another folder"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                warnings.warn(
                    f"folder {self.folder} cannot be locked on its file system ({error.strerror}): start no other run "
                    "in it",
                    RuntimeWarning,
                    stacklevel=3,
                )
            try:
                write_whole(self.folder / HOLDER, json.dumps(_myself()).encode())
            except BaseException:
                lock.release()
                raise
            self._lock = lock
        self._times += 1

    def release(self) -> None:
        """Release the lock once; no error if it is not held."""
        if self._times == 1 and self._lock is not None:
            (self.folder / HOLDER).unlink(missing_ok=True)
            self._lock.release()
            self._lock = None
        self._times = max(0, self._times - 1)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_in_use(folder: Path) -> bool:
    """Whether a training holds the folder's lock."""
    if not (folder / LOCK).is_file():
        return False
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False


def _myself() -> dict[str, str | int]:
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    command = one_line(" ".join(sys.argv))
    return {"process": os.getpid(), "host": platform.node(), "since": since, "command": command}


def _holder(folder: Path) -> str:
    try:
        said = read_json(folder / HOLDER)
        process, host, since, command = (one_line(said[key]) for key in ("process", "host", "since", "command"))
    except (OSError, ValueError, KeyError, TypeError):  # the holder just ended, or was killed while writing
        return "another process"
    return f"process {process} on {host} ({command}), since {since},"
