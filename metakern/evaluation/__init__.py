"""How well a learner adapts to tasks, and how well an optimizer optimises."""

from metakern.evaluation.optimizers import (
    BASELINES,
    LEARNING_RATES,
    TRAININGS,
    Curve,
    SpeedComparison,
    compare_optimizers,
    compare_speed,
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
    "training_curve",
    "tune",
]
