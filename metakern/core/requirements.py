"""Libraries that metakern imports: one that is missing is named, with the command that installs it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

#: What pip calls a library, where that is not the name that it is imported by.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}


@contextmanager
def required() -> Iterator[None]:
    """Around imports of other libraries: names one that is missing.

    Raises:
        ModuleNotFoundError: with the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library in ("", "metakern") or "pip install" in str(error):
            raise
        raise missing(library) from error


def check_installed(*libraries: str) -> None:
    """Look for libraries without importing them: better an error now than after the work.

    Raises:
        ModuleNotFoundError: for the first that is missing.
    """
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise missing(library)


def missing(library: str) -> ModuleNotFoundError:
    """The error for a library by the name that it is imported by."""
    distribution = DISTRIBUTIONS.get(library, library)
    text = f"metakern needs {distribution}, which is not installed: pip install {distribution}"
    return ModuleNotFoundError(text, name=library)
