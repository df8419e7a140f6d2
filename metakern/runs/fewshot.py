"""Builds tasks, model and learner from the settings of ``train maml``.

Settings are resolved :class:`metakern.cli.fewshot.MAMLSettings`, or any object with the same attributes, such as the
content of a run's config.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.core.text import quoted
from metakern.inner_loop.arguments import adapted_names
from metakern.learners import ClusteredLearner, MAMLLearner
from metakern.learners.clustering import ClusterSampler
from metakern.models import conv4, mlp, resnet12, resnet12_widths
from metakern.rules import Rule
from metakern.rules.registry import make, options_of
from metakern.runs.problems import rule_options
from metakern.tasks import Digits, MiniImageNet, Omniglot, Sinusoid, TaskDistribution, mixture
from metakern.tasks.digits import DOMAINS

#: Regression tasks, which have no classes; and image tasks that are read from a folder.
REGRESSION = ("sinusoid", "regression-2", "regression-3", "regression-5")
IMAGES = ("omniglot", "mini-imagenet")

#: Options of a rule that are settings of the inner loop, and those settings.
OWN_OPTIONS = {"lr": "inner_lr", "steps": "steps"}


def make_tasks(settings: Any) -> TaskDistribution:
    """The task distribution of resolved settings.

    Raises:
        ValueError: for images without a folder, and for a folder without the expected files.
    """
    shots, queries = settings.shots or 1, settings.queries or 1
    if settings.tasks == "sinusoid":
        return Sinusoid(shots, queries, noise=0.0)
    if settings.tasks in REGRESSION:
        return mixture(int(settings.tasks[-1]), shots, queries)
    episodes: dict[str, Any] = {"ways": settings.ways, "support": shots, "query": queries}
    if settings.tasks.startswith("digits"):
        return Digits(**episodes, domains=tuple(DOMAINS) if settings.tasks == "digits-domains" else ())
    if settings.data is None:
        raise ValueError(f"data must name the folder of {settings.tasks}, got none: --data FOLDER")
    return (Omniglot if settings.tasks == "omniglot" else MiniImageNet)(settings.data, **episodes)


def make_model(settings: Any, tasks: TaskDistribution) -> nn.Module:
    """A model with the tasks' input and output sizes, taken from a sampled batch."""
    batch = tasks.sample(1, torch.Generator().manual_seed(0))
    shape = batch.support_x.shape[2:]
    outputs = settings.ways if not batch.support_y.is_floating_point() else int(batch.support_y.shape[-1])
    if settings.model == "conv4":
        return conv4(shape, settings.filters or 1, outputs)
    if settings.model == "resnet12":
        return resnet12(shape, outputs, resnet12_widths(settings.filters))
    body = mlp(math.prod(shape), *widths(settings.hidden or ""), outputs)
    return body if len(shape) == 1 else nn.Sequential(nn.Flatten(), *body)


def widths(text: str) -> list[int]:
    """Parse the widths of hidden layers, like "40,40".

    Raises:
        ValueError: for anything but numbers separated by commas.
    """
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f"hidden must be numbers with commas between, as 40,40, got {quoted(text)}") from error


def make_learner(settings: Any, tasks: TaskDistribution) -> MAMLLearner | ClusteredLearner:
    """The learner of resolved settings, on the CPU, with weights drawn from ``seed``."""
    torch.manual_seed(settings.seed)
    model = make_model(settings, tasks)
    parameters = settings.parameters
    if settings.anil:
        parameters = [name for name, _ in model.named_parameters()][-1].rpartition(".")[0] + ".*"
    loss: Callable[..., Tensor] = F.mse_loss if settings.tasks in REGRESSION else F.cross_entropy
    rule = _make_rule(settings, model, parameters)
    learner = MAMLLearner(
        model,
        loss=loss,
        steps=settings.steps or 1,
        eval_steps=settings.eval_steps,
        inner_lr=settings.inner_lr or 0.0,
        rates=settings.rates.replace("-", "_"),
        first_order=settings.first_order,
        parameters=parameters,
        rule=rule,
    )
    if settings.clusters == "0":
        return learner
    if rule is not None and rule.initialisation() is not None:
        raise ValueError(
            f"clusters look at tasks from the model's own parameters, which rule {settings.rule} does not train, as it "
            f"learns others to start from: rule {settings.rule.removesuffix('-with-start')} learns the model's"
        )
    return ClusteredLearner(
        learner,
        None if settings.clusters == "auto" else int(settings.clusters),
        assign=settings.cluster_by,
        warmup=settings.cluster_warmup,
        begin=settings.cluster_begin,
        refresh=settings.cluster_refresh,
        embedding=settings.cluster_embedding,
        method=settings.cluster_method,
        temperature=settings.cluster_temperature,
        eval_temperature=settings.cluster_eval_temperature,
        per_cluster=not settings.cluster_shared,
        seed=settings.seed,
    )


def _make_rule(settings: Any, model: nn.Module, parameters: Any) -> Rule | None:
    """The rule of the inner steps, whose lr starts at ``inner_lr``; None for gradient descent."""
    name: str | None = getattr(settings, "rule", None)  # runs of earlier releases have no such setting
    if name is None:
        return None
    own = {option: getattr(settings, setting) for option, setting in OWN_OPTIONS.items()}
    options = {key: own[key] for key in options_of(name) if own.get(key) is not None}
    options |= rule_options(getattr(settings, "rule_options", None))
    params = dict(model.named_parameters())
    return make(name, options, params={n: params[n] for n in adapted_names(model, parameters)}, learned=True)


def sampler(settings: Any, tasks: TaskDistribution, learner: nn.Module) -> TaskDistribution:
    """The distribution to train on, with batches by cluster if the settings ask for them."""
    if settings.clusters == "0" or settings.cluster_batches == "uniform":
        return tasks
    return ClusterSampler(tasks, learner, settings.cluster_batches)  # type: ignore[arg-type]
