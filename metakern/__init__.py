"""Fused kernels for gradient-based meta-learning in PyTorch."""

from metakern.core import moved
from metakern.core.provided import provide
from metakern.core.requirements import required

moved.install()
provide("record", "metakern.runs.record:RunRecord")
provide("progress", "metakern.runs.record:progress_reports")

with required():
    from metakern import maml, ops, optim, rules, tasks
    from metakern.core.backend import FallbackWarning, build_info, empty_cache
    from metakern.core.version import __version__
    from metakern.maml import (
        MAML,
        MetaSGD,
        adapt,
        clone_module,
        detach_module,
        meta_backward,
        meta_loss,
        update_module,
    )

#: learn2learn's name for ``maml``: scripts written for it run with ``import metakern as l2l``.
algorithms = maml

__all__ = [
    "MAML",
    "FallbackWarning",
    "MetaSGD",
    "__version__",
    "adapt",
    "algorithms",
    "build_info",
    "clone_module",
    "detach_module",
    "empty_cache",
    "maml",
    "meta_backward",
    "meta_loss",
    "ops",
    "optim",
    "rules",
    "tasks",
    "update_module",
]


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if not name.startswith("_"))} - {"required", "provide"})
