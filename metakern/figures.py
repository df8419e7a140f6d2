"""Pictures of runs, as PNG files."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")  # no display is needed or touched

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metakern.adaptation import Adaptation, mean_interval
from metakern.evaluation import Curve
from metakern.runs.folder import write_bytes

Line = Mapping[str, Any]

#: What figures show of tasks, where it is measured.
MEASURES = ("loss", "accuracy")

# Distinguishable for colour-blind readers (Okabe and Ito); the learned optimizer takes the first.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")


def plot_curves(curves: Sequence[Curve], path: Path) -> None:
    """Training loss by step on a logarithmic axis: the median network, 10 to 90 % of them shaded."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for curve, colour in zip(curves, itertools.cycle(COLOURS), strict=False):
        losses = curve.losses.clamp(min=1e-12)
        label = curve.name if curve.lr is None else f"{curve.name} (lr {curve.lr:.3g})"
        width = 2.4 if curve.lr is None else 1.4
        axes.plot(losses.median(1).values, color=colour, label=label, linewidth=width)
        axes.fill_between(
            range(len(losses)), losses.quantile(0.1, dim=1), losses.quantile(0.9, dim=1), color=colour, alpha=0.15
        )
    axes.set(xlabel="step", ylabel="training loss: median, 10 to 90 % of networks", yscale="log")
    axes.set_title(f"{curves[0].losses.shape[1]} unseen networks, same minibatches for all", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_learning(iterations: Sequence[Line], evaluations: Sequence[Line], path: Path, word: str = "iteration") -> None:
    """A training run: loss of training and validation tasks, and accuracy below where there are classes.

    Args:
        iterations: lines of metrics.jsonl, at least one, see :func:`metakern.runs.read_metrics`
        evaluations: lines of it too
        path: of the PNG
        word: what an iteration is called
    """
    training = [(line["iteration"], line) for line in iterations]
    validation = [(line["iteration"], line["evaluation"]) for line in evaluations]
    measures = [key for key in MEASURES if any(key in line for _, line in training + validation)]
    figure, panels = plt.subplots(
        len(measures), 1, figsize=(7, 3.2 * len(measures)), layout="constrained", sharex=True, squeeze=False
    )
    for name, axes in zip(measures, panels[:, 0], strict=True):
        x, y = _points(training, name)
        if y:
            axes.plot(x, y, color=COLOURS[4], linewidth=0.8, alpha=0.5, label="training tasks")
        window = len(y) // 50
        if window > 1:
            smooth = torch.tensor(y).unfold(0, window, 1).mean(1)
            axes.plot(x[window - 1 :], smooth, color=COLOURS[1], label=f"their mean over {window} {word}s")
        axes.plot(*_points(validation, name), color=COLOURS[0], marker="o", markersize=3, label="validation tasks")
        positive = bool(y) and min(y) > 0
        axes.set(ylabel=name, yscale="log" if name == "loss" and positive else "linear")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    panels[-1, 0].set(xlabel=word)
    _save(figure, path)


def plot_adaptation(adaptations: Sequence[Adaptation], path: Path) -> None:
    """What learners make of unseen tasks, by inner step: the mean over tasks, its 95 % interval shaded."""
    measures = [key for key in MEASURES if key in adaptations[0].measures]
    figure, panels = plt.subplots(
        1, len(measures), figsize=(5 * len(measures) + 1, 4), layout="constrained", squeeze=False
    )
    for name, axes in zip(measures, panels[0], strict=True):
        for adaptation, colour in zip(adaptations, itertools.cycle(COLOURS), strict=False):
            mean, half = mean_interval(adaptation.measures[name])
            steps = range(len(mean))
            axes.plot(steps, mean, color=colour, marker="o", label=adaptation.name)
            axes.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.2)
        axes.set(xlabel="inner steps", ylabel=f"{name} of the query sets")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    panels[0, 0].legend(frameon=False)
    figure.suptitle(f"{adaptations[0].num_tasks} unseen tasks: mean and 95 % interval", fontsize=11)
    _save(figure, path)


#: Marks of the true modes of a cluster map.
MARKERS = "os^Dvp*X"


def plot_clusters(embeddings: Tensor, clusters: Tensor, modes: Tensor | None, path: Path) -> None:
    """Tasks on the first two principal components of their embeddings, coloured by cluster.

    Args:
        embeddings: [T, D]
        clusters: [T], integers
        modes: [T], integers: what the tasks come from, shown by the shape of the marks; or None
        path: of the PNG
    """
    points = principal_components(embeddings)
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    kinds = torch.zeros_like(clusters) if modes is None else modes
    for mode in kinds.unique().tolist():
        for cluster in clusters.unique().tolist():
            chosen = points[(kinds == mode) & (clusters == cluster)]
            colour, mark = COLOURS[cluster % len(COLOURS)], MARKERS[mode % len(MARKERS)]
            axes.scatter(chosen[:, 0], chosen[:, 1], s=18, alpha=0.7, linewidths=0, color=colour, marker=mark)
    for cluster in clusters.unique().tolist():
        share = (clusters == cluster).float().mean()
        axes.scatter([], [], color=COLOURS[cluster % len(COLOURS)], label=f"cluster {cluster}: {share:.0%}")
    if modes is not None:
        for mode in modes.unique().tolist():
            axes.scatter([], [], color="grey", marker=MARKERS[mode % len(MARKERS)], label=f"mode {mode}")
    axes.set(xlabel="first principal component", ylabel="second")
    axes.set_title(f"{len(points)} tasks", fontsize=11)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def principal_components(embeddings: Tensor) -> Tensor:
    """The first two principal components [T, 2] of embeddings [T, D]; zeros where D is 1."""
    from sklearn.decomposition import PCA

    flat = embeddings.detach().flatten(1).double()
    count = min(2, *flat.shape)
    points = torch.from_numpy(PCA(count, svd_solver="full").fit_transform(flat.numpy()))
    return torch.nn.functional.pad(points, (0, 2 - count))


def _points(lines: Sequence[tuple[int, Line]], name: str) -> tuple[list[int], list[float]]:
    """Iterations and values, without those that were not finite."""
    known = [(iteration, line[name]) for iteration, line in lines if line.get(name) is not None]
    return [iteration for iteration, _ in known], [value for _, value in known]


def _save(figure: Figure, path: Path) -> None:
    """Draw to memory first: a full disk leaves the picture from before."""
    content = io.BytesIO()
    try:
        figure.savefig(content, format="png", dpi=150)
    finally:
        plt.close(figure)
    write_bytes(path, content.getvalue())
