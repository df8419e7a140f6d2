"""Writing files whole or not at all, never through a link."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

#: How temporary files end; what a killed process left of them may be removed.
TEMPORARY = ".tmp"


def write_whole(path: Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Write a file whole or not at all: to a new temporary file beside it, synced and renamed.

    Args:
        path: of the file; one that is there is replaced
        content: its bytes, or a function that writes them to an open file

    Raises:
        OSError: where the file cannot be written, and where a directory or a symbolic link has its name; what was there
            is as it was.
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
    """A descriptor of a file that this call creates; whatever has its name already is an error, a link too."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)


def check_target(path: Path) -> None:
    """Raise OSError where something has the name of a file to write that is no plain file."""
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
    """Raise OSError where names within a folder are taken by something else than a plain file, or than a folder."""
    for name in folders:
        path = folder / name
        if os.path.lexists(path) and not path.is_dir():
            raise OSError(errno.ENOTDIR, "a folder is to be made where a file is: remove it", str(path))
    for name in files:
        check_target(folder / name)
