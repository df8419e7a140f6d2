"""Targets of the convolutional inner loop, and whether a run met them."""

from __future__ import annotations

from typing import Any

from bench.targets import judged

#: Start of a case's title; kind and required speed-up over the fastest peer.
SPEEDUPS = {"conv4": (("must", 2.0), ("aim", 4.0)), "ResNet-12": (("must", 1.3), ("aim", 2.5))}

#: Required share of a matrix product's rate, on conv4.
SHARE = 0.6


def judge(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets of every case that was measured."""
    targets = []
    for cell in cells:
        title, peer = cell["title"], cell["fastest_peer"]
        for network, speedups in SPEEDUPS.items():
            if title.startswith(network):
                measured = cell["speedup"][peer]
                targets += [
                    judged(kind, f"{title}, against {peer}", "≥", need, measured, "x") for kind, need in speedups
                ]
        if title.startswith("conv4"):
            targets.append(judged("must", f"{title}, share of sgemm", "≥", SHARE, cell["share_of_sgemm"]))
    return targets
