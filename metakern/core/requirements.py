"""Errors for missing libraries, which name the library and the command that installs it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

#: Distribution name on PyPI by import name, where they differ.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}

#: metakern's extra that installs a library, by import name; torch, numpy and safetensors come with metakern itself.
EXTRAS = {
    "PIL": "train",
    "filelock": "train",
    "huggingface_hub": "hub",
    "matplotlib": "train",
    "rich": "train",
    "scipy": "train",
    "sklearn": "train",
    "tensorboard": "train",
    "triton": "triton",
    "typer": "train",
    "yaml": "train",
}


@contextmanager
def required() -> Iterator[None]:
    """Context manager for imports of optional libraries; the error names the missing one.

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
    """Check that libraries are installed, without importing them.

    Raises:
        ModuleNotFoundError: for the first missing one.
    """
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise missing(library)


def missing(library: str) -> ModuleNotFoundError:
    """The error for a missing library, given its import name."""
    distribution = DISTRIBUTIONS.get(library, library)
    wanted = f"'metakern[{EXTRAS[library]}]'" if library in EXTRAS else distribution
    text = f"metakern needs {distribution}, which is not installed: pip install {wanted}"
    return ModuleNotFoundError(text, name=library)
