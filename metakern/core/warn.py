"""Warnings that point at the user's line, past the frames of torch and of this package."""

from __future__ import annotations

import sys
import warnings

import torch

from metakern.core.torch_private import called_by_the_compiler, traced_lines

#: Packages whose frames are skipped.
_LIBRARIES = ("metakern", "torch")


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line outside this package and torch.

    Under torch.compile this is a line of the traced code.
    """
    if torch.compiler.is_compiling():
        _warn_traced(message, category)
        return
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_library(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


@called_by_the_compiler
def _warn_traced(message: str, category: type[Warning]) -> None:
    """Warn at the traced user line, which is not on Python's own stack."""
    lines = [(path, line) for path, line in traced_lines() if not _is_library(_package_of(path))]
    path, line = lines[-1] if lines else (__file__, 0)
    warnings.warn_explicit(message, category, path, line, registry={})


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARIES


def _package_of(path: str) -> str:
    """Which of the skipped packages a file belongs to; empty for any other."""
    for name in _LIBRARIES:
        found = getattr(sys.modules.get(name), "__path__", [])
        if any(path.startswith(f"{folder}/") for folder in found):
            return name
    return ""
