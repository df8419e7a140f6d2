"""Every operator by its name. Nothing is listed: an operator's folder enters it when it is imported."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metakern.ops.core.define_op import Operator

#: By the name that the operator has in torch.ops.metakern; backward operators among them.
OPERATORS: dict[str, Operator] = {}


def operators() -> dict[str, Operator]:
    """All operators, those of folders that nothing has imported yet among them."""
    for module in pkgutil.iter_modules([str(Path(__file__).parents[1])]):
        if module.ispkg and module.name != "core":
            importlib.import_module(f"metakern.ops.{module.name}")
    return dict(OPERATORS)
