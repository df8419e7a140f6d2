"""Task distributions: episodes, regression, problems for learned optimizers. Independent of operators and rules."""

from metakern.tasks.classic_functions import ClassicFunction
from metakern.tasks.digit_networks import DigitsCNN, DigitsMLP, DigitsRegression, DigitsRNN
from metakern.tasks.digits import Digits
from metakern.tasks.distribution import SPLITS, Episodes, TaskBatch, TaskDistribution
from metakern.tasks.episodes import FewShotEpisodes, ImageClasses
from metakern.tasks.mini_imagenet import MiniImageNet
from metakern.tasks.network_problems import NetworkProblem
from metakern.tasks.omniglot import Omniglot
from metakern.tasks.optimizee_groups import MixedOptimizees
from metakern.tasks.optimizees import GradientNoise, OptimizeeBatch, Optimizees, Quadratics
from metakern.tasks.regression import Abs, Family, Linear, Mixture, Quadratic, Sinusoid, Tanh, mixture

__all__ = [
    "SPLITS",
    "Abs",
    "ClassicFunction",
    "Digits",
    "DigitsCNN",
    "DigitsMLP",
    "DigitsRNN",
    "DigitsRegression",
    "Episodes",
    "Family",
    "FewShotEpisodes",
    "GradientNoise",
    "ImageClasses",
    "Linear",
    "MiniImageNet",
    "MixedOptimizees",
    "Mixture",
    "NetworkProblem",
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
