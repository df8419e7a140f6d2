"""Evaluation: all optimizers train the same networks, baselines are tuned on other data, speeds compare equal work."""

import math

import pytest
import torch

from metakern.evaluation import (
    BASELINES,
    LEARNING_RATES,
    TRAININGS,
    Curve,
    compare_optimizers,
    compare_speed,
    rule_curve,
    training_curve,
    tune,
)
from metakern.optim import LearnedOptimizer
from metakern.rules import CoordinatewiseLSTM, MetaLSTM, Momentum, RNNProp
from metakern.tasks import ClassicFunction, DigitsMLP, MixedOptimizees, Quadratics

SMALL = {"num_tasks": 3, "steps": 5, "seed": 0}


def test_a_curve_starts_at_the_fresh_networks_for_every_optimizer():
    problems = DigitsMLP(batch_size=16)
    batch = problems.sample(3, torch.Generator().manual_seed(0))
    start = batch.full_loss(batch.init_params())
    for factory in (BASELINES["SGD"](0.1), BASELINES["Adam"](0.01)):
        curve = training_curve(factory, problems, **SMALL)
        assert curve.shape == (6, 3)
        torch.testing.assert_close(curve[0], start)
        torch.testing.assert_close(training_curve(factory, problems, every_step=False, **SMALL)[0], curve[-1])


def test_networks_trained_side_by_side_are_trained_as_if_alone():
    """SGD on the sum of losses is SGD on each network."""
    problems = Quadratics(4)
    curve = training_curve(BASELINES["SGD"](0.01), problems, **SMALL)
    batch = problems.sample(3, torch.Generator().manual_seed(0))
    x = batch.init_params()["x"]
    for _ in range(5):
        residual = torch.bmm(batch.weight, x.unsqueeze(-1)) - batch.target.unsqueeze(-1)
        x = x - 0.01 * 2 * torch.bmm(batch.weight.mT, residual).squeeze(-1)
    torch.testing.assert_close(curve[-1], batch.full_loss({"x": x}))


def test_problems_of_several_kinds_are_trained_as_each_kind_alone():
    kinds = [Quadratics(4), ClassicFunction("matyas")]
    options = {"num_tasks": 5, "steps": 3, "seed": 2}
    curve = training_curve(BASELINES["Adam"](0.1), MixedOptimizees(kinds), **options)
    batch = MixedOptimizees(kinds).sample(5, torch.Generator().manual_seed(2))
    assert len(batch.groups) == 2
    for mode, group in enumerate(batch.groups):
        x = group.init_params()["x"].requires_grad_()
        optimizer = torch.optim.Adam([x], 0.1)
        for _ in range(3):
            (x.grad,) = torch.autograd.grad(group.loss({"x": x}).sum(), x)
            optimizer.step()
        torch.testing.assert_close(curve[-1, batch.modes == mode], group.full_loss({"x": x}).detach())


def test_tuning_finds_the_best_rate_of_the_grid():
    problems = Quadratics(4)
    best = tune("SGD", problems, **SMALL)
    finals = {lr: training_curve(BASELINES["SGD"](lr), problems, **SMALL)[-1].mean() for lr in LEARNING_RATES}
    finite = {lr: loss for lr, loss in finals.items() if loss.isfinite()}
    assert best == min(finite, key=finite.__getitem__)
    assert len(finite) < len(finals) or max(finals.values()) > 1e3  # the grid reaches rates at which SGD diverges


def test_the_comparison_has_the_learned_optimizer_and_every_baseline():
    rule = CoordinatewiseLSTM()
    options = {"num_tasks": 2, "steps": 2, "seed": 0}
    curves = list(compare_optimizers(rule, DigitsMLP(batch_size=8), **options))
    assert [curve.name for curve in curves] == ["Learned LSTM", *BASELINES]
    assert curves[0].lr is None
    assert all(curve.lr in LEARNING_RATES for curve in curves[1:])
    assert len({tuple(curve.losses[0].tolist()) for curve in curves}) == 1  # the same fresh networks
    test_images = DigitsMLP(batch_size=8, split="test")
    expected = training_curve(lambda params: LearnedOptimizer(params, rule), test_images, **options)
    assert torch.equal(curves[0].losses, expected)


@pytest.mark.parametrize(
    "make", [MetaLSTM, Momentum, lambda: MetaLSTM({"x": torch.ones(4)})], ids=["Meta-LSTM", "momentum", "with a start"]
)
def test_rules_that_need_losses_or_see_tasks_have_curves(make):
    rule, problems = make(), Quadratics(4)
    losses = rule_curve(rule, problems, **SMALL)
    assert not losses.requires_grad
    batch = problems.sample(3, torch.Generator().manual_seed(0))
    params = batch.init_params()
    if rule.initialisation():
        params = {"x": torch.ones(3, 4)}
    state = rule.init_state(params, tasks=True)
    for step in range(6):
        torch.testing.assert_close(losses[step], batch.full_loss(params))
        x = params["x"].detach().requires_grad_()
        (grad,) = torch.autograd.grad(batch.loss({"x": x}).sum(), x)
        params, state = rule(params, {"x": grad}, state, loss=batch.loss(params).detach())


def test_every_training_of_a_comparison_is_told():
    told = []
    options = {"num_tasks": 2, "steps": 1, "seed": 0}
    list(
        compare_optimizers(
            CoordinatewiseLSTM(5), Quadratics(2), advance=lambda what, curve: told.append((what, curve)), **options
        )
    )
    assert len(told) == TRAININGS
    assert [what for what, curve in told if curve] == ["Learned LSTM", *BASELINES]
    assert told[1] == ("SGD, learning rate 0.0001", False)


@pytest.mark.parametrize("last", [math.nan, math.inf, -math.inf])
def test_the_mean_of_what_diverged_is_infinite(last):
    assert Curve("x", torch.tensor([[3.0, 5.0], [1.0, last]])).mean == math.inf
    assert Curve("x", torch.tensor([[3.0, last], [1.0, 2.0]])).mean == 1.5


def test_the_summary_is_what_the_losses_say():
    curve = Curve("x", torch.tensor([[3.0, 5.0], [1.0, 2.0]]), lr=0.1)
    summary = curve.summary()
    assert summary["final_loss_mean"] == 1.5
    assert summary["final_loss_std"] == 0.5
    assert summary["final_loss_max"] == 2.0
    assert summary["curve_mean"] == [4.0, 1.5]


@pytest.mark.parametrize(
    "make", [lambda: CoordinatewiseLSTM(5), RNNProp, MetaLSTM], ids=["LSTM", "RNNProp", "Meta-LSTM"]
)
def test_speed_is_compared_on_equal_work(make):
    torch.manual_seed(0)
    rule = make()
    before = [p.detach().clone() for p in rule.parameters()]
    speed = compare_speed(rule, DigitsMLP(batch_size=8), num_tasks=2, steps=4, unroll=2, repeats=2)
    assert speed.difference < 1e-5
    assert speed.coordinates == 2 * 1510
    assert speed.ratio == speed.plain_seconds / speed.fused_seconds
    assert all(torch.equal(a, b) for a, b in zip(rule.parameters(), before, strict=True))


def test_a_speed_of_unequal_work_is_refused(monkeypatch):
    monkeypatch.setattr("metakern.evaluation.optimizers.SPEED_TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match=r"meta-gradients of the fused and the plain rule differ by .* relative"):
        compare_speed(CoordinatewiseLSTM(5), DigitsMLP(batch_size=8), steps=2, unroll=2, repeats=1)
