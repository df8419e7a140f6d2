"""Registry of functions that a lower room uses from a higher one without importing it.

Example: a trainer writes a run record, but ``training`` must not import ``runs``. The package's top level registers
the functions here by name; each is imported on first use, as ``import metakern`` must not load what only trainers need.
"""

from __future__ import annotations

import pkgutil
from typing import Any

_makers: dict[str, str] = {}


def provide(name: str, maker: str) -> None:
    """Register the function for ``name``, as ``"module:function"``."""
    _makers[name] = maker


def provided(name: str) -> Any:
    """Import and return the function registered for ``name``.

    Raises:
        KeyError: for an unregistered name.
    """
    return pkgutil.resolve_name(_makers[name])
