"""What the project promises about speed and memory, and whether a run kept it."""

from __future__ import annotations

import operator
from typing import Any

#: kind, operation, sizes, peer, speed-up that is required
SPEEDUPS = (
    ("must", "forward", (10**5, 10**6), "compiled", 4.0),
    ("must", "forward", (10**3, 10**5, 10**6), "eager", 8.0),
    ("must", "forward_backward", (10**4, 10**5, 10**6), "eager", 4.0),
    ("aim", "forward_backward", (10**4, 10**5, 10**6), "eager", 8.0),
)

#: Sizes at which the forward step should stay within this multiple of the FMA floor.
FLOOR_SIZES, FLOOR_MULTIPLE = (10**4, 10**5, 10**6), 2.0

MEMORY_RATIO = 0.5
PYTHON_US = 15.0

_RELATIONS = {"≥": operator.ge, "≤": operator.le, "<": operator.lt}


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every target that ``results`` has a measurement for, with the measurement and whether it was met."""
    targets: list[dict[str, Any]] = []

    def add(kind: str, name: str, relation: str, required: float, measured: float, unit: str = "") -> None:
        met = bool(_RELATIONS[relation](measured, required))
        targets.append(
            {"kind": kind, "name": name, "relation": relation, "required": required, "unit": unit, "measured": measured}
            | {"met": met}
        )

    cells = {(cell["op"], cell["n"]): cell for cell in results["cells"]}
    for kind, op, sizes, peer, required in SPEEDUPS:
        for n in sizes:
            if (op, n) in cells and peer in cells[op, n]["speedup"]:
                name = f"{op.replace('_', ' + ')} against {peer}, N = {n:,}"
                add(kind, name, "≥", required, cells[op, n]["speedup"][peer], "x")
    for n in FLOOR_SIZES:
        if ("forward", n) in cells:
            multiple = 1 / cells["forward", n]["share_of_fma_floor"]
            add("aim", f"forward against the FMA floor, N = {n:,}", "≤", FLOOR_MULTIPLE, multiple, "x")
    unroll, overhead = results["unroll"], results["overhead"]
    name = f"peak memory of a {unroll['steps']}-step unroll against eager, N = {unroll['n']:,}"
    add("must", name, "≤", MEMORY_RATIO, unroll["memory_ratio"], "x")
    add("must", "Python around the operator, no graph", "<", PYTHON_US, overhead["python_us"], "µs")
    add("aim", "Python around the operator, with a graph", "<", PYTHON_US, overhead["python_with_graph_us"], "µs")
    return targets
