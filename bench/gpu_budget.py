"""Inner-loop and inner_update cases on a GPU within a time budget; bench.gpu writes the results."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.gpu_cells import Cell, Limits
from bench.gpu_device import Device, reason
from bench.inner_update import gpu as inner_update
from bench.inner_update.gpu import UpdateCase, update_cell
from bench.mlp_inner_loop import gpu as mlp_inner_loop
from bench.mlp_inner_loop.cases import Case
from bench.mlp_inner_loop.gpu import loop_cell


@dataclass(frozen=True)
class LoopPlan:
    """Cases of a run, the most important first."""

    loops: tuple[Case, ...]
    updates: tuple[UpdateCase, ...]
    limits: Limits
    share: float  # of the budget of the whole run


FULL = LoopPlan(mlp_inner_loop.FULL, inner_update.FULL, Limits(1.5, 45.0, 5), share=0.45)
DRY = LoopPlan(mlp_inner_loop.DRY, inner_update.DRY, Limits(0.05, 20.0, 2), share=0.5)


def measure(device: Device, plan: LoopPlan, seconds: float, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure the cases that fit ``seconds``, with the compiled peer if time is left; ``write`` gets every update."""
    start = time.monotonic()
    found: dict[str, Any] = {"inner_loop": [], "inner_update": [], "skipped": {}}
    jobs: list[tuple[str, str, Callable[..., Cell]]] = [
        *(("inner_loop", case.title, partial(loop_cell, case)) for case in plan.loops),
        *(("inner_update", case.title, partial(update_cell, case)) for case in plan.updates),
    ]
    for index, (key, title, make) in enumerate(jobs):
        left = seconds - (time.monotonic() - start)
        print(f"{key}, {title}: {left:.0f} s left", flush=True)
        needed = 2 * plan.limits.cell_seconds
        if left < needed and index:
            found["skipped"][title] = f"{left:.0f} s of {seconds:.0f} were left"
            continue
        compiled = left >= needed * (len(jobs) - index) + plan.limits.compile_seconds
        if not compiled:
            found["skipped"][f"compiled, {title}"] = f"{left:.0f} s of {seconds:.0f} were left"
        torch._dynamo.reset()  # every case is compiled separately
        try:
            found[key].append(make(device, plan.limits, compiled=compiled).measure())
        except torch.OutOfMemoryError as error:
            found["skipped"][title] = reason(error)
        device.release()
        write(found)
    return found


def table(found: dict[str, Any]) -> str:
    """One line per contender: microseconds, and speed-up over the fastest peer."""
    lines = []
    for key in ("inner_loop", "inner_update"):
        for cell in found[key]:
            lines.append(f"{key}, {cell['title']}")
            for name, entry in cell["contenders"].items():
                ratio = entry.get("speedup_over_fastest_peer")
                against = "" if ratio is None else f"  {ratio:.2f}x the fastest peer, {cell['fastest_peer']}"
                lines.append(f"  {name:12} {entry['median_s'] * 1e6:12.1f} us{against}")
            lines += [f"  {name:12} not measured: {why}" for name, why in cell["unavailable"].items()]
    return "\n".join([*lines, *(f"not measured: {name}: {why}" for name, why in found["skipped"].items())])


def failures(found: dict[str, Any]) -> list[str]:
    """Our own contenders that failed; a missing backend is no failure."""
    cells = [*found["inner_loop"], *found["inner_update"]]
    return [f"{cell['title']}: {name}" for cell in cells for name in cell["failed"]]
