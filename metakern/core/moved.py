"""Modules that have moved: their old names still import, with a DeprecationWarning, for one release."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

#: New module name by old one; empty for an old package without a successor.
MOVED = {
    "metakern.adaptation": "metakern.evaluation.adaptation",
    "metakern.clustering": "metakern.learners.clustering",
    "metakern.figures": "metakern.runs.figures",
    "metakern.reference": "",
    "metakern.reference.inner_update": "metakern.ops.inner_update.reference",
    "metakern.reference.lstm_step": "metakern.ops.lstm_step.reference",
    "metakern.reference.mlp_inner_loop": "metakern.ops.mlp_inner_loop.reference",
    "metakern.ops.lstm_state": "metakern.ops.lstm_step.state",
    "metakern.training.metrics": "metakern.runs.metrics",
    "metakern.training.progress": "metakern.runs.progress",
    "metakern.training.record": "metakern.runs.record",
    "metakern.training.run_files": "metakern.runs.run_files",
}


class Moved(MetaPathFinder, Loader):
    """Import hook that resolves an old module name to the module's new place."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for the names in :data:`MOVED`."""
        if fullname not in MOVED:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=not MOVED[fullname])

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The module under its new name; None lets Python make an empty package."""
        new = MOVED[spec.name]
        if not new:
            return None
        message = f"{spec.name} is now {new}; the old name goes in the next release"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec; the module ran already, under its new name."""
        spec = module.__spec__
        if spec is not None and spec.loader_state is not None:
            module.__spec__ = spec.loader_state


def install() -> None:
    """Install the import hook for old names, once."""
    if not any(isinstance(finder, Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, Moved())
