"""Timing of one GPU case: an operator and its peers, after a check that their results agree.

An operator takes part in the GPU benchmark by ``CELLS`` in its module bench/<op>/gpu.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.gpu_device import Device, reason, time_limit
from bench.peers import largest_difference
from bench.timing import Calls, alternate

#: Largest relative difference to the first peer, in float32; sums over tasks and samples differ in order.
AGREEMENT = 1e-3

#: Message of the public functions if a backend has no kernels for the call.
ABSENT = "cannot run"

#: Builds a contender's calls on several inputs, and a call that returns new results on the first input.
Make = Callable[[], tuple[Calls, Callable[[], list[Tensor]]]]


@dataclass(frozen=True)
class Limits:
    """Time limits of a cell."""

    cell_seconds: float  # of timing
    compile_seconds: float  # at most, per contender
    min_rounds: int


class Case(Protocol):
    """What :attr:`Cells.make` makes a cell of."""

    @property
    def title(self) -> str:
        """The case in words."""


class Cell:
    """One case: contenders that run and agree, their calls, and why others are missing."""

    def __init__(self, title: str, device: Device, limits: Limits) -> None:
        self.title, self.device, self.limits = title, device, limits
        self.calls: dict[str, Calls] = {}
        self.differences: dict[str, float] = {}
        self.unavailable: dict[str, str] = {}
        self.failed: list[str] = []
        self._ours: set[str] = set()
        self._expected: list[Tensor] = []

    def admit(self, name: str, make: Make, *, ours: bool) -> None:
        """Admit a contender unless it fails or its results differ from the first one's."""
        try:
            with time_limit(self.limits.compile_seconds, "the first call"):
                calls, first = make()
                got = first()
            self._expected = self._expected or got
            self.differences[name] = largest_difference(got, self._expected, AGREEMENT)
            self.calls[name] = calls
            self._ours |= {name} if ours else set()
        except Exception as error:  # skip this contender, measure the others
            self.unavailable[name] = reason(error)
            print(f"  {name} is not measured: {reason(error)}", flush=True)
            absent = isinstance(error, RuntimeError) and ABSENT in str(error)
            if ours and not absent and not isinstance(error, torch.OutOfMemoryError):
                self.failed.append(name)
            self.device.release()

    def measure(self) -> dict[str, Any]:
        """Times and ratios."""
        times = alternate(
            self.calls,
            seconds=self.limits.cell_seconds,
            min_rounds=self.limits.min_rounds,
            clock=self.device.seconds,
        )
        peers = {name: entry["median_s"] for name, entry in times.items() if name not in self._ours}
        fastest = min(peers, key=peers.__getitem__, default=None)
        contenders: dict[str, dict[str, Any]] = {name: dict(entry) for name, entry in times.items()}
        for name in self._ours:
            speedups = {peer: seconds / times[name]["median_s"] for peer, seconds in peers.items()}
            contenders[name]["speedup"] = speedups
            contenders[name]["speedup_over_fastest_peer"] = None if fastest is None else speedups[fastest]
        return {
            "title": self.title,
            "fastest_peer": fastest,
            "contenders": contenders,
            "difference_from_the_first": self.differences,
            "unavailable": self.unavailable,
            "failed": self.failed,
        }


@dataclass(frozen=True)
class Cells:
    """An operator's part of the GPU benchmark.

    Attributes:
        full: the cases, the most important first
        dry: tiny ones, for the CPU
        make: ``make(case, device, limits, compiled=...)`` is the cell of a case, with or without the compiled peer
    """

    full: Sequence[Any]
    dry: Sequence[Any]
    make: Callable[..., Cell]


def find_cells() -> dict[str, Cells]:
    """:class:`Cells` of every operator that has them, by the name of its folder."""
    folders = sorted(path.parent.name for path in Path(__file__).parent.glob("*/gpu.py"))
    modules = {name: importlib.import_module(f"bench.{name}.gpu") for name in folders}
    return {name: module.CELLS for name, module in modules.items() if hasattr(module, "CELLS")}
