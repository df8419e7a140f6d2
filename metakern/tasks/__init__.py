"""Task distributions: episodes, regression, problems for learned optimizers. Independent of operators and rules."""

from metakern.tasks.classic_functions import ClassicFunction
from metakern.tasks.digit_networks import DigitsCNN, DigitsMLP, DigitsRegression, DigitsRNN
from metakern.tasks.digits import Digits
from metakern.tasks.distribution import SPLITS, Episodes, TaskBatch, TaskDistribution
from metakern.tasks.episodes import FewShotEpisodes, ImageClasses
from metakern.tasks.general import general_problems
from metakern.tasks.mini_imagenet import MiniImageNet
from metakern.tasks.network_problems import NetworkProblem
from metakern.tasks.omniglot import Omniglot
from metakern.tasks.optimizee_groups import MixedBatch, MixedOptimizees
from metakern.tasks.optimizees import OptimizeeBatch, Optimizees, ProblemBatch, Quadratics
from metakern.tasks.regression import Abs, Family, Linear, Mixture, Quadratic, Sinusoid, Tanh, mixture
from metakern.tasks.toys import Bowls, ClippedBowls, Norms, SoftmaxRegressions, toy_problems
from metakern.tasks.variants import GradientNoise, LogObjective, Reparametrised, SparseGradients, SumOfProblems

__all__ = [
    "SPLITS",
    "Abs",
    "Bowls",
    "ClassicFunction",
    "ClippedBowls",
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
    "LogObjective",
    "MiniImageNet",
    "MixedBatch",
    "MixedOptimizees",
    "Mixture",
    "NetworkProblem",
    "Norms",
    "Omniglot",
    "OptimizeeBatch",
    "Optimizees",
    "ProblemBatch",
    "Quadratic",
    "Quadratics",
    "Reparametrised",
    "Sinusoid",
    "SoftmaxRegressions",
    "SparseGradients",
    "SumOfProblems",
    "Tanh",
    "TaskBatch",
    "TaskDistribution",
    "general_problems",
    "mixture",
    "toy_problems",
]
