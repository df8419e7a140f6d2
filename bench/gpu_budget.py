"""Cases of all operators on a GPU within a time budget; bench.gpu writes the results.

The operators are those with ``CELLS`` (bench.gpu_cells). Their first cases come first, then the second ones, and so on,
so that little time still measures each operator.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu_cells import Case, Limits, find_cells
from bench.gpu_device import Device, reason

CELLS = find_cells()


@dataclass(frozen=True)
class CellPlan:
    """Cases of a run by operator, the most important first."""

    cases: Mapping[str, Sequence[Case]]
    limits: Limits
    share: float  # of the budget of the whole run

    @property
    def jobs(self) -> list[tuple[str, Case]]:
        """Operator and case, in order."""
        by_operator = [[(name, case) for case in cases] for name, cases in self.cases.items()]
        return [job for each in itertools.zip_longest(*by_operator) for job in each if job is not None]


FULL = CellPlan({name: cells.full for name, cells in CELLS.items()}, Limits(1.1, 45.0, 5), share=0.5)
DRY = CellPlan({name: cells.dry for name, cells in CELLS.items()}, Limits(0.05, 20.0, 2), share=0.5)


def measure(device: Device, plan: CellPlan, seconds: float, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure the cases that fit ``seconds``, with the compiled peer if time is left; ``write`` gets every update."""
    start = time.monotonic()
    found: dict[str, Any] = {name: [] for name in plan.cases} | {"skipped": {}}
    for index, (name, case) in enumerate(plan.jobs):
        left, full_title = seconds - (time.monotonic() - start), f"{name}, {case.title}"
        print(f"{full_title}: {left:.0f} s left", flush=True)
        needed = 2 * plan.limits.cell_seconds
        if left < needed and index:
            found["skipped"][full_title] = f"{left:.0f} s of {seconds:.0f} were left"
            continue
        compiled = left >= needed * (len(plan.jobs) - index) + plan.limits.compile_seconds
        if not compiled:
            found["skipped"][f"compiled, {full_title}"] = f"{left:.0f} s of {seconds:.0f} were left"
        torch._dynamo.reset()  # every case is compiled separately
        try:
            found[name].append(CELLS[name].make(case, device, plan.limits, compiled=compiled).measure())
        except torch.OutOfMemoryError as error:
            found["skipped"][full_title] = reason(error)
        device.release()
        write(found)
    return found


def _cells(found: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Operator and results of every measured case."""
    return [(name, cell) for name, cells in found.items() if name != "skipped" for cell in cells]


def table(found: dict[str, Any]) -> str:
    """One line per contender: microseconds, and speed-up over the fastest peer."""
    lines = []
    for operator, cell in _cells(found):
        lines.append(f"{operator}, {cell['title']}")
        for name, entry in cell["contenders"].items():
            ratio = entry.get("speedup_over_fastest_peer")
            against = "" if ratio is None else f"  {ratio:.2f}x the fastest peer, {cell['fastest_peer']}"
            lines.append(f"  {name:12} {entry['median_s'] * 1e6:12.1f} us{against}")
        lines += [f"  {name:12} not measured: {why}" for name, why in cell["unavailable"].items()]
    return "\n".join([*lines, *(f"not measured: {name}: {why}" for name, why in found["skipped"].items())])


def failures(found: dict[str, Any]) -> list[str]:
    """Our own contenders that failed; a missing backend is no failure."""
    return [f"{operator}, {cell['title']}: {name}" for operator, cell in _cells(found) for name in cell["failed"]]
