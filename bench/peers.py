"""Peer libraries, and the check that contenders compute the same."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.compiler.config
from torch import Tensor

#: Libraries that process one task at a time.
LIBRARIES = ("learn2learn", "higher", "torchopt")


def compile_peer(function: Any, **options: Any) -> Callable[..., Any]:
    """``torch.compile`` specialised to its sizes, with cache entries of its own for each instruction set.

    Inductor (torch 2.13) caches generated C++ code on disk under a key without the vector width, but compiles it for
    the instruction set in use. With ATEN_CPU_CAPABILITY=avx2 it would find code that it generated for AVX-512, whose
    loops advance by 16 lanes, and compute 8 of them: results are then wrong.
    """
    torch.compiler.config.cache_key_tag = torch.backends.cpu.get_cpu_capability()
    result: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=False, **options)
    return result


def find_libraries() -> tuple[dict[str, ModuleType], dict[str, str]]:
    """The peer libraries that can be imported; and for each its version, or why it cannot be imported."""
    modules, notes = {}, {}
    for name in LIBRARIES:
        if importlib.util.find_spec(name) is None:
            notes[name] = "not importable: not installed"
            continue
        try:
            modules[name] = importlib.import_module(name)
        except Exception as error:  # an old library may raise anything; it is recorded as the reason
            notes[name] = f"not importable: {type(error).__name__}: {error}"
            continue
        notes[name] = _version(modules[name])
    return modules, notes


def _version(module: ModuleType) -> str:
    """Version from the module, else from its installed metadata."""
    return str(getattr(module, "__version__", None) or importlib.metadata.version(module.__name__))


def largest_error(results: Mapping[str, Sequence[Tensor]], tolerance: float = 1e-4) -> float:
    """Largest relative error of any contender's results against the first one's; AssertionError above a tolerance.

    Relative to each tensor's largest magnitude, as float32 sums in another order differ.
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
    """Largest difference relative to each expected tensor's largest magnitude.

    Raises:
        ArithmeticError: above the allowed difference, and for NaN
    """
    worst = 0.0
    for index, (got, want) in enumerate(zip(actual, expected, strict=True)):
        error = float((got.to(want.dtype) - want).abs().max() / want.abs().max())
        if not error <= allowed:
            raise ArithmeticError(f"result {index} differs from eager by {error:.1e}, allowed {allowed:.0e}")
        worst = max(worst, error)
    return worst
