"""Atomic file writes that never follow a symbolic link."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

#: Suffix of temporary files; those left by a killed process may be removed.
TEMPORARY = ".tmp"


def write_whole(path: Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically: to a temporary file beside it, synced and renamed.

    Args:
        path: the file; an existing one is replaced
        content: its bytes, or a function that writes them to an open file

    Raises:
        OSError: where the file cannot be written, or ``path`` is a directory or a symbolic link; what was there is
            unchanged.
    """
    check_target(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:12]}{TEMPORARY}")
    try:
        with os.fdopen(open_new(temporary), "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def open_new(path: Path) -> int:
    """Create a file and return its descriptor; an existing file or link of this name is an error."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)


def check_target(path: Path) -> None:
    """Raise OSError where ``path`` exists and is not a regular file."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a directory"}
    number = errno.EISDIR if stat.S_ISDIR(mode) else errno.ELOOP if stat.S_ISLNK(mode) else errno.EEXIST
    kind = kinds.get(stat.S_IFMT(mode), "no plain file")
    raise OSError(number, f"a file is to be written where {kind} is: remove it or take another folder", str(path))


def check_targets(folder: Path, files: Iterable[str], folders: Iterable[str] = ()) -> None:
    """Raise OSError where one of ``files`` exists but is no regular file, or one of ``folders`` but is no folder."""
    for name in folders:
        path = folder / name
        if os.path.lexists(path) and not path.is_dir():
            raise OSError(errno.ENOTDIR, "a folder is to be made where a file is: remove it", str(path))
    for name in files:
        check_target(folder / name)
