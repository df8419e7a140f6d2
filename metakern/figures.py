"""Pictures of runs, as PNG files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed or touched

from matplotlib import pyplot as plt

from metakern.evaluation import Curve
from metakern.trainer import History

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
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_training(history: History, path: Path) -> None:
    """Meta-training: validation loss after the last inner step, by episode."""
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot(
        range(1, len(history.episodes) + 1),
        [episode.loss for episode in history.episodes],
        color=COLOURS[4],
        linewidth=1,
        label="training networks, last minibatch",
    )
    axes.plot(
        *zip(*history.evaluations, strict=True), color=COLOURS[0], marker="o", label="validation networks, all data"
    )
    axes.set(xlabel="episode", ylabel="loss after the last step", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
