"""Rules with a learned size of the update for each cluster of tasks."""

from __future__ import annotations

import math

import pytest
import torch

from metakern.learners import RuleLearner, ScaledRuleLearner
from metakern.learners.scaled import kinds_by_shape
from metakern.rules import Adam, CoordinatewiseLSTM, HierarchicalRNN
from metakern.tasks import DigitsCNN, DigitsMLP, DigitsRegression, DigitsRNN, MixedOptimizees, Quadratics
from metakern.training import Trainer, TrainerConfig
from tests.conftest import assert_same_bits


def sample(*kinds, tasks=8):
    return MixedOptimizees(kinds).sample(tasks, torch.Generator().manual_seed(0))


def test_kinds_are_told_by_shapes_alone():
    kinds = (DigitsRegression(), DigitsMLP(7), DigitsRNN(5), DigitsCNN(2), Quadratics(3))
    batch = sample(*kinds, tasks=20)
    assert kinds_by_shape(batch).tolist() == [[0, 1, 2, 3, 0][mode] for mode in batch.modes.tolist()]
    assert kinds_by_shape(DigitsMLP(7).sample(2, torch.Generator())).tolist() == [1, 1]
    again = sample(*kinds, tasks=20)
    for ours, expected in zip(batch.init_params(), again.init_params(), strict=True):  # its draws did not advance
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("rule", [CoordinatewiseLSTM, HierarchicalRNN])
def test_factors_of_one_change_nothing(rule):
    torch.manual_seed(0)
    rule, found = rule(), []
    for learner in (RuleLearner(rule, steps=3, unroll=3), ScaledRuleLearner(rule, steps=3, unroll=3)):
        (losses,) = learner.meta_losses(sample(DigitsRegression(16), DigitsMLP(5, batch_size=16)))
        found.append([losses.detach(), *torch.autograd.grad(losses.mean(), list(rule.parameters()), allow_unused=True)])
    for ours, expected in zip(*found[::-1], strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)


def test_each_cluster_scales_the_updates_of_its_own_tasks():
    """With Adam, whose update is its rate times a direction, factors are rates."""
    problems = (DigitsRegression(16), DigitsMLP(5, batch_size=16))
    learner = ScaledRuleLearner(Adam(lr=0.01), rate=1.0, steps=4, unroll=4)
    with torch.no_grad():
        learner.rule.offsets.copy_(torch.tensor([3.0, 0.5, 1.0, 1.0]).log())
    expected = [
        RuleLearner(Adam(lr=0.01 * factor), steps=4, unroll=4).evaluate(sample(*problems))["loss"]
        for factor in (3, 0.5)
    ]
    kinds = kinds_by_shape(sample(*problems))
    torch.testing.assert_close(learner.evaluate(sample(*problems))["loss"], torch.where(kinds == 0, *expected))
    assert learner.factors()[:2].tolist() == pytest.approx([3.0, 0.5])


def test_factors_learn_and_only_those_of_clusters_with_tasks():
    learner = ScaledRuleLearner(Adam(lr=1e-4), steps=4, unroll=4, rate=5.0)
    optimizer = torch.optim.SGD([learner.rule.offsets], 0.01)
    (losses,) = learner.meta_losses(sample(DigitsRegression(16), DigitsCNN(2, 16)))
    losses.mean().backward()
    assert learner.rule.offsets.grad[1:3].tolist() == [0, 0]
    assert (learner.rule.offsets.grad[[0, 3]] < 0).all()  # steps of 1e-4 are too small
    slope = learner.rule.offsets.grad[0].item()
    optimizer.step()
    assert learner.factors()[0].item() == pytest.approx(math.exp(-5.0 * 0.01 * slope))


def test_parts_of_a_batch_may_take_turns():
    learner = ScaledRuleLearner(Adam(lr=0.01), steps=4, unroll=2, rate=1.0)
    with torch.no_grad():
        learner.rule.offsets.copy_(torch.tensor([3.0, 0.5, 1.0, 1.0]).log())
    parts = DigitsRegression(16), DigitsMLP(5, batch_size=16)
    alone = [[losses.detach() for losses in learner.meta_losses(sample(part))] for part in parts]
    turns = zip(*(learner.meta_losses(sample(part)) for part in parts), strict=True)
    assert len(alone[0]) == 2
    for losses, expected in zip(turns, zip(*alone, strict=True), strict=True):
        for ours, of_alone in zip(losses, expected, strict=True):
            torch.testing.assert_close(ours.detach(), of_alone, rtol=0, atol=0)


def test_training_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path):
    def trainer(iterations, folder):
        torch.manual_seed(0)
        learner = ScaledRuleLearner(CoordinatewiseLSTM(hidden_size=4), steps=2, unroll=1)
        problems = MixedOptimizees([DigitsRegression(8), DigitsMLP(3, batch_size=8)])
        config = TrainerConfig(iterations=iterations, num_tasks=4, batch_parts=2, checkpoint_every=1)
        return Trainer(learner, problems, torch.optim.Adam(learner.parameters(), 0.01), config, folder=folder)

    whole = trainer(4, None)
    whole.fit()
    trainer(2, tmp_path).fit()
    resumed = trainer(4, tmp_path)
    resumed.resume()
    resumed.fit()
    assert (whole.learner.factors()[:2] != 1).all()
    for name, weight in whole.learner.state_dict().items():
        assert_same_bits(name, resumed.learner.state_dict()[name], weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "rate must be above 0, got 0.0"),
        ({"estimator": "pes"}, "estimator must be 'tbptt' where clusters have factors, got 'pes'"),
        ({"num_clusters": 0}, "num_clusters must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ScaledRuleLearner(CoordinatewiseLSTM(), **options)


def test_rules_with_attention_and_labels_out_of_range_are_refused():
    with pytest.raises(ValueError, match="got one with attention"):
        ScaledRuleLearner(HierarchicalRNN(attention=True))
    learner = ScaledRuleLearner(CoordinatewiseLSTM(), 2, steps=1, unroll=1)
    with pytest.raises(ValueError, match=r"label must return clusters \[2\] from 0 to 1"):
        learner.evaluate(DigitsCNN(2, 16).sample(2, torch.Generator()))
    learner.rule.labels, params = None, {"x": torch.ones(1, 2)}
    state = learner.rule.init_state(params)
    with pytest.raises(ValueError, match="labels must be set"):
        learner.rule(params, params, state, loss=torch.ones(1))
