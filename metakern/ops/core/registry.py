"""Registry of operators by name; importing an operator's package registers it."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metakern.ops.core.define_op import Operator

#: Operators by their name in torch.ops.metakern, backward operators included.
OPERATORS: dict[str, Operator] = {}


def operators() -> dict[str, Operator]:
    """All operators; imports the packages that are not yet imported."""
    for module in pkgutil.iter_modules([str(Path(__file__).parents[1])]):
        if module.ispkg and module.name != "core":
            importlib.import_module(f"metakern.ops.{module.name}")
    return dict(OPERATORS)
