"""Distributions of tasks. They know nothing of operators and rules."""

from metakern.tasks.digits import Digits
from metakern.tasks.distribution import SPLITS, Episodes, TaskBatch, TaskDistribution
from metakern.tasks.episodes import FewShotEpisodes, ImageClasses
from metakern.tasks.mini_imagenet import MiniImageNet
from metakern.tasks.omniglot import Omniglot
from metakern.tasks.optimizees import DigitsMLP, OptimizeeBatch, Optimizees, Quadratics
from metakern.tasks.regression import Abs, Family, Linear, Mixture, Quadratic, Sinusoid, Tanh, mixture

__all__ = [
    "SPLITS",
    "Abs",
    "Digits",
    "DigitsMLP",
    "Episodes",
    "Family",
    "FewShotEpisodes",
    "ImageClasses",
    "Linear",
    "MiniImageNet",
    "Mixture",
    "Omniglot",
    "OptimizeeBatch",
    "Optimizees",
    "Quadratic",
    "Quadratics",
    "Sinusoid",
    "Tanh",
    "TaskBatch",
    "TaskDistribution",
    "mixture",
]
