"""Adaptation to unseen tasks: measures after every number of steps, of the test split, with their interval."""

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from metakern import adaptation
from metakern.adaptation import Adaptation, mean_interval, measure_adaptation
from metakern.learners import ClusteredLearner, MAMLLearner
from metakern.models import mlp
from metakern.tasks import Digits, Sinusoid
from tests.planted import TwoFamilies, generator, linear_learner

TASKS = Digits(ways=3, query=4)


@pytest.fixture(scope="module")
def learner():
    torch.manual_seed(0)
    return MAMLLearner(mlp(64, 8, 3), loss=F.cross_entropy, steps=2, lr=0.1)


def test_each_step_is_what_that_many_inner_steps_give(learner):
    found = measure_adaptation(learner, TASKS, num_tasks=5, steps=3, seed=1)
    batch = TASKS.split("test").sample(5, generator(1))
    assert found.measures["accuracy"].shape == (4, 5)
    for steps in (1, 3):
        expected = learner.measure(learner.adapt(batch, steps)(batch.query_x).detach(), batch.query_y)
        torch.testing.assert_close(found.measures["loss"][steps], expected["loss"])
        assert torch.equal(found.measures["accuracy"][steps], expected["accuracy"])
    untouched = torch.stack([F.cross_entropy(learner.model(x), y) for x, y in zip(*batch.query, strict=True)])
    torch.testing.assert_close(found.measures["loss"][0], untouched.detach())


def test_tasks_in_chunks_are_the_tasks_of_one_seed(learner, monkeypatch):
    monkeypatch.setattr(adaptation, "CHUNK", 4)
    found = measure_adaptation(learner, TASKS, num_tasks=10)
    assert found.num_tasks == 10
    assert torch.equal(found.measures["loss"], measure_adaptation(learner, TASKS, num_tasks=10).measures["loss"])
    assert len(found.measures["loss"][0].unique()) == 10


def test_regression_has_no_accuracy():
    found = measure_adaptation(MAMLLearner(mlp(1, 4, 1), steps=2), Sinusoid(5, 5), num_tasks=3)
    assert found.measures.keys() == {"loss"}
    assert found.measures["loss"].shape == (3, 3)


def test_learned_rates_by_step_are_used_up_to_each_step():
    torch.manual_seed(0)
    learner = MAMLLearner(mlp(1, 4, 1), steps=3, rates="lslr", lr=0.1)
    with torch.no_grad():
        for rate in learner.rates.values():
            rate.copy_(torch.tensor([0.1, 0.0, 0.0]))  # the later steps stand still
    losses = measure_adaptation(learner, Sinusoid(5, 5), num_tasks=3).measures["loss"]
    assert not torch.allclose(losses[0], losses[1])
    torch.testing.assert_close(losses[1], losses[2])
    torch.testing.assert_close(losses[1], losses[3])


def test_tasks_of_clusters_are_predicted_by_the_learner_they_are_assigned_to():
    tasks, clustered = TwoFamilies(), ClusteredLearner(linear_learner(), 2, pool=32, begin=1)
    clustered.on_iteration(0, tasks, generator())
    with torch.no_grad():
        for index, learner in enumerate(clustered.learners):
            learner.model[0].weight.fill_(10.0 - 20 * index)
    clustered.iteration.fill_(5)  # assignment by losses
    batch = tasks.sample(20, generator(2))
    labels = clustered.assign(batch)
    assert 0 < labels.sum() < 20
    for steps in (0, 2):
        predicted = clustered.predict(batch, steps)
        for task, label in enumerate(labels.tolist()):
            alone = clustered.learners[label].predict(batch.select(slice(task, task + 1)), steps)
            torch.testing.assert_close(predicted[task], alone[0])
    assert measure_adaptation(clustered, tasks, num_tasks=8).measures["loss"].shape == (2, 8)


def test_before_there_are_clusters_the_shared_learner_predicts():
    clustered = ClusteredLearner(linear_learner(), 2, warmup=10)
    batch = TwoFamilies().sample(4, generator())
    assert torch.equal(clustered.predict(batch, 1), clustered.shared.predict(batch, 1))


def test_the_interval_is_students():
    sample = torch.randn(3, 12, dtype=torch.float64)
    mean, half = mean_interval(sample)
    low, high = stats.t.interval(0.95, 11, loc=sample[1].mean().item(), scale=stats.sem(sample[1].numpy()))
    assert (mean[1] - half[1]).item() == pytest.approx(low)
    assert (mean[1] + half[1]).item() == pytest.approx(high)


def test_the_summary_has_a_row_for_every_step():
    summary = Adaptation("x", {"loss": torch.tensor([[1.0, 3.0], [0.5, 0.5]])}).summary()
    assert [(row["steps"], row["mean"]) for row in summary["loss"]] == [(0, 2.0), (1, 0.5)]
    assert summary["loss"][1]["interval"] == 0.0


def test_one_task_has_no_interval(learner):
    with pytest.raises(ValueError, match="num_tasks must be at least 2, got 1"):
        measure_adaptation(learner, TASKS, num_tasks=1)
