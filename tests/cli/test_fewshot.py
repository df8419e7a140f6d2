"""Settings of train maml: defaults depend on the tasks, and learners match the settings."""

import pytest
import torch

from metakern.cli.fewshot import PRESETS, MAMLSettings
from metakern.learners import ClusteredLearner
from metakern.runs.fewshot import make_learner, make_model, make_tasks, widths
from tests.tasks.pictures import write_omniglot


def settings(**given) -> MAMLSettings:
    return MAMLSettings(**given).resolved()


@pytest.mark.parametrize("tasks", PRESETS)
def test_nothing_but_what_may_be_absent_is_left_open(tasks):
    resolved = settings(tasks=tasks)
    absent = {name for name in resolved.__dataclass_fields__ if getattr(resolved, name) is None}
    assert absent == {"data", "parameters", "mixed_precision", "rule", "rule_options"}
    assert resolved.resolved() == resolved  # as when a configuration is read again


def test_what_is_given_stays():
    resolved = settings(tasks="digits", shots=3, hidden="9", eval_steps=7)
    assert (resolved.shots, resolved.hidden, resolved.eval_steps, resolved.steps) == (3, "9", 7, 5)


def test_models_fit_their_tasks():
    assert make_model(settings(), make_tasks(settings()))[0].in_features == 1
    digits = settings(tasks="digits", ways=4)
    model = make_model(digits, make_tasks(digits))
    assert (model[0].in_features, model[-1].out_features) == (64, 4)


def test_omniglot_has_conv4_of_64_filters(tmp_path, monkeypatch):
    write_omniglot(tmp_path, monkeypatch)
    omniglot = settings(tasks="omniglot", data=str(tmp_path), ways=2, queries=2)
    tasks = make_tasks(omniglot)
    model = make_model(omniglot, tasks)
    assert model[0].out_channels == 64
    assert model(tasks.sample(1, torch.Generator()).support_x[0]).shape == (2, 2)
    flat = make_model(settings(tasks="omniglot", data=str(tmp_path), ways=2, queries=2, model="mlp"), tasks)
    assert flat(tasks.sample(1, torch.Generator()).support_x[0]).shape == (2, 2)


@pytest.mark.parametrize(
    ("filters", "widths"), [(None, (64, 128, 256, 512)), (640, (64, 160, 320, 640)), (16, (2, 4, 8, 16))]
)
def test_resnet12_has_the_published_filters_or_a_size_by_its_last_block(filters, widths, tmp_path, monkeypatch):
    write_omniglot(tmp_path, monkeypatch)
    omniglot = settings(tasks="omniglot", data=str(tmp_path), ways=2, queries=2, model="resnet12", filters=filters)
    model = make_model(omniglot, make_tasks(omniglot))
    assert tuple(block.shortcut[0].out_channels for block in model[:4]) == widths
    assert omniglot.describe() == f"omniglot, 2-way 1-shot, resnet12 of {widths[-1]} filters, 1 inner steps of 0.4"


def test_anil_adapts_the_last_layer_alone():
    anil = settings(anil=True, hidden="4,4")
    tasks = make_tasks(anil)
    adapted = make_learner(anil, tasks).adapt_to(tasks.sample(2, torch.Generator()))
    assert set(adapted.parameters) == {"4.weight", "4.bias"}


def test_the_seed_decides_the_weights():
    weights = [
        next(make_learner(settings(seed=seed), make_tasks(settings())).parameters()).detach() for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_clusters_wrap_the_learner():
    learner = make_learner(settings(clusters="3", cluster_method="gmm"), make_tasks(settings()))
    assert isinstance(learner, ClusteredLearner)
    assert len(learner.learners) == 3
    assert learner.clusters.method == "gmm"


def test_widths_are_numbers_with_commas():
    assert widths("40, 40") == [40, 40]
    assert widths("") == []
