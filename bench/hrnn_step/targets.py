"""Speed and memory targets of hrnn_step, and whether a run met them."""

from __future__ import annotations

from typing import Any

from bench.targets import judged

#: kind, cell, operation, peer, required speed-up
SPEEDUPS = (
    ("must", "4 x 25,000", "forward", "eager", 6.0),
    ("must", "4 x 25,000", "forward", "compiled", 4.0),
    ("must", "4 x 25,000", "forward_backward", "eager", 4.0),
    ("must", "4 x 25,000", "forward_backward", "compiled", 2.5),
    ("must", "10 x 1,000", "forward", "eager", 10.0),
    ("aim", "4 x 25,000", "forward", "eager", 10.0),
    ("aim", "4 x 25,000", "forward", "compiled", 6.0),
    ("aim", "4 x 25,000", "forward_backward", "eager", 8.0),
    ("aim", "4 x 25,000", "forward_backward", "compiled", 4.0),
)

#: Bytes that a step may keep per coordinate.
KEPT_BYTES = 200


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Targets with a measurement in ``results``, the measurement and whether it was met."""
    cells = {(cell["tensors"], cell["op"]): cell for cell in results["cells"]}
    targets = []
    for kind, tensors, op, peer, required in SPEEDUPS:
        measured = cells.get((tensors, op), {}).get("speedup", {}).get(peer)
        if measured is not None:
            name = f"{op.replace('_', ' + ')} against {peer}, {tensors} coordinates"
            targets.append(judged(kind, name, "≥", required, measured, "x"))
    targets.append(judged("must", "kept for backward, a coordinate", "≤", KEPT_BYTES, results["kept_bytes"], "bytes"))
    return targets
