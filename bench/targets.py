"""Judging benchmark targets, and the targets of training."""

from __future__ import annotations

import operator
from typing import Any

#: Tolerance of the meta-loss in float64 between metakern and plain PyTorch, in the first training iterations.
SINUSOID_DIFFERENCE = 1e-12

#: Problem; kind and ratio of the MSE to plain MAML's; kind and share of plain MAML's iterations to reach its MSE.
CLUSTERED_RATIOS = {"regression-3": (("must", 0.75), ("aim", 0.5))}
CLUSTERED_SHARES = (("must", 0.5), ("aim", 1 / 3))

_RELATIONS = {">": operator.gt, "≥": operator.ge, "≤": operator.le, "<": operator.lt}


def judged(
    kind: str, name: str, relation: str, required: float, measured: float | None, unit: str = ""
) -> dict[str, Any]:
    """A target with its measurement; an unmeasured target is not met."""
    met = measured is not None and bool(_RELATIONS[relation](measured, required))
    target = {"kind": kind, "name": name, "relation": relation, "required": required, "unit": unit}
    return target | {"measured": measured, "met": met}


def measured(target: dict[str, Any], digits: int) -> str:
    """A target's measurement as text."""
    return "never" if target["measured"] is None else f"{target['measured']:.{digits}f}"


def judge_sinusoid(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether training through metakern and through plain PyTorch agrees.

    In float64 the meta-losses must agree to rounding; in float32, after full training, the intervals of the paired
    differences must cover zero.
    """
    first = results["first_iterations"]
    name = f"relative difference of the meta-loss in float64, first {first['iterations']} iterations"
    targets = [judged("must", name, "≤", SINUSOID_DIFFERENCE, first["float64"])]
    for steps, difference in results["difference"].items():
        name = f"difference of the test loss, {steps} steps, in half-widths of its 95 % interval"
        half = (difference["high"] - difference["low"]) / 2
        targets.append(judged("must", name, "≤", 1.0, abs(difference["mean"]) / half if half else 0.0))
    return targets


def judge_clusters(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Targets of training in clusters for the problems in ``results``, judged by the way "clusters"."""
    targets: list[dict[str, Any]] = []
    for name, found in results["problems"].items():
        title, ways = found["settings"]["title"], found["ways"]
        ours = ways["clusters"]
        if name in CLUSTERED_RATIOS:
            for kind, required in CLUSTERED_RATIOS[name]:
                targets.append(judged(kind, f"{title}: MSE to plain MAML's", "≤", required, ours["ratio"]["mean"]))
            best = ours["ratio_best"]["mean"]
            targets.append(judged("aim", f"{title}: MSE to the best single learner's", "≤", 0.75, best))
            told = min(ways[way]["test_told"]["mean"] for way in ways if "test_told" in ways[way])
            targets.append(judged("aim", f"{title}: MSE to the told oracle's", "<", 1.0, ours["test"]["mean"] / told))
            shares = [of["iterations"] for of in ours["reaches_plain"] if of is not None]
            share = sum(shares) / len(shares) if len(shares) == results["seeds"] else None
            for kind, required in CLUSTERED_SHARES:
                targets.append(judged(kind, f"{title}: iterations to plain MAML's last MSE", "≤", required, share))
        if found["settings"]["measure"] == "accuracy":
            low = min(ours["difference"]["low"], ours["difference_best"]["low"])
            targets.append(judged("must", f"{title}: low end of the gain in accuracy", ">", 0.0, low))
    return targets
