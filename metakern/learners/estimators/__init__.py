"""Gradient estimators of update rules by name, and their options.

"tbptt" backpropagates through each unroll; its code is that of :class:`metakern.learners.RuleLearner`. The others are
evolution strategies on antithetic pairs, which share the mechanism of ``pairs.py``.
"""

from __future__ import annotations

import math
from typing import Any

from metakern.core.checks import check_count
from metakern.learners.estimators.noise import PES, Noise, NoiseReuse, TruncatedES

#: Evolution strategies by name.
STRATEGIES: dict[str, type[Noise]] = {"es": TruncatedES, "pes": PES, "noise-reuse": NoiseReuse}

#: All estimators by name.
ESTIMATORS = ("tbptt", *STRATEGIES)

#: Standard deviation of the perturbations, by default.
SIGMA = 0.01


def check_estimator(
    estimator: str, *, second_order: bool, unroll: int, steps: int, **given: Any
) -> dict[str, Any] | None:
    """The options of an evolution strategy with defaults filled in; None for "tbptt".

    Args:
        estimator: one of :data:`ESTIMATORS`
        second_order: whether second derivatives are asked for
        unroll: steps of a truncation
        steps: largest number of steps of an episode
        given: ``sigma``, ``min_steps`` and ``max_difference``; None where the default is meant

    Raises:
        TypeError, ValueError: for an unknown name, values out of range, and options that do not fit the estimator.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if estimator == "tbptt":
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{name} belongs to the estimators {', '.join(STRATEGIES)}, got {name}={value} with estimator "
                    "'tbptt': leave it out, or choose one of these"
                )
        return None
    if second_order:
        raise ValueError(
            f"second_order differentiates through gradients, which estimator {estimator!r} never does: leave it out, "
            "or choose estimator 'tbptt'"
        )
    sigma, least, largest = given["sigma"], given["min_steps"], given["max_difference"]
    least = unroll if least is None else check_count("min_steps", least)
    if not unroll <= least <= steps:
        raise ValueError(f"min_steps must be from unroll, {unroll}, to steps, {steps}, got {least}")
    sigma = SIGMA if sigma is None else sigma
    for name, value in (("sigma", sigma), ("max_difference", largest)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    return {"sigma": float(sigma), "min_steps": least, "max_difference": largest}


__all__ = ["ESTIMATORS", "SIGMA", "STRATEGIES", "check_estimator"]
