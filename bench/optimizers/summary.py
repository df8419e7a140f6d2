"""Figures of the comparison: common learning rates, final losses, areas, steps to Adam's loss, profile.

The final loss of a task is the geometric mean over its seeds, infinite if one of them is not finite. Losses are
normalised as log(f/f*)/log(f_0/f*), cut to [0, 1]: 0 is the lowest loss f* that any contender reaches at that length,
1 the loss at the start. Axis legend: G points of a curve, R rates, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.optimizers.baselines import BASELINES
from bench.optimizers.curves import HORIZONS, grid
from metakern.evaluation.optimizers import LEARNING_RATES

#: The learned optimizers of the comparison.
LEARNED = ("general", "general, told")

#: Losses count as at least this.
_FLOOR = 1e-12


def _array(curves: Any) -> Any:
    """Curves as an array; null becomes infinity."""
    found = np.array(curves, dtype=np.float64)
    return np.where(np.isfinite(found), np.maximum(found, _FLOOR), np.inf)


def _mean(losses: Any) -> Any:
    """Geometric mean over seeds, the last axis."""
    return np.exp(np.log(losses).mean(-1))


def _normalised(loss: Any, first: float, best: float) -> Any:
    span = max(math.log(first / best), 1e-9)
    return np.clip(np.log(np.asarray(loss) / best) / span, 0, 1)


def common_rates(tunings: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """For each baseline and length the rate of the lowest mean normalised loss over these tasks.

    Args:
        tunings: of every task its curves by "optimizer/horizon", [G, R, S]
    """
    rates: dict[str, dict[str, float]] = {name: {} for name in BASELINES}
    for horizon in HORIZONS:
        scores = dict.fromkeys(BASELINES, 0.0)
        for tuning in tunings:
            curves = {name: _mean(_array(tuning[f"{name}/{horizon}"])) for name in BASELINES}
            first, best = curves["Adam"][0, 0], min(curve[-1].min() for curve in curves.values())
            for name, curve in curves.items():
                scores[name] = scores[name] + _normalised(curve[-1], first, best)
        for name, score in scores.items():
            rates[name][str(horizon)] = LEARNING_RATES[int(np.argmin(score))]
    return rates


def chosen_rates(tuning: Mapping[str, Any], rates: Mapping[str, Mapping[str, float]]) -> dict[str, list[int]]:
    """By "optimizer/horizon" the indices of the rate (i) of all tasks and of the rate (ii) of this one."""
    found = {}
    for name in BASELINES:
        for horizon in HORIZONS:
            own = int(np.argmin(_mean(_array(tuning[f"{name}/{horizon}"])[-1])))
            found[f"{name}/{horizon}"] = [LEARNING_RATES.index(rates[name][str(horizon)]), own]
    return found


def summarise(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures by length: a row for each task, and those over all tasks.

    Args:
        parts: of every task its name, and by "optimizer/horizon" ``learned`` curves [G, S], the curves of ``tuning``
            [G, R, 2], the rates' indices (i) and (ii) in ``chosen`` and their curves from the other seeds, ``rest``
            [G, 2, S - 2]
    """
    return {str(h): _summary([_row(part, h) for part in parts]) for h in HORIZONS}


def _of_task(part: Mapping[str, Any], horizon: int) -> dict[str, Any]:
    """Mean curves [G] by contender."""
    curves = {name: _mean(_array(part["learned"][f"{name}/{horizon}"])) for name in LEARNED}
    for name in BASELINES:
        key = f"{name}/{horizon}"
        seeds = [_array(part["tuning"][key])[:, part["chosen"][key]], _array(part["rest"][key])]
        both = _mean(np.concatenate(seeds, 2))
        curves |= {f"{name} (i)": both[:, 0], f"{name} (ii)": both[:, 1]}
    return curves


def _row(part: Mapping[str, Any], horizon: int) -> dict[str, Any]:
    chosen = _of_task(part, horizon)
    first, best = float(chosen["general"][0]), min(float(curve[-1]) for curve in chosen.values())
    points = grid(horizon)
    target = chosen["Adam (i)"][-1]
    contenders = {}
    for name, curve in chosen.items():
        log_curve = np.log(np.minimum(curve, first * 1e3))
        reached = [point for point, loss in zip(points, curve, strict=True) if loss <= target]
        contenders[name] = {
            "final_loss": _plain(curve[-1]),
            "area_of_log_loss": float(np.trapezoid(log_curve, points) / horizon),
            "steps_to_adam": reached[0] if reached else None,
            "normalised": float(_normalised(curve[-1], first, best)),
        }
    worst = {}
    for name in LEARNED:
        curves_of_seeds = _array(part["learned"][f"{name}/{horizon}"])
        worst[name] = _plain(np.max(curves_of_seeds[-1] / curves_of_seeds[0]))
    return {"task": part["task"], "first_loss": first, "worst_ratio_to_start": worst, "contenders": contenders}


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = list(rows[0]["contenders"])
    found: dict[str, Any] = {"tasks": rows, "interquartile_mean": {}, "beats": {}}
    for name in names:
        values = sorted(row["contenders"][name]["normalised"] for row in rows)
        cut = len(values) // 4
        found["interquartile_mean"][name] = float(np.mean(values[cut : len(values) - cut]))
    for name in LEARNED:
        wins = dict.fromkeys((*(n for n in names if n not in LEARNED), "every (i)", "every (ii)"), 0)
        for row in rows:
            own = _loss(row["contenders"][name])
            lower = {other: own < _loss(row["contenders"][other]) for other in names if other not in LEARNED}
            for other, is_lower in lower.items():
                wins[other] += is_lower
            for kind in ("(i)", "(ii)"):
                wins[f"every {kind}"] += all(v for other, v in lower.items() if other.endswith(" " + kind))
        found["beats"][name] = {other: count / len(rows) for other, count in wins.items()}
        ratios = [row["worst_ratio_to_start"][name] for row in rows]
        found.setdefault("worse_than_start", {})[name] = sum(r is None or r > 1 for r in ratios)
    return found


def _loss(figures: Mapping[str, Any]) -> float:
    return math.inf if figures["final_loss"] is None else float(figures["final_loss"])


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def show(console: Console, name: str, results: Mapping[str, Any]) -> None:
    """Print a table for each length and the shares of tasks won."""
    for horizon, part in results.items():
        table = Table(title=f"Final loss, {name} tasks, {horizon} steps")
        columns = [*LEARNED, *(f"{n} (i)" for n in BASELINES), "Adam (ii)", "best (ii)"]
        for column in ("task", *columns):
            table.add_column(column)
        for row in part["tasks"]:
            of = row["contenders"]
            best = min(_loss(of[n]) for n in of if n.endswith("(ii)"))
            cells = [f"{_loss(of[column]):.2g}" for column in columns[:-1]]
            table.add_row(row["task"], *cells, f"{best:.2g}")
        means = part["interquartile_mean"]
        table.add_row("interquartile mean", *(f"{means[column]:.3f}" for column in columns[:-1]), "")
        console.print(table)
        for learned in LEARNED:
            beats = part["beats"][learned]
            shares = ", ".join(
                f"{n} {beats[n]:.0%}" for n in ("every (i)", "Adam (i)", "AdamW, cosine (i)", "Adam (ii)")
            )
            console.print(f"{learned} beats {shares}; worse than start on {part['worse_than_start'][learned]}")


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Profile: share of tasks whose normalised loss is at most x, a panel for each length."""
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(13, 4), sharey=True, constrained_layout=True)
    for panel, (horizon, part) in zip(panels, results.items(), strict=True):
        for name in [*LEARNED, *(f"{n} (i)" for n in BASELINES), "Adam (ii)"]:
            values = np.sort([row["contenders"][name]["normalised"] for row in part["tasks"]])
            shares = np.arange(1, len(values) + 1) / len(values)
            style = {"linewidth": 2.5} if name in LEARNED else {"linewidth": 1.2, "alpha": 0.8}
            panel.step(np.r_[0, values], np.r_[0, shares], where="post", label=name, **style)
        panel.set(title=f"{horizon} steps", xlabel="normalised final loss (0: lowest, 1: start)")
    panels[0].set_ylabel("share of tasks")
    panels[-1].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)
