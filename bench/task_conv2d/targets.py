"""Speed targets of task_conv2d, and whether a run met them."""

from __future__ import annotations

from typing import Any

from bench.targets import judged

#: Required share of the matrix product's rate, and required speed-up against the loop.
SHARE, SPEEDUP = 0.6, 2.0


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Both targets for every layer and map."""
    targets = []
    for cell in results["cells"]:
        name = f"{cell['map']}, {cell['layer']}"
        targets.append(judged("must", f"share, {name}", "≥", SHARE, cell["share_of_matrix_product"], ""))
        targets.append(judged("must", f"against the loop, {name}", "≥", SPEEDUP, cell["speedup"]["loop"], "x"))
    return targets
