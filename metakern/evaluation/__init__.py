"""Evaluation of meta-learners on unseen tasks, and of optimizers on unseen networks."""

from metakern.evaluation.optimizers import (
    BASELINES,
    LEARNING_RATES,
    TRAININGS,
    Curve,
    SpeedComparison,
    compare_optimizers,
    compare_speed,
    rule_curve,
    training_curve,
    tune,
)

__all__ = [
    "BASELINES",
    "LEARNING_RATES",
    "TRAININGS",
    "Curve",
    "SpeedComparison",
    "compare_optimizers",
    "compare_speed",
    "rule_curve",
    "training_curve",
    "tune",
]
