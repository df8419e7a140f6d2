"""Loading a trained learner from its run's folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from metakern.core.text import one_line, quoted
from metakern.learners import ScaledRuleLearner
from metakern.rules import Rule
from metakern.rules import load as load_rule
from metakern.runs.fewshot import make_learner, make_tasks
from metakern.runs.folder import CHECKPOINTS, CONFIG, WEIGHTS, load_weights, read_config
from metakern.runs.problems import TRAINING, load_scales, make_problems, make_rule_learner, rule_of
from metakern.tasks import TaskDistribution
from metakern.training.checkpoints import CheckpointError, Checkpoints, from_bytes


@dataclass(frozen=True)
class LoadedRun:
    """A trained learner with its tasks and settings.

    Attributes:
        folder: of the run
        command: of ``metakern train``: "maml" or "optimizer"
        learner: with the best weights by validation: a :class:`metakern.learners.MAMLLearner`, a ``ClusteredLearner``
            for a run with clusters, or a ``RuleLearner`` for a learned optimizer
        tasks: the task distribution; its "test" split has tasks that training did not see
        settings: the run's config.yaml

    Example:
        >>> run = metakern.runs.load("runs/5way")  # doctest: +SKIP
        >>> run.learner, run.tasks, run.settings["iterations"]  # doctest: +SKIP
    """

    folder: Path
    command: str
    learner: Any
    tasks: TaskDistribution
    settings: dict[str, Any] = field(repr=False)

    @property
    def rule(self) -> Rule:
        """The learned optimizer of ``train optimizer``, for :class:`metakern.optim.learned_optimizer.LearnedOptimizer`.

        Raises:
            AttributeError: for a run of another command.
        """
        if self.command != "optimizer":
            raise AttributeError(f"{self.folder} is a run of `metakern train {self.command}` and has no rule")
        rule: Rule = rule_of(self.learner)
        return rule


def load(folder: str | Path, *, device: str | torch.device = "cpu", data: str | None = None) -> LoadedRun:
    """Load a run's learner with its best weights by validation, its tasks and its configuration.

    Args:
        folder: of ``metakern train``
        device: the learner's device
        data: folder of the omniglot or mini-imagenet images, if they have moved

    Returns:
        :class:`LoadedRun`; for an unfinished run, with the best weights in its newest checkpoint

    Raises:
        ValueError: for a folder without a run, without weights yet, or with damaged ones; and for a run of a
            :class:`metakern.training.Trainer` in Python, whose learner only its own program can construct

    Example:
        >>> run = metakern.runs.load("runs/5way")  # doctest: +SKIP
        >>> batch = run.tasks.split("test").sample(100, generator)  # doctest: +SKIP
        >>> run.learner.evaluate(batch)["accuracy"].mean()  # doctest: +SKIP
    """
    folder = Path(folder)
    settings = read_config(folder / CONFIG)
    command = settings.pop("learner")
    if data is not None:
        settings["data"] = data
    named = SimpleNamespace(**_as_meant(settings))
    if command not in ("maml", "optimizer"):
        raise ValueError(
            f"{folder} is no run of `metakern train`: its {CONFIG} names {quoted(command)}, which only the program "
            "that trained it can make; do so, and load its weights with metakern.runs.load_weights(folder, learner)"
        )
    learner: nn.Module
    try:
        if command == "maml":
            tasks = make_tasks(named)
            learner = make_learner(named, tasks)
        else:
            tasks = make_problems(named)
            learner = make_rule_learner(named, backend="auto")
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"configuration {folder / CONFIG} does not describe a run: {one_line(error)}") from error
    _load_best(folder, command, learner)
    return LoadedRun(folder, command, learner.to(device), tasks, settings)


#: Settings that are fractions; YAML reads 1e-3 as text.
_FRACTIONS = (
    "inner_lr",
    "cluster_temperature",
    "cluster_eval_temperature",
    "output_scale",
    "sigma",
    "max_difference",
    "augment_spread",
    "scale_rate",
)


def _as_meant(settings: dict[str, Any]) -> dict[str, Any]:
    """Correct the types of handwritten settings: 1e-3 is a number, and 8 the width of one hidden layer.

    Raises:
        ValueError: for text that is no number.
    """
    meant = dict(settings)
    if type(settings.get("hidden")) is int:
        meant["hidden"] = str(settings["hidden"])
    for name in _FRACTIONS:
        value = settings.get(name)
        if isinstance(value, str):
            try:
                meant[name] = float(value)
            except ValueError:
                raise ValueError(f"{name} must be a number, got {quoted(value)}") from None
    return meant


def _load_best(folder: Path, command: str, learner: Any) -> None:
    """Load a finished run's weights, or an unfinished run's best so far."""
    if not (folder / WEIGHTS).is_file():
        _load_from_checkpoint(folder, learner)
    elif command == "maml":
        load_weights(folder, learner)
    else:
        rule_of(learner).load_state_dict(load_rule(folder).state_dict())
        if isinstance(learner, ScaledRuleLearner):
            scales = load_scales(folder)
            if scales is None:
                raise ValueError(f"{folder} lacks the factors of its run, which {TRAINING} holds")
            learner.rule.offsets.data.copy_(scales[0])


def _load_from_checkpoint(folder: Path, learner: nn.Module) -> None:
    try:
        path, payload = Checkpoints(folder / CHECKPOINTS, keep=1).load_newest()
        best = from_bytes(payload, str(path))["best_weights"]
    except (FileNotFoundError, CheckpointError, KeyError) as error:
        raise ValueError(f"{folder} holds no trained learner: it has no {WEIGHTS}, and {one_line(error)}") from error
    if best is None:
        raise ValueError(f"{folder} holds no trained learner yet: there was no evaluation before {path.name}")
    try:
        learner.load_state_dict(best)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights that {CONFIG} describes: {one_line(error)}") from error
