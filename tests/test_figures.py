"""Figures: the files open as pictures and show something in their axes."""

import torch
from matplotlib.image import imread

from metakern.evaluation import Curve
from metakern.figures import plot_curves, plot_training
from metakern.trainer import Episode, History


def coloured_share(path) -> float:
    """Share of the pixels that are neither grey nor white: lines and shades of curves."""
    pixels = imread(path)[..., :3]
    return float((pixels.max(-1) - pixels.min(-1) > 0.15).mean())


def test_curves_are_drawn(tmp_path):
    losses = torch.rand(50, 8) + torch.linspace(2, 0.01, 50).unsqueeze(1)
    plot_curves([Curve("learned", losses), Curve("Adam", losses * 2, lr=0.1)], tmp_path / "curves.png")
    assert coloured_share(tmp_path / "curves.png") > 0.01


def test_zero_losses_do_not_break_the_logarithmic_axis(tmp_path):
    plot_curves([Curve("learned", torch.zeros(5, 3))], tmp_path / "curves.png")
    assert coloured_share(tmp_path / "curves.png") > 0.001


def test_training_is_drawn(tmp_path):
    history = History([Episode(1 / (i + 1), 0.1, 0) for i in range(20)], [(5, 0.5), (10, 0.2), (20, 0.1)])
    plot_training(history, tmp_path / "training.png")
    assert coloured_share(tmp_path / "training.png") > 0.001
