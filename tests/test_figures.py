"""Figures: the files open as pictures and show something in each of their axes."""

import resource

import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.image import imread

from metakern.adaptation import Adaptation
from metakern.evaluation import Curve
from metakern.figures import plot_adaptation, plot_clusters, plot_curves, plot_learning, principal_components


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


def test_losses_that_were_not_finite_leave_gaps(tmp_path, boxes):
    """metrics.jsonl holds null for them."""
    plot_learning([*lines(10), {"iteration": 11, "loss": None}], [], tmp_path / "learning.png")
    curve = boxes[0][0].lines[0]
    assert list(curve.get_xdata()) == list(range(1, 11))


def test_negative_losses_have_a_linear_axis(tmp_path, boxes):
    plot_learning([{"iteration": 1, "loss": -1.0}, {"iteration": 2, "loss": -2.0}], [], tmp_path / "learning.png")
    assert boxes[0][0].get_yscale() == "linear"


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
