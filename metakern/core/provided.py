"""What a room takes from one above it without importing it.

A trainer that is given a folder leaves a record there, and ``training`` knows no ``runs``. The package itself, which
knows every room, names the makers here; each is imported when it is first asked for, as ``import metakern`` must not
load what only trainers need.
"""

from __future__ import annotations

import pkgutil
from typing import Any

_makers: dict[str, str] = {}


def provide(name: str, maker: str) -> None:
    """Say who makes ``name``: ``"module:function"``."""
    _makers[name] = maker


def provided(name: str) -> Any:
    """The maker of ``name``.

    Raises:
        KeyError: for a name that nothing was provided for.
    """
    return pkgutil.resolve_name(_makers[name])
