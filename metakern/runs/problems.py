"""Builds problems, rule and learner from the settings of ``train optimizer``."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from metakern.core.plain_data import RESULT_BYTES, read_json
from metakern.core.text import one_line, quoted
from metakern.learners import RuleLearner, ScaledRuleLearner
from metakern.learners.scaled import SHAPE_KINDS, kinds_by_shape, one_cluster
from metakern.rules import Rule
from metakern.rules.registry import make, options_of
from metakern.tasks import (
    Bowls,
    ClassicFunction,
    ClippedBowls,
    DigitsCNN,
    DigitsMLP,
    DigitsRegression,
    DigitsRNN,
    Norms,
    Optimizees,
    Quadratics,
    Reparametrised,
    SoftmaxRegressions,
    SumOfProblems,
    general_problems,
    toy_problems,
)
from metakern.tasks.classic_functions import FUNCTIONS

#: Training problems of a learned optimizer, by name.
PROBLEMS: dict[str, Callable[[], Optimizees]] = {
    "digits": DigitsMLP,
    "digits-regression": DigitsRegression,
    "digits-cnn": DigitsCNN,
    "digits-rnn": DigitsRNN,
    "digits-and-bowl": lambda: SumOfProblems([DigitsMLP(), ClippedBowls()]),
    "mixed": toy_problems,
    "general": general_problems,
    "quadratics": Quadratics,
    "bowls": Bowls,
    "norms": Norms,
    "softmax": SoftmaxRegressions,
    **{name.replace("_", "-"): partial(ClassicFunction, name) for name in FUNCTIONS},
}


def problem_named(name: str) -> Optimizees:
    """Problems by their name in :data:`PROBLEMS`, or made by a user's function, ``FILE.py:FUNCTION``.

    Args:
        name: the function takes no arguments and returns a distribution of problems, as a
            :class:`metakern.tasks.NetworkProblem`. Its file is run.

    Raises:
        ValueError: for an unknown name, and a file or function that is missing or returns something else.
    """
    if name in PROBLEMS:
        return PROBLEMS[name]()
    file, colon, function = name.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise ValueError(f"problem must be one of {', '.join(PROBLEMS)}, or FILE.py:FUNCTION, got {quoted(name)}")
    if not Path(file).is_file():
        raise ValueError(f"problem {quoted(name)}: there is no file {file}")
    made = runpy.run_path(file).get(function)
    if not callable(made):
        raise ValueError(f"problem {quoted(name)}: {file} has no function {function}")
    problems: Any = made()
    if not hasattr(problems, "sample") or not hasattr(problems, "split"):
        raise ValueError(
            f"problem {quoted(name)}: {function}() must return problems with sample and split, as "
            f"metakern.tasks.NetworkProblem, got {type(problems).__name__}"
        )
    found: Optimizees = problems
    return found


#: The rule that ``train optimizer`` trains by default.
RULE = "coordinatewise-lstm"

#: Share of the samples that are held out for ``loss_on="held-out"``.
HELD_OUT = 0.25

#: Settings of ``train optimizer`` that came later than its first runs, with their values in those.
_LATER: dict[str, Any] = {
    "rule": RULE,
    "rule_options": None,
    "estimator": "tbptt",
    "sigma": None,
    "min_steps": None,
    "max_difference": None,
    "loss_on": "train",
    "augment": "none",
    "augment_spread": 3.0,
    "scales": "none",
    "scale_rate": 10.0,
}

#: Clusters of problems whose updates have learned factors, by the setting ``scales``: their number and labels.
SCALES: dict[str, tuple[int, Callable[[Any], torch.Tensor]]] = {
    "one": (1, one_cluster),
    "shapes": (SHAPE_KINDS, kinds_by_shape),
}


def setting(settings: Any, name: str) -> Any:
    """A setting, or its value in runs that began before there was one."""
    return getattr(settings, name, _LATER[name])


def make_problems(settings: Any) -> Optimizees:
    """The training problems of resolved settings.

    Raises:
        ValueError: for held-out samples of problems that have no data.
    """
    problems: Any = PROBLEMS[settings.problem]()
    if setting(settings, "loss_on") == "held-out":
        if not hasattr(problems, "hold_out"):
            raise ValueError(
                "loss_on held-out needs a problem with samples to hold out, as digits, got problem "
                f"{settings.problem}: choose another, or loss_on train"
            )
        problems = problems.hold_out(HELD_OUT)
    augment = setting(settings, "augment")
    if augment != "none":
        problems = Reparametrised(problems, augment, setting(settings, "augment_spread"))
    found: Optimizees = problems
    return found


def rule_options(text: str | None) -> dict[str, Any]:
    """Options from ``name=value,name=value``; numbers, true, false and null are those of JSON, the rest is text.

    Raises:
        ValueError: for anything else, and for a name given twice.
    """
    found: dict[str, Any] = {}
    for entry in text.split(",") if text else ():
        name, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or not name.isidentifier() or name in found:
            raise ValueError(f"rule_options must be name=value,name=value with each name once, got {quoted(text)}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def make_rule(settings: Any, problems: Optimizees, backend: str | None = None) -> Rule:
    """The rule of resolved settings, with weights drawn from ``seed``; see :func:`make_rule_learner`."""
    name = setting(settings, "rule")
    known = options_of(name)
    options: dict[str, Any] = {
        "horizon": settings.steps,
        "trained_on": f"the problem `{settings.problem}` of `metakern train optimizer`",
        "backend": backend or settings.backend,
    }
    options = {option: value for option, value in options.items() if option in known}
    if name == RULE:
        options |= {
            "hidden_size": settings.hidden_size,
            "num_layers": settings.layers,
            "preprocess": settings.preprocess or "none",
            "output_scale": settings.output_scale or 0.0,
        }
    torch.manual_seed(settings.seed)
    rule = make(
        name, options | rule_options(setting(settings, "rule_options")), params=one_problem(problems), learned=True
    )
    if rule.horizon is None and "horizon" not in known:
        rule.horizon = settings.steps
    return rule


def one_problem(problems: Optimizees) -> dict[str, torch.Tensor] | None:
    """The params [*shape] of one problem, for rules with weights for each; None for a mixture of shapes."""
    start = problems.sample(1, torch.Generator().manual_seed(0)).init_params()
    return {name: p[0] for name, p in start.items()} if isinstance(start, dict) else None


def make_rule_learner(settings: Any, backend: str | None = None) -> RuleLearner:
    """The learner of resolved settings, with weights drawn from ``seed``.

    Args:
        settings: :class:`metakern.cli.optimizer.OptimizerSettings`, or any object with the same attributes
        backend: overrides the one in the settings

    Raises:
        TypeError, ValueError: for settings that do not fit together.
    """
    rule = make_rule(settings, make_problems(settings), backend)
    estimator = setting(settings, "estimator")
    given = {} if estimator == "tbptt" else {n: setting(settings, n) for n in ("sigma", "min_steps", "max_difference")}
    options = {
        "steps": settings.steps,
        "unroll": settings.unroll,
        "objective": settings.objective,
        "second_order": settings.second_order,
        "loss_on": setting(settings, "loss_on"),
        "estimator": estimator,
        **given,
    }
    scales = setting(settings, "scales")
    if scales == "none":
        return RuleLearner(rule, **options)
    number, label = SCALES[scales]
    return ScaledRuleLearner(rule, number, label=label, rate=setting(settings, "scale_rate"), **options)


def rule_of(learner: RuleLearner) -> Any:
    """The rule that a learner trains, without the factors of clusters."""
    return learner.shared if isinstance(learner, ScaledRuleLearner) else learner.rule


#: File with a run's training problem, its losses, and the factors of its updates.
TRAINING = "training.json"


def load_scales(folder: Path) -> tuple[torch.Tensor, float, Callable[[Any], torch.Tensor]] | None:
    """The logarithms of a run's factors by ``scale_rate`` [C], that rate, and the labels of problems, or None.

    Raises:
        ValueError: for a file that does not hold what a run writes.
    """
    try:
        content = read_json(folder / TRAINING, RESULT_BYTES)
    except OSError:
        return None  # a rule that ships, or one that was saved from Python
    if not isinstance(content, dict) or "scale_offsets" not in content:
        return None
    try:
        number, label = SCALES[content["config"]["scales"]]
        offsets, rate = torch.tensor(content["scale_offsets"]), float(content["config"]["scale_rate"])
        if offsets.shape != (number,):
            raise ValueError(f"{number} factors were expected, got {list(offsets.shape)}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / TRAINING} does not hold a run's factors: {one_line(error)}") from error
    return offsets, rate, label
