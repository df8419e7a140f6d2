"""Adaptation to test tasks: measures after every number of steps, with their interval."""

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from metakern.evaluation import adaptation
from metakern.evaluation.adaptation import Adaptation, chance_accuracy, fit_tasks, mean_interval, measure_adaptation
from metakern.learners import ClusteredLearner, MAMLLearner
from metakern.models import mlp
from metakern.tasks import Digits, Sinusoid, mixture
from tests.planted import TwoFamilies, generator, linear_learner

TASKS = Digits(ways=3, query=4)


@pytest.fixture(scope="module")
def learner():
    torch.manual_seed(0)
    return MAMLLearner(mlp(64, 8, 3), loss=F.cross_entropy, steps=2, inner_lr=0.1)


def test_each_step_is_what_that_many_inner_steps_give(learner):
    found = measure_adaptation(learner, TASKS, num_tasks=5, steps=3, seed=1)
    batch = TASKS.split("test").sample(5, generator(1))
    assert found.measures["accuracy"].shape == (4, 5)
    for steps in (1, 3):
        expected = learner.measure(learner.adapt_to(batch, steps)(batch.query_x).detach(), batch.query_y)
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


def test_guessing_is_right_as_often_as_the_largest_class_comes(learner):
    assert chance_accuracy(torch.tensor([[0, 0, 1], [2, 2, 2]])) == pytest.approx((2 / 3 + 1) / 2)
    assert measure_adaptation(learner, TASKS, num_tasks=4).chance == pytest.approx(1 / 3)
    assert chance_accuracy(torch.tensor([[1, -100, 4, 1], [-100, -100, -100, -100]])) == pytest.approx(2 / 3)
    assert chance_accuracy(torch.full((2, 3), -100)) is None
    assert chance_accuracy(torch.tensor([[10**15, 0]])) == 0.5
    assert chance_accuracy(torch.rand(2, 3)) is None
    assert chance_accuracy(torch.zeros(2, 3, 1, dtype=torch.int64)) is None
    assert chance_accuracy(None) is None
    assert measure_adaptation(MAMLLearner(mlp(1, 4, 1), steps=1), Sinusoid(5, 5), num_tasks=3).chance is None


def test_the_tasks_that_are_done_are_told(learner, monkeypatch):
    monkeypatch.setattr(adaptation, "CHUNK", 4)
    done = []
    measure_adaptation(learner, TASKS, num_tasks=10, advance=done.append)
    assert done == [4, 8, 10]


@pytest.mark.parametrize("tasks", [mixture(3, 4, 6), Sinusoid(4, 6)])
def test_fits_are_the_curves_of_one_task_of_every_mode(tasks):
    torch.manual_seed(0)
    learners = {name: MAMLLearner(mlp(1, 8, 1), steps=2, inner_lr=0.01) for name in ("a", "b")}
    fits = fit_tasks(learners, tasks, steps=3, seed=5)
    batch = tasks.split("test").sample(adaptation.LOOKED_THROUGH, generator(5))
    modes = [] if batch.modes is None else batch.modes.tolist()
    rows = [modes.index(mode) for mode in range(3)] if modes else [0, 1, 2]
    assert fits.titles == (["sinusoid", "linear", "quadratic"] if modes else ["task"] * 3)
    assert torch.equal(fits.batch.support_x, batch.support_x[rows])
    assert fits.x.min() <= fits.batch.query_x.min()
    assert fits.x.max() >= fits.batch.query_x.max()
    chosen = batch.select(torch.tensor(rows))
    for k, learner in enumerate(learners.values()):
        adapted = learner.adapt_to(chosen, 3)
        expected = adapted(fits.x.view(1, -1, 1).expand(3, -1, -1)).squeeze(-1)
        torch.testing.assert_close(fits.after[k], expected.detach())
        torch.testing.assert_close(fits.before[k][0], learner.model(fits.x.unsqueeze(-1)).squeeze(-1).detach())
        torch.testing.assert_close(
            fits.errors[k], learner.measure(adapted(chosen.query_x), chosen.query_y)["loss"].detach()
        )
    assert fits.steps == [3, 3]


def test_classes_have_no_curves(learner):
    assert fit_tasks({"a": learner}, TASKS) is None


def test_learned_rates_by_step_are_used_up_to_each_step():
    torch.manual_seed(0)
    learner = MAMLLearner(mlp(1, 4, 1), steps=3, rates="lslr", inner_lr=0.1)
    with torch.no_grad():
        for rate in learner.rates.values():
            rate.copy_(torch.tensor([0.1, 0.0, 0.0]))  # later steps change nothing
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
