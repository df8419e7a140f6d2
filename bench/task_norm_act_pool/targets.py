"""Speed targets of task_norm_act_pool, and whether a run met them."""

from __future__ import annotations

from typing import Any

from bench.targets import judged

#: Required speed-up against the better of PyTorch's two ways.
SPEEDUP = 2.0


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The target for every block and pass."""
    return [
        judged("must", f"{cell['pass']}, {cell['block']}", "≥", SPEEDUP, min(cell["speedup"].values()), "x")
        for cell in results["cells"]
    ]
