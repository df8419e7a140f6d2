"""Distributions of tasks. They know nothing of operators and rules."""

from metakern.tasks.distribution import SPLITS, Episodes, TaskBatch, TaskDistribution
from metakern.tasks.optimizees import DigitsMLP, OptimizeeBatch, Optimizees, Quadratics

__all__ = [
    "SPLITS",
    "DigitsMLP",
    "Episodes",
    "OptimizeeBatch",
    "Optimizees",
    "Quadratics",
    "TaskBatch",
    "TaskDistribution",
]
