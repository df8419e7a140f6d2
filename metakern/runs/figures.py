"""Figures of runs, as PNG files."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metakern.core.files import write_whole
from metakern.core.requirements import required
from metakern.evaluation.adaptation import Adaptation, Fits, mean_interval

if TYPE_CHECKING:
    from metakern.evaluation.optimizers import Curve

with required():
    import matplotlib

    matplotlib.use("Agg")  # needs no display

    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

Line = Mapping[str, Any]

#: Measures that figures show, if present.
MEASURES = ("loss", "accuracy")

# Distinguishable for colour-blind readers (Okabe and Ito); the learned optimizer takes the first.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")


#: Upper limit of the loss axis of :func:`plot_curves`, relative to the initial losses; diverging curves leave it.
HEADROOM = 3.0

#: Losses are clamped to this range for drawing.
LEAST, MOST = 1e-12, 1e30

#: The loss axis is logarithmic if the largest value exceeds the smallest by more than this factor.
DECADE = 10.0


def plot_curves(curves: Sequence[Curve], path: Path, word: str = "networks") -> None:
    """Plot training loss by step on a logarithmic axis: the median problem, with the 10 to 90 % range shaded.

    Args:
        curves: the first one is highlighted
        path: of the PNG
        word: name for the problems
    """
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for curve, colour in zip(curves, itertools.cycle(COLOURS), strict=False):
        losses = curve.losses.nan_to_num(nan=MOST).clamp(LEAST, MOST)
        label = curve.name if curve.lr is None else f"{curve.name} (lr {curve.lr:.3g})"
        width = 2.4 if curve.lr is None else 1.4
        axes.plot(losses.median(1).values, color=colour, label=label, linewidth=width)
        axes.fill_between(
            range(len(losses)), losses.quantile(0.1, dim=1), losses.quantile(0.9, dim=1), color=colour, alpha=0.15
        )
    axes.set(xlabel="step", ylabel=f"training loss: median, 10 to 90 % of {word}", yscale="log")
    start = max(curve.losses[0].nan_to_num(nan=MOST).clamp(LEAST, MOST).quantile(0.9).item() for curve in curves)
    axes.set_ylim(top=min(axes.get_ylim()[1], HEADROOM * start))
    _log_ticks(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_title(f"{curves[0].losses.shape[1]} unseen {word}, the same for all", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_learning(
    iterations: Sequence[Line],
    evaluations: Sequence[Line],
    path: Path,
    word: str = "iteration",
    chance: float | None = None,
) -> None:
    """Plot a training run: loss of training and validation tasks, and accuracy below if there are classes.

    Args:
        iterations: lines of metrics.jsonl, at least one, see :func:`metakern.runs.read_metrics`
        evaluations: evaluation lines of metrics.jsonl
        path: of the PNG
        word: name for an iteration
        chance: accuracy of guessing, drawn as a line
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
        seen = _points(validation, name)
        axes.plot(*seen, color=COLOURS[0], marker="o", markersize=3, label="validation tasks")
        _measure_axis(axes, name, [*y, *seen[1]], chance)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    panels[-1, 0].set_xlabel(word)
    panels[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    _save(figure, path)


def plot_validation(
    runs: Mapping[str, Sequence[Line]], path: Path, word: str = "iteration", chance: float | None = None
) -> None:
    """Plot validation measures of several runs during training.

    Args:
        runs: evaluation lines of each run's metrics.jsonl, by the run's name, see :func:`metakern.runs.read_metrics`;
            at least one line in all
        path: of the PNG
        word: name for an iteration
        chance: accuracy of guessing, drawn as a line
    """
    seen = {name: [(line["iteration"], line["evaluation"]) for line in lines] for name, lines in runs.items()}
    measures = [key for key in MEASURES if any(key in line for lines in seen.values() for _, line in lines)]
    size = (5 * len(measures) + 1, 4)
    figure, panels = plt.subplots(1, len(measures), figsize=size, layout="constrained", squeeze=False)
    for name, axes in zip(measures, panels[0], strict=True):
        drawn: list[float] = []
        for (run, lines), colour in zip(seen.items(), itertools.cycle(COLOURS), strict=False):
            x, y = _points(lines, name)
            axes.plot(x, y, color=colour, marker="o", markersize=3, label=run)
            drawn += y
        _measure_axis(axes, name, drawn, chance)
        axes.set(xlabel=word, ylabel=f"{name} of validation tasks")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.3)
    panels[0, -1].legend(frameon=False)
    _save(figure, path)


def plot_adaptation(adaptations: Sequence[Adaptation], path: Path) -> None:
    """Plot measures on unseen tasks by inner step: the mean over tasks, with its 95 % interval shaded."""
    measures = [key for key in MEASURES if key in adaptations[0].measures]
    figure, panels = plt.subplots(
        1, len(measures), figsize=(5 * len(measures) + 1, 4), layout="constrained", squeeze=False
    )
    for name, axes in zip(measures, panels[0], strict=True):
        drawn: list[float] = []
        for adaptation, colour in zip(adaptations, itertools.cycle(COLOURS), strict=False):
            mean, half = mean_interval(adaptation.measures[name])
            steps = range(len(mean))
            axes.plot(steps, mean, color=colour, marker="o", label=adaptation.name)
            axes.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.2)
            drawn += mean.tolist()
        _measure_axis(axes, name, drawn, adaptations[0].chance)
        axes.set(xlabel="inner steps", ylabel=f"{name} of the query sets")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.3)
    panels[0, -1].legend(frameon=False)
    figure.suptitle(f"{adaptations[0].num_tasks} unseen tasks: mean and 95 % interval", fontsize=11)
    _save(figure, path)


def plot_fits(fits: Fits, path: Path) -> None:
    """Plot the fits of learners to regression tasks: one row per learner, one column per task.

    Shows support and query points, and the predicted curve before and after adaptation.
    """
    rows, columns = len(fits.names), len(fits.titles)
    size = (3 * columns + 0.4, 2.5 * rows + 0.7)
    figure, panels = plt.subplots(
        rows, columns, figsize=size, layout="constrained", sharex=True, sharey="col", squeeze=False
    )
    batch = fits.batch
    after = f"after {fits.steps[0]} steps" if len(set(fits.steps)) == 1 else "after adaptation"
    for row, name in enumerate(fits.names):
        for column, title in enumerate(fits.titles):
            axes = panels[row, column]
            dots = {"linestyle": "none", "markersize": 4}
            for x, y, style in (
                (batch.query_x, batch.query_y, {"marker": "o", "color": "0.6", "label": "query points"}),
                (batch.support_x, batch.support_y, {"marker": "s", "color": "black", "label": "support points"}),
            ):
                axes.plot(x[column].flatten().cpu(), y[column].flatten().cpu(), **style, **dots)
            line = {"color": COLOURS[row % len(COLOURS)]}
            axes.plot(fits.x, fits.before[row][column], **line, linestyle=":", label="before adaptation")
            axes.plot(fits.x, fits.after[row][column], **line, linewidth=2, label=after)
            axes.set_title(f"{title}: MSE {fits.errors[row][column]:.2g}", fontsize=10)
            axes.grid(alpha=0.3)
        panels[row, 0].set_ylabel(name)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    lines = [Line2D([], [], color="0.3", linestyle=each.get_linestyle()) for each in handles[2:]]  # neutral grey
    handles = [*handles[:2], *lines]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    _save(figure, path)


#: Markers for the true modes in a cluster map.
MARKERS = "os^Dvp*X"


def plot_clusters(
    embeddings: Tensor, clusters: Tensor, modes: Tensor | None, path: Path, names: Sequence[str] = ()
) -> None:
    """Plot tasks by the first two principal components of their embeddings, coloured by cluster.

    Args:
        embeddings: [T, D]
        clusters: [T], integers
        modes: [T], integers: the tasks' true modes, shown by marker shape; or None
        path: of the PNG
        names: of the modes; further modes are numbered
    """
    points = principal_components(embeddings)
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    kinds = torch.zeros_like(clusters) if modes is None else modes
    colours = _colours(int(clusters.max()) + 1)
    for mode in kinds.unique().tolist():
        for cluster in clusters.unique().tolist():
            chosen = points[(kinds == mode) & (clusters == cluster)]
            mark = MARKERS[mode % len(MARKERS)]
            axes.scatter(chosen[:, 0], chosen[:, 1], s=18, alpha=0.7, linewidths=0, color=colours[cluster], marker=mark)
    for cluster in clusters.unique().tolist():
        share = (clusters == cluster).float().mean()
        axes.scatter([], [], color=colours[cluster], label=f"cluster {cluster}: {share:.0%}")
    if modes is not None:
        for mode in modes.unique().tolist():
            name = names[mode] if mode < len(names) else f"mode {mode}"
            axes.scatter([], [], color="grey", marker=MARKERS[mode % len(MARKERS)], label=name)
    axes.set(xlabel="first principal component", ylabel="second")
    axes.set_title(f"{len(points)} tasks", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the points
    _save(figure, path)


def _colours(count: int) -> list[Any]:
    """``count`` distinguishable colours: :data:`COLOURS` if there are enough, else a larger palette."""
    return list(COLOURS) if count <= len(COLOURS) else [plt.get_cmap("tab20")(k % 20) for k in range(count)]


def principal_components(embeddings: Tensor) -> Tensor:
    """The first two principal components [T, 2] of embeddings [T, D]; zeros where D is 1."""
    with required():
        from sklearn.decomposition import PCA

    flat = embeddings.detach().flatten(1).double()
    count = min(2, *flat.shape)
    points = torch.from_numpy(PCA(count, svd_solver="full").fit_transform(flat.numpy()))
    return torch.nn.functional.pad(points, (0, 2 - count))


def _points(lines: Sequence[tuple[int, Line]], name: str) -> tuple[list[int], list[float]]:
    """Iterations and values of a measure, without missing or non-finite ones."""
    known = [(iteration, line[name]) for iteration, line in lines if line.get(name) is not None]
    return [iteration for iteration, _ in known], [value for _, value in known]


def _measure_axis(axes: Axes, name: str, values: Sequence[float], chance: float | None) -> None:
    """Scale and ticks for a measure: accuracy in percent, with chance; losses of wide range logarithmic."""
    if name == "accuracy":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        if chance is not None:
            axes.axhline(chance, color="0.5", linestyle="--", linewidth=1, label=f"chance, {100 * chance:.3g} %")
    elif values and min(values) > 0 and max(values) > DECADE * min(values):
        axes.set_yscale("log")
        _log_ticks(axes)


def _log_ticks(axes: Axes) -> None:
    """Ticks of a logarithmic axis: at 1, 2 and 5 times powers of ten if it is short, at powers of ten if it is long.

    On a short axis matplotlib labels its own ticks as powers of ten, which are hard to read.
    """
    low, high = axes.get_ylim()
    if high / low < 1000:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _tick(value: float) -> str:
    return f"{value:g}" if 1e-4 < value < 1e5 else f"$10^{{{math.log10(value):.0f}}}$"


def _save(figure: Figure, path: Path) -> None:
    """Save a figure; it is drawn in memory first, so that a full disk leaves the old file intact."""
    content = io.BytesIO()
    try:
        figure.savefig(content, format="png", dpi=150)
    finally:
        plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())
