"""Engines of the inner loop: each says whether it serves a call and, if not, why."""

from metakern.inner_loop.engines.generic import GenericEngine
from metakern.inner_loop.engines.mlp import MlpEngine
from metakern.inner_loop.engines.protocol import Engine, Unserved

#: Engines in order of preference. The last is plain PyTorch, which serves every model and every rule.
ENGINES: tuple[Engine, ...] = (MlpEngine(), GenericEngine())

__all__ = ["ENGINES", "Engine", "Unserved"]
