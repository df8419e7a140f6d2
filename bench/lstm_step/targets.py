"""Speed and memory targets of lstm_step, and whether a run met them."""

from __future__ import annotations

from typing import Any

from bench.targets import judged

#: kind, operation, sizes, peer, required speed-up
SPEEDUPS = (
    ("must", "forward", (10**5, 10**6), "compiled", 4.0),
    ("must", "forward", (10**3, 10**5, 10**6), "eager", 8.0),
    ("must", "forward_backward", (10**4, 10**5, 10**6), "eager", 4.0),
    ("aim", "forward_backward", (10**4, 10**5, 10**6), "eager", 8.0),
)

#: Sizes at which the forward step should stay within this multiple of the FMA floor.
FLOOR_SIZES, FLOOR_MULTIPLE = (10**4, 10**5, 10**6), 2.0

#: GPU targets: speed-up over the fastest of all peers, and multiples of the memory floor.
GPU_SIZES = (10**6, 10**7)
GPU_SPEEDUPS = (
    ("must", "forward", 3.0),
    ("aim", "forward", 5.0),
    ("must", "forward_backward", 3.0),
    ("aim", "forward_backward", 5.0),
)
GPU_FLOOR_MULTIPLES = (("must", 2.0), ("aim", 1.3))
GPU_SMALL, GPU_SMALL_SPEEDUP = 10**4, 8.0

MEMORY_RATIO = 0.5
PYTHON_US = 15.0


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Targets with a measurement in ``results``, the measurement and whether it was met."""
    targets: list[dict[str, Any]] = []

    def add(*args: Any) -> None:
        targets.append(judged(*args))

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


def judge_gpu(results: dict[str, Any]) -> list[dict[str, Any]]:
    """All GPU targets for the contender ``results["subject"]``; unmeasured ones count as missed."""
    subject = results["subject"]
    cells = {(cell["op"], cell["n"]): cell for cell in results["cells"]}

    def measured(op: str, n: int, key: str) -> float | None:
        value = cells.get((op, n), {}).get("contenders", {}).get(subject, {}).get(key)
        return None if value is None else float(value)

    targets = []
    for kind, op, required in GPU_SPEEDUPS:
        for n in GPU_SIZES:
            name = f"{op.replace('_', ' + ')} against the fastest peer, N = {n:,}"
            targets.append(judged(kind, name, "≥", required, measured(op, n, "speedup_over_fastest_peer"), "x"))
    for kind, required in GPU_FLOOR_MULTIPLES:
        for n in GPU_SIZES:
            name = f"forward against the floor of the memory, N = {n:,}"
            targets.append(judged(kind, name, "≤", required, measured("forward", n, "multiple_of_memory_floor"), "x"))
    name = f"forward against eager, N = {GPU_SMALL:,}"
    small = measured("forward", GPU_SMALL, "speedup_over_eager")
    targets.append(judged("must", name, "≥", GPU_SMALL_SPEEDUP, small, "x"))
    launches = results["host"].get("launches", {}).get(subject)
    targets.append(judged("must", f"launches of forward, N = {GPU_SMALL:,}", "≤", 1, launches))
    return targets
