"""Speed targets of the inner loop, and whether a run met them."""

from __future__ import annotations

from typing import Any

from bench.targets import judged

#: kind, required speed-up of a meta-iteration on a GPU over each peer
GPU_INNER_LOOP_SPEEDUPS = (("must", 3.0), ("aim", 10.0))
GPU_INNER_LOOP_TITLES = tuple(f"sinusoid 1-40-40-1, T = {tasks:,}, K = 5, second order" for tasks in (32, 1024))
GPU_INNER_LOOP_PEERS = ("vmap", "compiled")

#: kind, title of the case, peer, required speed-up of a meta-iteration
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


def judge_inner_loop(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Inner-loop targets with a measurement in ``results``.

    One task's adaptation is compared with learn2learn, or with the plain loop if learn2learn is not available.
    """
    speedups = {cell["title"]: cell["speedup"] for cell in results["cells"]}
    targets = [
        judged(kind, f"{title}, against {peer}", "≥", required, speedups[title][peer], "x")
        for kind, title, peer, required in INNER_LOOP_SPEEDUPS
        if peer in speedups.get(title, {})
    ]
    adapt = results["adapt"]["speedup"]
    peer = "learn2learn" if "learn2learn" in adapt else "loop"
    return [*targets, judged("must", f"MAML.adapt on one task, against {peer}", "≥", 1.0, adapt[peer], "x")]


def judge_gpu_inner_loop(results: dict[str, Any]) -> list[dict[str, Any]]:
    """All inner-loop targets on a GPU, for its first backend; unmeasured ones count as missed."""
    subject = results["backends"][0]
    cells = {cell["title"]: cell["contenders"].get(subject, {}) for cell in results["loops"]["mlp_inner_loop"]}
    return [
        judged(
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
