"""Figures: the files open as pictures and show something in each of their axes."""

import math
import resource

import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.image import imread

from metakern.evaluation import Curve
from metakern.evaluation.adaptation import Adaptation, fit_tasks
from metakern.learners import MAMLLearner
from metakern.models import mlp
from metakern.runs.figures import (
    plot_adaptation,
    plot_clusters,
    plot_curves,
    plot_fits,
    plot_learning,
    plot_validation,
    principal_components,
)
from metakern.tasks import mixture


@pytest.fixture
def boxes(monkeypatch):
    """Where the axes of every figure lie that is saved and closed, as shares of its height and width from the top."""
    found = []
    close = plt.close

    def note(figure):
        for axes in figure.axes:
            box = axes.get_position()
            found.append((axes, (1 - box.y1, 1 - box.y0, box.x0, box.x1)))
        close(figure)

    monkeypatch.setattr(plt, "close", note)
    return found


def coloured_shares(path, boxes) -> list[float]:
    """Share of the pixels of every axes of a PNG that are neither grey nor white: lines, marks and shades."""
    pixels = imread(path)[..., :3]
    height, width = pixels.shape[:2]
    shares = []
    for _, (top, bottom, left, right) in boxes:
        inside = pixels[int(top * height) : int(bottom * height), int(left * width) : int(right * width)]
        shares.append(float((inside.max(-1) - inside.min(-1) > 0.15).mean()))
    return shares


def lines(count: int, **measures) -> list[dict]:
    return [{"iteration": i + 1, "loss": 1 / (i + 1), **measures} for i in range(count)]


def evaluations(*iterations: int, **measures) -> list[dict]:
    return [{"iteration": i, "evaluation": {"loss": 2 / i, **measures}} for i in iterations]


def test_curves_are_drawn(tmp_path, boxes):
    losses = torch.rand(50, 8) + torch.linspace(2, 0.01, 50).unsqueeze(1)
    plot_curves([Curve("learned", losses), Curve("Adam", losses * 2, lr=0.1)], tmp_path / "curves.png")
    (share,) = coloured_shares(tmp_path / "curves.png", boxes)
    assert share > 0.01


def test_the_axis_keeps_to_the_start_where_an_optimizer_explodes(tmp_path, boxes):
    steps = torch.arange(30.0).unsqueeze(1).expand(30, 4)
    good, exploded = Curve("learned", 5 * 0.9**steps), Curve("SGD", 5 * 10 ** (0.8 * steps), lr=0.1)
    exploded.losses[20:] = torch.nan
    plot_curves([good, exploded], tmp_path / "curves.png", "functions")
    axes = boxes[0][0]
    assert axes.get_ylim()[1] == pytest.approx(15)
    assert axes.get_ylim()[0] < 5 * 0.9**29
    assert "functions" in axes.get_ylabel()
    assert axes.get_title() == "4 unseen functions, the same for all"


@pytest.mark.parametrize(("low", "high"), [(0.9, 1.4), (1.2, 1.9), (0.03, 0.4), (1.58, 42), (1e-7, 1e7)])
def test_no_axis_has_labels_that_a_person_must_multiply(low, high, tmp_path, boxes):
    losses = torch.logspace(math.log10(high), math.log10(low), 40, dtype=torch.float64).unsqueeze(1).expand(40, 3)
    plot_curves([Curve("learned", losses)], tmp_path / "curves.png")
    training = [{"iteration": k + 1, "loss": loss} for k, loss in enumerate(losses[:, 0].tolist())]
    plot_learning(training, [], tmp_path / "learning.png")
    plot_adaptation([Adaptation("plain", {"loss": losses})], tmp_path / "adaptation.png")
    for axes, _ in boxes:
        labels = [text.get_text() for text in (*axes.get_yticklabels(), *axes.get_yticklabels(minor=True))]
        shown = [label for label in labels if label]
        assert len(shown) >= 2
        assert not [label for label in shown if "times" in label or "×" in label or "e" in label]


@pytest.mark.parametrize("count", [2, 3, 4, 7, 40, 1500])
def test_iterations_and_steps_are_whole_numbers(count, tmp_path, boxes):
    plot_learning(lines(count), evaluations(count), tmp_path / "learning.png")
    plot_adaptation([Adaptation("plain", {"loss": torch.rand(count, 5)})], tmp_path / "adaptation.png")
    plot_curves([Curve("learned", torch.rand(count, 3))], tmp_path / "curves.png")
    for axes, _ in boxes:
        assert [tick for tick in axes.get_xticks() if tick != round(tick)] == []


def test_zero_losses_do_not_break_the_logarithmic_axis(tmp_path, boxes):
    plot_curves([Curve("learned", torch.zeros(5, 3))], tmp_path / "curves.png")
    (share,) = coloured_shares(tmp_path / "curves.png", boxes)
    assert share > 0.001


def test_learning_curves_of_regression_have_one_panel_and_a_logarithmic_loss(tmp_path, boxes):
    plot_learning(lines(200), evaluations(50, 100, 200), tmp_path / "figures" / "learning.png")
    (share,) = coloured_shares(tmp_path / "figures" / "learning.png", boxes)
    assert share > 0.005
    assert boxes[0][0].get_yscale() == "log"
    labels = [text.get_text() for text in boxes[0][0].get_legend().get_texts()]
    assert labels == ["training tasks", "their mean over 4 iterations", "validation tasks"]


def test_learning_curves_of_classes_have_the_accuracy_in_a_second_panel(tmp_path, boxes):
    plot_learning(lines(20), evaluations(10, 20, accuracy=0.5), tmp_path / "learning.png", "episode")
    shares = coloured_shares(tmp_path / "learning.png", boxes)
    assert len(shares) == 2
    assert min(shares) > 0.001
    assert [axes.get_ylabel() for axes, _ in boxes] == ["loss", "accuracy"]


def dashed(axes) -> list[float]:
    """Heights of dashed lines."""
    return [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]


def test_accuracies_have_the_level_of_chance_and_losses_have_not(tmp_path, boxes):
    plot_learning(lines(20), evaluations(10, 20, accuracy=0.5), tmp_path / "learning.png", chance=0.2)
    measures = {"loss": torch.rand(3, 9), "accuracy": torch.full((3, 9), 0.6)}
    plot_adaptation([Adaptation("plain", measures, 0.2)], tmp_path / "adaptation.png")
    for (loss, _), (accuracy, _) in (boxes[:2], boxes[2:]):
        assert dashed(loss) == []
        assert dashed(accuracy) == [0.2]
        assert accuracy.get_ylim()[0] < 0.2
        assert "chance, 20 %" in [text.get_text() for text in accuracy.get_legend().get_texts()]
        assert {text.get_text()[-2:] for text in accuracy.get_yticklabels()} == {" %"}


def test_losses_that_were_not_finite_leave_gaps(tmp_path, boxes):
    """metrics.jsonl holds null for them."""
    plot_learning([*lines(10), {"iteration": 11, "loss": None}], [], tmp_path / "learning.png")
    curve = boxes[0][0].lines[0]
    assert list(curve.get_xdata()) == list(range(1, 11))


def test_negative_losses_have_a_linear_axis(tmp_path, boxes):
    plot_learning([{"iteration": 1, "loss": -1.0}, {"iteration": 2, "loss": -2.0}], [], tmp_path / "learning.png")
    assert boxes[0][0].get_yscale() == "linear"


def test_runs_are_compared_while_they_trained(tmp_path, boxes):
    runs = {"plain": evaluations(10, 20, 30, accuracy=0.4), "clusters": evaluations(10, 20, 25, accuracy=0.7)}
    plot_validation(runs, tmp_path / "learning.png", chance=0.2)
    assert min(coloured_shares(tmp_path / "learning.png", boxes)) > 0.001
    (loss, _), (accuracy, _) = boxes
    assert [list(line.get_xdata()) for line in loss.lines] == [[10, 20, 30], [10, 20, 25]]
    assert list(loss.lines[1].get_ydata()) == [2 / 10, 2 / 20, 2 / 25]
    assert dashed(accuracy) == [0.2]
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["plain", "clusters", "chance, 20 %"]


def test_adaptation_has_a_panel_for_every_measure_and_a_line_for_every_learner(tmp_path, boxes):
    measures = {"loss": torch.rand(6, 30), "accuracy": torch.rand(6, 30)}
    learners = [Adaptation("plain", measures), Adaptation("clusters", measures)]
    plot_adaptation(learners, tmp_path / "adaptation.png")
    shares = coloured_shares(tmp_path / "adaptation.png", boxes)
    assert len(shares) == 2
    assert min(shares) > 0.005
    assert all(len(axes.lines) == 2 and len(axes.lines[0].get_xdata()) == 6 for axes, _ in boxes)


def test_a_cluster_map_shows_every_cluster_in_its_colour(tmp_path, boxes):
    clusters = torch.arange(3).repeat(20)
    embeddings = torch.nn.functional.one_hot(clusters, 3) * 4.0 + torch.rand(60, 3)
    plot_clusters(embeddings, clusters, clusters % 2, tmp_path / "clusters.png")
    (share,) = coloured_shares(tmp_path / "clusters.png", boxes)
    assert share > 0.002
    texts = [text.get_text() for text in boxes[0][0].get_legend().get_texts()]
    assert texts == ["cluster 0: 33%", "cluster 1: 33%", "cluster 2: 33%", "mode 0", "mode 1"]


def test_the_legend_of_a_cluster_map_lies_beside_the_points_and_names_the_modes(tmp_path, boxes):
    clusters = torch.arange(12).repeat(5)
    plot_clusters(torch.randn(60, 2), clusters, clusters % 2, tmp_path / "clusters.png", ["sinusoid", "linear"])
    axes = boxes[0][0]
    legend, box = axes.get_legend().get_window_extent(), axes.get_window_extent()
    assert legend.x0 >= box.x1
    assert legend.x1 <= axes.figure.bbox.x1
    assert legend.y0 >= axes.figure.bbox.y0
    assert [text.get_text() for text in axes.get_legend().get_texts()][-2:] == ["sinusoid", "linear"]
    colours = {tuple(each.get_facecolor()[0][:3]) for each in axes.collections if len(each.get_offsets())}
    assert len(colours) == 12


def test_fits_have_a_row_a_learner_and_a_column_a_task(tmp_path, boxes):
    learners = {name: MAMLLearner(mlp(1, 8, 1), steps=2, inner_lr=0.01) for name in ("plain", "clusters")}
    fits = fit_tasks(learners, mixture(3))
    plot_fits(fits, tmp_path / "fits.png")
    assert len(boxes) == 6
    assert min(coloured_shares(tmp_path / "fits.png", boxes)) > 0.005
    first = boxes[0][0]
    assert first.get_ylabel() == "plain"
    assert first.get_title() == f"sinusoid: MSE {fits.errors[0][0]:.2g}"
    (words,) = (text for legend in first.figure.legends for text in [[t.get_text() for t in legend.get_texts()]])
    assert words == ["query points", "support points", "before adaptation", "after 2 steps"]
    query, support, before, after = first.lines
    assert query.get_ydata() == pytest.approx(fits.batch.query_y[0, :, 0])
    assert support.get_xdata() == pytest.approx(fits.batch.support_x[0, :, 0])
    assert before.get_ydata() == pytest.approx(fits.before[0][0])
    assert after.get_ydata() == pytest.approx(fits.after[0][0])


def test_a_full_disk_leaves_the_picture_from_before(tmp_path):
    path = tmp_path / "figures" / "curves.png"
    plot_curves([Curve("learned", torch.rand(5, 3))], path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            plot_curves([Curve("learned", torch.rand(9, 3))], path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["curves.png"]


def test_principal_components_are_the_directions_of_largest_variance():
    points = torch.randn(50, 5) * torch.tensor([1.0, 10.0, 0.1, 0.1, 0.1])
    first = principal_components(points)[:, 0]
    assert torch.corrcoef(torch.stack([first, points[:, 1].double()]))[0, 1].abs() > 0.99
    assert principal_components(torch.randn(8, 1)).shape == (8, 2)
