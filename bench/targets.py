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

#: The same on a GPU, against the fastest of all peers, and multiples of the floor that the device's memory sets.
GPU_SIZES = (10**6, 10**7)
GPU_SPEEDUPS = (
    ("must", "forward", 3.0),
    ("aim", "forward", 5.0),
    ("must", "forward_backward", 3.0),
    ("aim", "forward_backward", 5.0),
)
GPU_FLOOR_MULTIPLES = (("must", 2.0), ("aim", 1.3))
GPU_SMALL, GPU_SMALL_SPEEDUP = 10**4, 8.0

#: kind, speed-up of a meta-iteration on a GPU that is required against each peer
GPU_INNER_LOOP_SPEEDUPS = (("must", 3.0), ("aim", 10.0))
GPU_INNER_LOOP_TITLES = tuple(f"sinusoid 1-40-40-1, T = {tasks:,}, K = 5, second order" for tasks in (32, 1024))
GPU_INNER_LOOP_PEERS = ("vmap", "compiled")

MEMORY_RATIO = 0.5
PYTHON_US = 15.0

#: kind, title of the case, peer, speed-up of a meta-iteration that is required
INNER_LOOP_SPEEDUPS = (
    ("must", "sinusoid 1-40-40-1, T = 32, K = 5, second order", "compiled", 2.0),
    ("must", "sinusoid 1-40-40-1, T = 32, K = 5, second order", "loop", 60.0),
    ("aim", "sinusoid 1-40-40-1, T = 32, K = 5, second order", "compiled", 4.0),
    ("must", "sinusoid 1-40-40-1, T = 32, K = 5, first order", "compiled", 2.0),
    ("must", "sinusoid 1-40-40-1, T = 32, K = 5, first order", "loop", 60.0),
    ("aim", "sinusoid 1-40-40-1, T = 32, K = 5, first order", "compiled", 4.0),
    ("must", "5-way 64-64-64-5, T = 32, K = 5, second order", "compiled", 1.5),
    ("aim", "5-way 64-64-64-5, T = 32, K = 5, second order", "compiled", 3.0),
)

#: Of the meta-loss in the first iterations of training through metakern and through plain PyTorch, in float64.
SINUSOID_DIFFERENCE = 1e-12

#: Problem, then kind and ratio of the MSE to plain MAML's; kind and share of its iterations until its MSE is reached.
CLUSTERED_RATIOS = {"regression-3": (("must", 0.75), ("aim", 0.5))}
CLUSTERED_SHARES = (("must", 0.5), ("aim", 1 / 3))

_RELATIONS = {">": operator.gt, "≥": operator.ge, "≤": operator.le, "<": operator.lt}


def _judged(
    kind: str, name: str, relation: str, required: float, measured: float | None, unit: str = ""
) -> dict[str, Any]:
    """A target with its measurement; one that was not measured is not met."""
    met = measured is not None and bool(_RELATIONS[relation](measured, required))
    target = {"kind": kind, "name": name, "relation": relation, "required": required, "unit": unit}
    return target | {"measured": measured, "met": met}


def measured(target: dict[str, Any], digits: int) -> str:
    """A target's measurement in words."""
    return "never" if target["measured"] is None else f"{target['measured']:.{digits}f}"


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every target that ``results`` has a measurement for, with the measurement and whether it was met."""
    targets: list[dict[str, Any]] = []

    def add(*args: Any) -> None:
        targets.append(_judged(*args))

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


def judge_inner_loop(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every target of the inner loop that ``results`` has a measurement for.

    One task's adaptation is held against learn2learn, or against the plain loop where learn2learn is not here.
    """
    speedups = {cell["title"]: cell["speedup"] for cell in results["cells"]}
    targets = [
        _judged(kind, f"{title}, against {peer}", "≥", required, speedups[title][peer], "x")
        for kind, title, peer, required in INNER_LOOP_SPEEDUPS
        if peer in speedups.get(title, {})
    ]
    adapt = results["adapt"]["speedup"]
    peer = "learn2learn" if "learn2learn" in adapt else "loop"
    return [*targets, _judged("must", f"MAML.adapt on one task, against {peer}", "≥", 1.0, adapt[peer], "x")]


def judge_sinusoid(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether training through metakern and through plain PyTorch leads to the same.

    In float64 the meta-losses agree to rounding; in float32, in the long run, the intervals of the paired differences
    cover zero.
    """
    first = results["first_iterations"]
    name = f"relative difference of the meta-loss in float64, first {first['iterations']} iterations"
    targets = [_judged("must", name, "≤", SINUSOID_DIFFERENCE, first["float64"])]
    for steps, difference in results["difference"].items():
        name = f"difference of the test loss, {steps} steps, in half-widths of its 95 % interval"
        half = (difference["high"] - difference["low"]) / 2
        targets.append(_judged("must", name, "≤", 1.0, abs(difference["mean"]) / half if half else 0.0))
    return targets


def judge_clusters(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every target of training in clusters for the problems that ``results`` has, by its way "clusters"."""
    targets: list[dict[str, Any]] = []
    for name, found in results["problems"].items():
        title, ways = found["settings"]["title"], found["ways"]
        ours = ways["clusters"]
        if name in CLUSTERED_RATIOS:
            for kind, required in CLUSTERED_RATIOS[name]:
                targets.append(_judged(kind, f"{title}: MSE to plain MAML's", "≤", required, ours["ratio"]["mean"]))
            best = ours["ratio_best"]["mean"]
            targets.append(_judged("aim", f"{title}: MSE to the best single learner's", "≤", 0.75, best))
            told = min(ways[way]["test_told"]["mean"] for way in ways if "test_told" in ways[way])
            targets.append(_judged("aim", f"{title}: MSE to the told oracle's", "<", 1.0, ours["test"]["mean"] / told))
            shares = [of["iterations"] for of in ours["reaches_plain"] if of is not None]
            share = sum(shares) / len(shares) if len(shares) == results["seeds"] else None
            for kind, required in CLUSTERED_SHARES:
                targets.append(_judged(kind, f"{title}: iterations to plain MAML's last MSE", "≤", required, share))
        if found["settings"]["measure"] == "accuracy":
            low = min(ours["difference"]["low"], ours["difference_best"]["low"])
            targets.append(_judged("must", f"{title}: low end of the gain in accuracy", ">", 0.0, low))
    return targets


def judge_gpu(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every target of a GPU for the contender ``results["subject"]``; one that was not measured is missed."""
    subject = results["subject"]
    cells = {(cell["op"], cell["n"]): cell for cell in results["cells"]}

    def measured(op: str, n: int, key: str) -> float | None:
        value = cells.get((op, n), {}).get("contenders", {}).get(subject, {}).get(key)
        return None if value is None else float(value)

    targets = []
    for kind, op, required in GPU_SPEEDUPS:
        for n in GPU_SIZES:
            name = f"{op.replace('_', ' + ')} against the fastest peer, N = {n:,}"
            targets.append(_judged(kind, name, "≥", required, measured(op, n, "speedup_over_fastest_peer"), "x"))
    for kind, required in GPU_FLOOR_MULTIPLES:
        for n in GPU_SIZES:
            name = f"forward against the floor of the memory, N = {n:,}"
            targets.append(_judged(kind, name, "≤", required, measured("forward", n, "multiple_of_memory_floor"), "x"))
    name = f"forward against eager, N = {GPU_SMALL:,}"
    small = measured("forward", GPU_SMALL, "speedup_over_eager")
    targets.append(_judged("must", name, "≥", GPU_SMALL_SPEEDUP, small, "x"))
    launches = results["host"].get("launches", {}).get(subject)
    targets.append(_judged("must", f"launches of forward, N = {GPU_SMALL:,}", "≤", 1, launches))
    return targets


def judge_gpu_inner_loop(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every target of the inner loop on a GPU, for its first backend; one that was not measured is missed."""
    subject = results["backends"][0]
    cells = {cell["title"]: cell["contenders"].get(subject, {}) for cell in results["loops"]["inner_loop"]}
    return [
        _judged(
            kind,
            f"{title}, against {peer}",
            "≥",
            required,
            cells.get(title, {}).get("speedup", {}).get(peer),
            "x",
        )
        for kind, required in GPU_INNER_LOOP_SPEEDUPS
        for title in GPU_INNER_LOOP_TITLES
        for peer in GPU_INNER_LOOP_PEERS
    ]
