"""Fused kernels for gradient-based meta-learning in PyTorch."""

from metakern import ops, optim, rules, tasks
from metakern._backend import FallbackWarning, build_info, empty_cache
from metakern._version import __version__

__all__ = ["FallbackWarning", "__version__", "build_info", "empty_cache", "ops", "optim", "rules", "tasks"]
