"""Joins the parts in build/paper to bench/results/paper.json, with the targets, and draws the figure.

python -m bench.paper.report
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib import pyplot as plt
from rich.console import Console

from bench.paper import test_tasks
from bench.paper.learning import REPORTED, WAYS, Plan
from bench.paper.tables import CAPABILITY_TITLES, RULE_TITLES, SLOWER, TIMED
from bench.paper.timing import PARTS
from bench.runs import RESULTS, describe_run, show_targets, write
from bench.targets import judged
from bench.train_sinusoid import summary
from metakern.runs.figures import COLOURS

#: The speed-up that arXiv 2110.14459 reports, and the aims.
PAPER, AIM, AIM_BATCHED = 3.73, 15.0, 3.0

#: Instruction sets in the order of tables.
CAPABILITIES = ("avx512", "avx2", "baseline")


def gathered(parts: Path, plan: Plan) -> dict[str, Any]:
    """Times by instruction set, learning by rule and way, as far as there are files."""
    files = {name: parts / f"timing-{name}.json" for name in CAPABILITIES}
    times = {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}
    learning = {}
    for rule in ("lstm", "hrnn"):
        runs = {way: _runs(parts / "curves", rule, way, plan) for way in REPORTED}
        if all(runs.values()):
            learning[rule] = learned(runs)
    derived = seconds_by_way(times, learning)
    return {"times": times, "learning": learning, "derived_seconds": derived, "tried": tried(parts / "curves")}


def tried(folder: Path) -> list[dict[str, Any]]:
    """Validation figures of every run there is, also of ways that are not in the table."""
    names = ("rule", "way", "seed", "curve", "clusters_by_kind", "scales")
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [{name: run[name] for name in names if name in run} for run in runs]


def seconds_by_way(times: dict[str, Any], learning: dict[str, Any]) -> dict[str, Any]:
    """Derived: processor seconds of one rule to its last meta-loss, times the ratio of a meta-iteration's seconds.

    Every way takes the same steps, so its curve by iterations is metakern's.
    """
    derived: dict[str, Any] = {}
    for capability, of in times.items():
        for rule, entry in of["rules"].items():
            if rule in learning:
                seconds = learning[rule]["ways"]["plain"]["seconds"]["mean"]
                ratios = {
                    name: ratio["median"] for name, ratio in entry["speedup"].items() if name != "metakern, clusters"
                }
                own = {name: seconds * ratio for name, ratio in {"metakern": 1.0, **ratios}.items()}
                derived.setdefault(capability, {})[rule] = own
    return derived


def _runs(folder: Path, rule: str, way: str, plan: Plan) -> list[dict[str, Any]]:
    """The runs of all seeds; none if one is missing."""
    paths = [folder / f"{rule}-{way}-{seed}.json" for seed in range(plan.seeds)]
    return [json.loads(path.read_text()) for path in paths] if all(path.exists() for path in paths) else []


def learned(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Every way's final meta-losses, curve, and when it reaches where the first way ends on validation tasks."""
    found = {}
    first = runs[REPORTED[0]]
    goals = [run["curve"][-1]["loss"] for run in first]
    for way, of in runs.items():
        found[way] = {
            "title": WAYS[way].title,
            "test": summary([run["test"]["loss"] for run in of]),
            "test_final": summary([run["test"]["final"] for run in of]),
            "valid": summary([run["curve"][-1]["loss"] for run in of]),
            "difference": summary([a["test"]["loss"] - b["test"]["loss"] for a, b in zip(of, first, strict=True)]),
            "seconds": summary([run["seconds"] for run in of]),
            "reaches": [reached(run, goal) for run, goal in zip(of, goals, strict=True)],
            "iterations": [point["iteration"] for point in of[0]["curve"]],
            "curve": [summary([p["loss"] for p in points]) for points in zip(*(r["curve"] for r in of), strict=True)],
        }
        for key in ("clusters_by_kind", "scales"):
            if key in of[0]:
                found[way][key] = [run[key] for run in of]
    return {"goal": summary(goals), "ways": found}


def reached(run: dict[str, Any], goal: float) -> dict[str, float] | None:
    """The first point of a run's curve at or below a meta-loss, with its iterations, their share, and seconds."""
    last = run["curve"][-1]["iteration"]
    for point in run["curve"]:
        if point["loss"] <= goal:
            share = point["iteration"] / last
            return {"iterations": point["iteration"], "share": share, "seconds": point["seconds"]}
    return None


def judge(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets of speed for each instruction set, and of clusters for each rule."""
    targets = []
    for capability, times in found["times"].items():
        for rule, entry in times["rules"].items():
            speedup, of = entry["speedup"], f"{rule}, {capability}"
            sequential = speedup["sequential"]["median"]
            targets.append(judged("must", f"against sequential, {of}", "≥", PAPER, sequential, "x"))
            targets.append(judged("aim", f"against sequential, {of}", "≥", AIM, sequential, "x"))
            best = min(speedup[name]["median"] for name in SLOWER if name in speedup)
            both = all(name in speedup for name in SLOWER)
            peer = "the better of vmap and torch.compile" if both else "vmap, torch.compile not measured"
            targets.append(judged("must", f"against {peer}, {of}", ">", 1.0, best, "x"))
            targets.append(judged("aim", f"against {peer}, {of}", "≥", AIM_BATCHED, best, "x"))
    for rule, entry in found["learning"].items():
        ways = entry["ways"]
        one, ours = ways["plain"], ways["scales"]
        shares = [of["share"] for of in ours["reaches"] if of is not None]
        share = sum(shares) / len(shares) if len(shares) == len(ours["reaches"]) else None
        name = f"{rule}, clusters: share of the iterations of one rule to its last meta-loss"
        targets.append(judged("must", name, "≤", 0.5, share))
        gap = one["test"]["low"] - ours["test"]["high"]
        targets.append(judged("must", f"{rule}, clusters: gap between the intervals of the test", ">", 0.0, gap))
    return targets


def plot(found: dict[str, Any], path: Path) -> None:
    """Above the meta-iterations' seconds of every way, below the curves of every rule."""
    times, learning = found["times"], found["learning"]
    columns = max(1, len(learning), len(times))
    height = 4 * (1 + bool(learning))
    shape = 1 + bool(learning), columns
    figure, rows = plt.subplots(*shape, figsize=(5.4 * columns, height), layout="constrained", squeeze=False)
    for axes, (capability, of) in zip(rows[0], times.items(), strict=False):
        for at, name in enumerate(TIMED):  # a way has one colour in all parts
            found_in = {place: e["contenders"].get(name) for place, e in enumerate(of["rules"].values())}
            seconds = {place + at * 0.16: cell["median_s"] for place, cell in found_in.items() if cell}
            bars = axes.bar(list(seconds), list(seconds.values()), 0.15, color=COLOURS[at], label=name)
            axes.bar_label(bars, fmt="%.2f", fontsize=7)
        axes.set_title(f"seconds of a meta-iteration, {CAPABILITY_TITLES[capability]}", fontsize=11)
        axes.set_xticks([0.32, 1.32][: len(of["rules"])], [RULE_TITLES[rule] for rule in of["rules"]])
        axes.set_ylabel("seconds")
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(TIMED), frameon=False, fontsize=8)
    for axes, (rule, entry) in zip(rows[-1], learning.items(), strict=False):
        for (_, way), colour in zip(entry["ways"].items(), COLOURS, strict=False):
            mean, low, high = ([point[key] for point in way["curve"]] for key in ("mean", "low", "high"))
            axes.plot(way["iterations"], mean, color=colour, label=way["title"])
            axes.fill_between(way["iterations"], low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel="meta-iteration", ylabel="validation meta-loss")
        axes.set_title(f"{RULE_TITLES[rule]}: mean and 95 % interval over seeds", fontsize=11)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    for axes in rows.flatten():
        if not axes.has_data():
            axes.set_axis_off()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(
    parts: Annotated[Path, typer.Option(help="Folder of the parts.")] = PARTS,
    output: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "paper.json",
    figure: Annotated[Path, typer.Option(help="Picture to write.")] = RESULTS / "paper.png",
) -> None:
    """Join what was measured."""
    console = Console()
    plan = Plan()
    found = gathered(parts, plan)
    if not found["times"] and not found["learning"]:
        console.print(f"nothing was measured yet in {parts}: run python -m bench.paper.timing and bench.paper.curves")
        raise typer.Exit(1)
    settings = {
        "seeds": plan.seeds,
        "iterations": plan.iterations,
        "tasks": plan.tasks,
        "steps": plan.steps,
        "unroll": plan.unroll,
        "outer_lr": dict(plan.outer_lr),
        "test_networks": list(test_tasks.NETWORKS),
        "test_tasks": len(test_tasks.NETWORKS) * test_tasks.TASKS,
        "interval": "Student's t over the seeds, 95 %",
    }
    results = describe_run("paper", "bench.paper.report") | settings | found
    results["targets"] = judge(results)
    show_targets(results["targets"], console)
    write(results, output, console)
    plot(results, figure)


if __name__ == "__main__":
    typer.run(main)
