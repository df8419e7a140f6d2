"""Builds problems, rule and learner from the settings of ``train optimizer``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from metakern.learners import RuleLearner
from metakern.rules import get
from metakern.tasks import ClassicFunction, DigitsCNN, DigitsMLP, DigitsRegression, DigitsRNN, Optimizees, Quadratics
from metakern.tasks.classic_functions import FUNCTIONS

#: Training problems of a learned optimizer, by name.
PROBLEMS: dict[str, Callable[[], Optimizees]] = {
    "digits": DigitsMLP,
    "digits-regression": DigitsRegression,
    "digits-cnn": DigitsCNN,
    "digits-rnn": DigitsRNN,
    "quadratics": Quadratics,
    **{name.replace("_", "-"): partial(ClassicFunction, name) for name in FUNCTIONS},
}

#: The rule that ``train optimizer`` trains, by its registered name; its settings are this rule's options.
RULE = "CoordinatewiseLSTM"


def make_rule_learner(settings: Any, backend: str | None = None) -> RuleLearner:
    """The learner of resolved settings, with weights drawn from ``seed``.

    Args:
        settings: :class:`metakern.cli.optimizer.OptimizerSettings`, or any object with the same attributes
        backend: overrides the one in the settings
    """
    torch.manual_seed(settings.seed)
    rule = get(RULE)(
        settings.hidden_size,
        settings.layers,
        preprocess=settings.preprocess or "none",
        output_scale=settings.output_scale or 0.0,
        backend=backend or settings.backend,
        horizon=settings.steps,
        trained_on=f"the problem `{settings.problem}` of `metakern train optimizer`",
    )
    return RuleLearner(
        rule,
        steps=settings.steps,
        unroll=settings.unroll,
        objective=settings.objective,
        second_order=settings.second_order,
    )
