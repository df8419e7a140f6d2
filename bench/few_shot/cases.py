"""Cases of the few-shot benchmark: methods and samplers as settings of ``metakern train maml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from metakern.cli.common import option
from metakern.cli.fewshot import MAMLSettings

SHOTS = (1, 5)

#: Settings that all runs share. Validation and test tasks are of digits that no training task has.
SHARED: dict[str, Any] = {"tasks": "digits-domains", "ways": 5, "queries": 10, "hidden": "32", "threads": 1}


@dataclass(frozen=True)
class Method:
    """An inner update.

    Attributes:
        title: in words
        settings: of ``metakern train maml``; those of learning were chosen by bench.few_shot.tune
    """

    title: str
    settings: Mapping[str, Any]


#: The baseline whose processor time is the measure of equal time.
MAML = "maml"

#: First-order meta-gradients of limited norm, as Ravi & Larochelle 2017 train Meta-LSTM.
_RULE = {"steps": 5, "first_order": True, "max_grad_norm": 0.25}

METHODS = {
    MAML: Method("MAML", {"steps": 10, "inner_lr": 0.2, "outer_lr": 1e-2}),
    "meta-sgd": Method("Meta-SGD", {"rates": "meta-sgd", "steps": 10, "inner_lr": 0.2, "outer_lr": 3e-3}),
    "anil": Method("ANIL", {"anil": True, "steps": 10, "inner_lr": 0.8, "outer_lr": 3e-3}),
    "lstm": Method(
        "LSTM rule", {"rule": "coordinatewise-lstm", "rule_options": "num_layers=1", "outer_lr": 3e-4, **_RULE}
    ),
    "meta-lstm": Method("Meta-LSTM", {"rule": "meta-lstm", "outer_lr": 1e-3, **_RULE}),
}

UNIFORM = "uniform"

#: Samplers of training tasks; with clusters, every batch has as many tasks of each of the four.
SAMPLERS: dict[str, dict[str, Any]] = {
    UNIFORM: {},
    "clusters": {
        "clusters": "4",
        "cluster_by": "embedding",
        "cluster_batches": "balanced",
        "cluster_shared": True,
    },
}


@dataclass(frozen=True)
class Plan:
    """Size of the runs."""

    iterations: int = 400
    num_tasks: int = 4  # of an iteration
    points: int = 4  # on a learning curve, evenly spaced
    valid: int = 200  # validation tasks of a point
    test: int = 600  # test tasks, at the end
    seeds: int = 5


@dataclass(frozen=True)
class Case:
    """A method, a number of shots and a sampler; ``changed`` are settings to try in place of the method's."""

    method: str
    shots: int
    sampler: str
    changed: tuple[tuple[str, Any], ...] = ()

    def settings(self, seed: int, plan: Plan) -> MAMLSettings:
        """The resolved settings of a run."""
        return MAMLSettings(**self._given(plan), seed=seed).resolved()

    def command(self, plan: Plan) -> str:
        """The command line that makes such a run, without its seed and folder."""
        words = ["metakern train maml"]
        for name, value in self._given(plan).items():
            words.append(option(name) if value is True else f"{option(name)} {value}")
        return " ".join(words)

    def described(self, plan: Plan) -> dict[str, Any]:
        """All that determines a run but its seed."""
        settings = asdict(self.settings(0, plan))
        return {"settings": settings, "points": plan.points, "valid": plan.valid, "test": plan.test}

    def _given(self, plan: Plan) -> dict[str, Any]:
        method = METHODS[self.method]
        size = {"shots": self.shots, "num_tasks": plan.num_tasks, "iterations": plan.iterations}
        return {**SHARED, **size, **method.settings, **SAMPLERS[self.sampler], **dict(self.changed)}


def cases() -> list[Case]:
    """All cases, the cheap ones first."""
    return [Case(method, shots, sampler) for method in METHODS for shots in SHOTS for sampler in SAMPLERS]
