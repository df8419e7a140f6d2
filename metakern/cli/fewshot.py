"""Settings of ``train maml``; :mod:`metakern.runs.fewshot` builds tasks and learners from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

from metakern.cli.common import choose, group
from metakern.cli.outer import OUTER, OuterSettings
from metakern.core.text import quoted
from metakern.learners.clustered import ASSIGNMENTS
from metakern.learners.clustering import BATCHES, EMBEDDINGS, METHODS
from metakern.models import resnet12_widths
from metakern.rules.registry import names, options_of
from metakern.runs.fewshot import IMAGES, OWN_OPTIONS, REGRESSION
from metakern.runs.problems import rule_options

_REGRESSION = {"shots": 10, "queries": 10, "steps": 5, "num_tasks": 32, "hidden": "40,40", "filters": 0}
_DIGITS = {"shots": 1, "queries": 15, "steps": 5, "inner_lr": 0.1, "num_tasks": 32, "hidden": "64,64", "filters": 0}

#: Defaults of open settings, by tasks.
PRESETS: dict[str, dict[str, Any]] = {
    "sinusoid": _REGRESSION | {"inner_lr": 0.01},
    **{f"regression-{modes}": _REGRESSION | {"inner_lr": 0.001} for modes in (2, 3, 5)},
    "digits": _DIGITS,
    "digits-domains": _DIGITS,
    "omniglot": {
        "shots": 1, "queries": 15, "steps": 1, "inner_lr": 0.4, "num_tasks": 16, "hidden": "256,128,64,64",
        "filters": 64,
    },
    "mini-imagenet": {
        "shots": 1, "queries": 15, "steps": 5, "inner_lr": 0.01, "num_tasks": 4, "hidden": "256,64", "filters": 32,
    },
}  # fmt: skip


#: Words of the help for tasks that share a preset, with one of the tasks.
_FAMILIES = {
    "sinusoid": "sinusoid", "regression": "regression-3", "digits": "digits", "omniglot": "omniglot",
    "mini-imagenet": "mini-imagenet",
}  # fmt: skip


def _by_tasks(setting: str) -> str:
    """Describe a setting's defaults by tasks, for its help: "10 (sinusoid, regression); 1 (digits, ...)"."""
    words: dict[Any, list[str]] = {}
    for word, tasks in _FAMILIES.items():
        words.setdefault(PRESETS[tasks][setting], []).append(word)
    values = [f"{value:g}" if isinstance(value, float) else str(value) for value in words]
    return "; ".join(f"{value} ({', '.join(found)})" for value, found in zip(values, words.values(), strict=True))


_TASKS = group("Tasks")
_MODEL = group("Model")
_INNER = group("Inner loop")
_CLUSTERS = group("Clusters")


@dataclass(frozen=True)
class MAMLSettings(OuterSettings):
    """The whole configuration of a run; None means the tasks' default, see :data:`PRESETS`."""

    tasks: Annotated[str, _TASKS(help=f"What to train on: {', '.join(PRESETS)}.")] = "sinusoid"
    data: Annotated[str | None, _TASKS(help="Folder of omniglot or mini-imagenet.")] = None
    ways: Annotated[int, _TASKS(min=2, help="Classes of a few-shot task.")] = 5
    shots: Annotated[
        int | None, _TASKS(min=1, help=f"Support samples, of each class; default: {_by_tasks('shots')}.")
    ] = None
    queries: Annotated[
        int | None, _TASKS(min=1, help=f"Query samples, of each class; default: {_by_tasks('queries')}.")
    ] = None
    num_tasks: Annotated[
        int | None, _TASKS(min=1, help=f"Tasks of a meta-batch; default: {_by_tasks('num_tasks')}.")
    ] = None
    test_tasks: Annotated[int, _TASKS(min=2, help="Test tasks at the end.")] = 600
    model: Annotated[str, _MODEL(help="mlp, conv4, resnet12, or auto: conv4 for omniglot and mini-imagenet.")] = "auto"
    hidden: Annotated[str | None, _MODEL(help=f"Units of an mlp's hidden layers; default: {_by_tasks('hidden')}.")] = (
        None
    )
    filters: Annotated[
        int | None,
        _MODEL(
            min=0,
            help="Filters of conv4; default: 64 (omniglot); 32 (mini-imagenet). Of resnet12's last block: 512; or 640.",
        ),
    ] = None
    steps: Annotated[int | None, _INNER(min=1, help=f"Inner steps in training; default: {_by_tasks('steps')}.")] = None
    eval_steps: Annotated[int | None, _INNER(min=1, help="Inner steps in evaluation; default: STEPS.")] = None
    inner_lr: Annotated[
        float | None,
        _INNER(help=f"Inner learning rate, or where learned ones start; default: {_by_tasks('inner_lr')}."),
    ] = None
    rates: Annotated[str, _INNER(help="Inner rates: fixed; learned by step, lslr; by parameter, meta-sgd.")] = "fixed"
    rule: Annotated[
        str | None,
        _INNER(help="Update rule of the inner steps, learned too: adam, meta-lstm, ...; default: SGD at RATES."),
    ] = None
    rule_options: Annotated[str | None, _INNER(help="Options of the rule, as hidden_size=10,num_layers=1.")] = None
    first_order: Annotated[bool, _INNER(help="FOMAML: take inner gradients as constants.")] = False
    anil: Annotated[bool, _INNER(help="Adapt the last layer alone.")] = False
    parameters: Annotated[str | None, _INNER(help="Glob pattern of the parameters to adapt.")] = None
    iterations: Annotated[int, OUTER(min=1, help="Meta-batches to train on.")] = 1000
    clusters: Annotated[str, _CLUSTERS(help="Clusters of tasks: a number, auto, or 0 for none.")] = "0"
    cluster_by: Annotated[str, _CLUSTERS(help=f"What chooses a task's cluster: {', '.join(ASSIGNMENTS)}.")] = "losses"
    cluster_embedding: Annotated[str, _CLUSTERS(help=f"What clusters begin with: {', '.join(EMBEDDINGS)}.")] = (
        "gradient"
    )
    cluster_method: Annotated[str, _CLUSTERS(help=f"Their clustering: {', '.join(METHODS)}.")] = "kmeans"
    cluster_batches: Annotated[str, _CLUSTERS(help=f"Batches by cluster: {', '.join(BATCHES)}.")] = "uniform"
    cluster_shared: Annotated[bool, _CLUSTERS(help="One learner for all; clusters shape batches alone.")] = False
    cluster_warmup: Annotated[int, _CLUSTERS(min=0, help="Iterations before clusters.")] = 0
    cluster_begin: Annotated[int, _CLUSTERS(min=1, help="Iterations by embedding before those by losses.")] = 100
    cluster_refresh: Annotated[int, _CLUSTERS(min=1, help="Iterations between two looks at all clusters.")] = 100
    cluster_temperature: Annotated[float, _CLUSTERS(min=0, help="Softness of assignment in training; 0: hard.")] = 0.0
    cluster_eval_temperature: Annotated[
        float, _CLUSTERS(min=0, help="Softness of averages over clusters in evaluation; 0: the best alone.")
    ] = 0.0

    def meaningless(self) -> Iterator[tuple[Sequence[str], str]]:
        """See :class:`OuterSettings`; for resolved settings only."""
        yield from super().meaningless()
        if self.tasks in REGRESSION:
            yield ("ways",), f"with --tasks {self.tasks}, which have no classes"
        if self.tasks not in IMAGES:
            yield ("data",), f"with --tasks {self.tasks}: only {' and '.join(IMAGES)} come from a folder"
        if self.model != "mlp":
            yield ("hidden",), f"with --model {self.model}, whose size is --filters; --model mlp has hidden layers"
        else:
            yield ("filters",), "with --model mlp, whose size is --hidden; --model conv4 and resnet12 have filters"
        if self.rule is None:
            yield ("rule_options",), "without --rule, whose options they are"
        elif "lr" not in options_of(self.rule):
            yield ("inner_lr",), f"with --rule {self.rule}, which learns the size of its steps itself"
        if self.clusters == "0":
            own = [field.name for field in fields(self) if field.name.startswith("cluster_")]
            yield own, "without clusters: --clusters 4 makes four, --clusters auto as many as fit"
        if self.cluster_by != "losses":
            by = f"with --cluster-by {self.cluster_by}"
            yield ("cluster_begin", "cluster_temperature", "cluster_eval_temperature"), f"{by}, only by losses"
        if self.cluster_by == "modes":
            yield ("cluster_embedding", "cluster_method"), "with --cluster-by modes, which tell the clusters themselves"
        if self.cluster_batches == "uniform":
            yield ("cluster_shared",), "with --cluster-batches uniform: give it balanced or one"

    def resolved(self) -> MAMLSettings:
        """The settings with all defaults filled in.

        Raises:
            ValueError: for unknown names, and settings that exclude each other.
        """
        choose("tasks", self.tasks, tuple(PRESETS))
        choose("model", self.model, ("auto", "mlp", "conv4", "resnet12"))
        choose("rates", self.rates, ("fixed", "lslr", "meta-sgd"))
        if self.rule is not None:
            choose("rule", self.rule, names())
            if self.rates != "fixed":
                raise ValueError(f"rates must be left out where rule is given, which has its own, got {self.rates!r}")
            for option in OWN_OPTIONS.keys() & rule_options(self.rule_options).keys():
                raise ValueError(f"rule_options must leave out {option}, which is {OWN_OPTIONS[option]}, a setting")
        self.check_outer("loss", *(() if self.tasks in REGRESSION else ("accuracy",)))
        if self.clusters != "auto" and not self.clusters.isdecimal():
            raise ValueError(f"clusters must be a number, auto, or 0 for none, got {quoted(self.clusters)}")
        if self.anil and self.parameters is not None:
            raise ValueError(f"parameters must be left out where anil chooses them, got {quoted(self.parameters)}")
        if self.inner_lr is not None and not 0 < self.inner_lr < math.inf:
            raise ValueError(f"inner_lr must be positive and finite, got {self.inner_lr}")
        preset = PRESETS[self.tasks]
        settled = replace(self, **{key: value for key, value in preset.items() if getattr(self, key) is None})
        images = self.tasks in IMAGES
        model = ("conv4" if images else "mlp") if self.model == "auto" else self.model
        if model != "mlp" and not images:
            raise ValueError(
                f"model {model} needs images of 16 pixels or more, omniglot or mini-imagenet, got {self.tasks!r}"
            )
        if model == "resnet12":
            settled = replace(settled, filters=resnet12_widths(self.filters)[-1])
        decay = settled.decay_iterations or settled.iterations
        return replace(settled, model=model, eval_steps=settled.eval_steps or settled.steps, decay_iterations=decay)

    def describe(self) -> str:
        """One-line description of the run."""
        shape = f"{self.shots}-shot" if self.tasks in REGRESSION else f"{self.ways}-way {self.shots}-shot"
        size = f"mlp {self.hidden}" if self.model == "mlp" else f"{self.model} of {self.filters} filters"
        clusters = f", clusters: {self.clusters}" if self.clusters != "0" else ""
        rule = "" if self.rule is None else f" by {self.rule}"
        learns = self.rule is not None and "lr" not in options_of(self.rule)
        rate = "" if learns else f" of {self.inner_lr:g}"
        return f"{self.tasks}, {shape}, {size}, {self.steps} inner steps{rate}{rule}{clusters}"
