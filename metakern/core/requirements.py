"""Missing libraries: the error names them, and the command that installs them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

#: What pip calls a library, where that is not the name that it is imported by.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}

#: The extra of metakern that brings a library, by the name that it is imported by; torch, numpy and safetensors come
#: with metakern itself.
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
    """A context for imports of other libraries; its error names one that is missing.

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
    """Raise before the work where libraries that it needs are missing; none is imported.

    Raises:
        ModuleNotFoundError: for the first that is missing.
    """
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise missing(library)


def missing(library: str) -> ModuleNotFoundError:
    """The error for a library by the name that it is imported by."""
    distribution = DISTRIBUTIONS.get(library, library)
    wanted = f"'metakern[{EXTRAS[library]}]'" if library in EXTRAS else distribution
    text = f"metakern needs {distribution}, which is not installed: pip install {wanted}"
    return ModuleNotFoundError(text, name=library)
