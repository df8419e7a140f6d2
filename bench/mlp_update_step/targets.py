"""Targets of mlp_update_step's benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.targets import judged

#: By contender: kind and least ratio of its time to metakern's, of a forward step at 39-32-32-2.
RATIOS = {"eager": (("must", 6.0), ("aim", 12.0)), "compiled": (("must", 3.0),)}

#: Largest multiple of the time that a matrix product needs for the network's FLOPs.
MULTIPLE_OF_FLOOR = 3.0


def judge(cells: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Whether the wide network's forward steps are as fast as they must be."""
    found = []
    for cell in cells:
        if cell["backward"] or cell["width"] < 32:
            continue
        measured = [name for name in RATIOS if name in cell["speedup"]]  # torch.compile may be left out
        for name in measured:
            for kind, required in RATIOS[name]:
                found.append(judged(kind, f"{cell['title']}: x {name}", "≥", required, cell["speedup"][name], "x"))
        name = f"{cell['title']}: time over that of its FLOPs in a matrix product"
        found.append(judged("must", name, "≤", MULTIPLE_OF_FLOOR, 1 / cell["share_of_sgemm"]))
    return found
