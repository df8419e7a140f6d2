"""Libraries that metakern is measured against, and whether contenders compute the same."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from types import ModuleType

from torch import Tensor

#: Libraries that take one task after another.
LIBRARIES = ("learn2learn", "higher", "torchopt")


def find_libraries() -> tuple[dict[str, ModuleType], dict[str, str]]:
    """The peers' libraries that can be imported here; and of each, its version or why it cannot be."""
    modules, notes = {}, {}
    for name in LIBRARIES:
        if importlib.util.find_spec(name) is None:
            notes[name] = "not importable: not installed"
            continue
        try:
            modules[name] = importlib.import_module(name)
        except Exception as error:  # whatever an old library stumbles over is the reason that is recorded
            notes[name] = f"not importable: {type(error).__name__}: {error}"
            continue
        notes[name] = _version(modules[name])
    return modules, notes


def _version(module: ModuleType) -> str:
    """As the module says it, else as its installed metadata do."""
    return str(getattr(module, "__version__", None) or importlib.metadata.version(module.__name__))


def largest_error(results: Mapping[str, Sequence[Tensor]], tolerance: float = 1e-4) -> float:
    """The largest relative error of any contender's results against the first one's; AssertionError above a tolerance.

    Relative to the largest magnitude of each tensor: float32 sums in another order differ.
    """
    worst = 0.0
    (first, expected), *others = results.items()
    for name, actual in others:
        for index, (got, want) in enumerate(zip(actual, expected, strict=True)):
            error = float((got - want).abs().max() / want.abs().max())
            assert error < tolerance, f"{name} and {first} differ by {error:.1e} in result {index}"
            worst = max(worst, error)
    return worst


def largest_difference(actual: Sequence[Tensor], expected: Sequence[Tensor], allowed: float) -> float:
    """Relative to the largest magnitude of each expected tensor.

    Raises:
        ArithmeticError: above what is allowed, and for NaN
    """
    worst = 0.0
    for index, (got, want) in enumerate(zip(actual, expected, strict=True)):
        error = float((got.to(want.dtype) - want).abs().max() / want.abs().max())
        if not error <= allowed:
            raise ArithmeticError(f"result {index} differs from eager by {error:.1e}, allowed {allowed:.0e}")
        worst = max(worst, error)
    return worst
