"""Draws the pictures of these pages, each in a light and a dark version, from bench/results or by hand.

python docs/scripts/pictures.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

ROOT = Path(__file__).parent.parent.parent
PICTURES = ROOT / "docs" / "pictures"
RESULTS = ROOT / "bench" / "results"

#: Colours of lines that are told apart on white and on dark ground, also by the colour-blind (Okabe and Ito).
LINES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")
THEMES = {"light": ("#ffffff", "#222222", "#d7dce2"), "dark": ("#1e2129", "#e2e4e9", "#4a4f5c")}


def arrow(ax: Axes, begin: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
    """An arrow in the text's colour unless ``style`` says otherwise."""
    style = {"arrowstyle": "-|>", "mutation_scale": 13, "color": plt.rcParams["text.color"], "lw": 1.4} | style
    ax.add_patch(FancyArrowPatch(begin, end, shrinkA=2, shrinkB=2, **style))


def bare(ax: Axes, width: float, height: float) -> None:
    """Axes for a drawing: no frame, equal units."""
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")


def inner_loop(figure: Figure) -> None:
    """From one initialisation, K steps for every task, a query loss each, and the gradient back."""
    ax = figure.subplots()
    ax.set(xlim=(0, 12), ylim=(-1.1, 6.2), aspect="equal")
    ax.axis("off")
    ax.text(0.9, 3.1, "θ", ha="center", va="center", fontsize=22)
    ax.text(0.9, 2.3, "initialisation", ha="center", va="center")
    for task, (y, colour) in enumerate(zip((5, 3.1, 1.2), LINES, strict=False)):
        points = [(3.2, y), (5.2, y), (7.2, y)]
        arrow(ax, (1.4, 3.1 + 0.12 * (1 - task)), points[0], color=colour)
        for step, (x, _) in enumerate(points):
            ax.plot(x, y, "o", ms=11, color=colour)
            ax.text(x, y + 0.42, f"θ$_{{{step + 1}}}$", ha="center")
        for left, right in pairwise(points):
            arrow(ax, (left[0] + 0.2, y), (right[0] - 0.2, y), color=colour)
        arrow(ax, (7.4, y), (9.1, y), color=colour)
        ax.text(9.3, y, f"query loss of task {task + 1}", va="center")
    ax.text(5.2, 5.95, "K gradient steps on the support set", ha="center")
    arrow(ax, (10.3, 0.8), (0.9, 2.0), connectionstyle="arc3,rad=-0.3", ls="--")
    ax.text(5.6, -1.0, "meta-gradient: through all steps, to second order", ha="center")


def lanes(figure: Figure) -> None:
    """Tasks in the lanes of vector registers, and in the blocks of a GPU."""
    left, right = figure.subplots(1, 2)
    bare(left, 9.4, 6)
    bare(right, 9.4, 6)
    left.text(4.7, 5.6, "CPU: a task in every SIMD lane", ha="center", fontsize=12)
    edge, shades = plt.rcParams["text.color"], matplotlib.colormaps["viridis"](np.linspace(0.5, 1, 8))
    for row, name in enumerate(("weight 1", "weight 2", "weight 3")):
        y = 3.7 - 1.2 * row
        left.text(1.3, y + 0.4, name, ha="right", va="center")
        for lane in range(8):
            colour = shades[lane]
            left.add_patch(Rectangle((1.5 + 0.95 * lane, y), 0.9, 0.8, fc=colour, ec=edge, alpha=0.85))
    for lane in range(8):
        left.text(1.95 + 0.95 * lane, 4.75, f"task {lane + 1}", ha="center", fontsize=8)
    left.text(4.9, 0.4, "one instruction: the same weight of 8 tasks (AVX2)", ha="center")
    right.text(4.7, 5.6, "GPU: a task in every block", ha="center", fontsize=12)
    for block in range(6):
        x, y = 0.5 + 3 * (block % 3), 3 - 2.1 * (block // 3)
        right.add_patch(Rectangle((x, y), 2.5, 1.8, fc=shades[block], ec=edge, alpha=0.85))
        right.text(x + 1.25, y + 1.2, f"task {block + 1}", ha="center", color="black")
        right.text(x + 1.25, y + 0.3, "shared memory:\nall its weights", ha="center", color="black", fontsize=8)
    right.text(4.7, 0.3, "all K steps without leaving the block", ha="center")


def clusters(figure: Figure) -> None:
    """Tasks in the plane with a learner for each cluster, and validation curves of bench/results/clusters.json."""
    plane, curves = figure.subplots(1, 2)
    generator = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [3.0, 0.6], [1.4, 2.6]])
    for centre, colour in zip(centres, LINES, strict=False):
        tasks = centre + 0.45 * generator.standard_normal((40, 2))
        plane.scatter(*tasks.T, s=12, color=colour, alpha=0.7)
        plane.plot(*centre, "*", ms=19, color=colour, mec=plt.rcParams["text.color"])
    plane.plot(*centres.mean(0), "X", ms=12, color=plt.rcParams["text.color"])
    plane.annotate("one learner for all", centres.mean(0), (0.55, 1.42), fontsize=9, ha="center")
    plane.set(xticks=[], yticks=[], xlabel="gradients of the support set, projected")
    plane.set_title("Sketch: a learner (★) for each cluster")
    found = next(iter(json.loads((RESULTS / "clusters.json").read_text())["problems"].values()))
    shown = {"MAML": "MAML, uniform sampler", "12 clusters": "12 clusters, by least loss"}
    ways = {way["title"]: way for way in found["ways"].values()}
    for (label, title), colour in zip(shown.items(), LINES, strict=False):
        way = ways[title]
        means = [point["mean"] for point in way["curve"]]
        curves.plot(way["curve_iterations"], means, color=colour, label=label)
    curves.set(xlabel="meta-iterations", ylabel="validation MSE", title=found["settings"]["title"], ylim=(0, None))
    curves.legend()


def speed(figure: Figure) -> None:
    """Time per coordinate of lstm_step against the number of coordinates, with the floor."""
    results = json.loads((RESULTS / "amd-epyc-2-threads-avx512.json").read_text())
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"forward": "forward", "forward_backward": "forward + backward"}
    for ax, (op, title) in zip(panels, titles.items(), strict=True):
        cells = [cell for cell in results["cells"] if cell["op"] == op]
        n = [cell["n"] for cell in cells]
        for name, colour in zip(("metakern", "compiled", "eager"), LINES, strict=False):
            times = [cell["contenders"][name]["ns_per_coordinate"] for cell in cells]
            ax.plot(n, times, "o-", color=colour, label=name)
        ax.plot(n, [cell["fma_floor_ns"] for cell in cells], "--", color=plt.rcParams["text.color"], label="FMA floor")
        ax.set(xscale="log", yscale="log", xlabel="coordinates", title=title)
    panels[0].set_ylabel("nanoseconds per coordinate and step")
    panels[1].legend(loc="upper left", bbox_to_anchor=(1.02, 1))


def memory(figure: Figure) -> None:
    """Peak memory against the number of inner steps."""
    results = json.loads((RESULTS / "memory-steps.json").read_text())
    ax = figure.subplots()
    for (name, peaks), colour in zip(results["peak_bytes"].items(), LINES, strict=True):
        steps = [int(steps) for steps in peaks]
        ax.plot(steps, [peak / 2**20 for peak in peaks.values()], "o-", color=colour, label=name)
    ax.set(xscale="log", yscale="log", xlabel="inner steps K", ylabel="peak memory, MiB", title=results["case"])
    ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1))


DRAWN: dict[str, tuple[Callable[[Figure], None], tuple[float, float]]] = {
    "inner-loop": (inner_loop, (8.5, 4.4)),
    "lanes": (lanes, (9.5, 3.4)),
    "clusters": (clusters, (9.5, 3.8)),
    "speed": (speed, (9.5, 3.6)),
    "memory": (memory, (7.5, 3.8)),
}


def style(theme: str) -> dict[str, Any]:
    """Matplotlib's settings of a theme. Text stays text, in the reader's own sans serif."""
    ground, ink, grid = THEMES[theme]
    of_ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(of_ink, ink), **dict.fromkeys(("figure.facecolor", "axes.facecolor"), ground),
        "grid.color": grid, "axes.grid": True, "axes.axisbelow": True, "font.size": 10, "legend.frameon": False,
        "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "metakern",
    }  # fmt: skip


def draw(folder: Path = PICTURES, kind: str = "svg") -> None:
    """Draw all pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (draw_one, size) in DRAWN.items():
        if name == "memory" and not (RESULTS / "memory-steps.json").exists():
            continue  # python -m bench.memory_steps has not run yet
        for theme in THEMES:
            with plt.rc_context(style(theme)):
                figure = plt.figure(figsize=size, layout="constrained")
                draw_one(figure)
                metadata = {"Date": None} if kind == "svg" else {}
                figure.savefig(folder / f"{name}-{theme}.{kind}", metadata=metadata, dpi=110)
                plt.close(figure)


if __name__ == "__main__":
    draw()
