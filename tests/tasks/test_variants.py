"""Small problems and variants: values by hand, gradients by their definition."""

import math

import pytest
import torch

from metakern.tasks import (
    Bowls,
    ClippedBowls,
    DigitsMLP,
    LogObjective,
    MixedOptimizees,
    Norms,
    Quadratics,
    Reparametrised,
    SoftmaxRegressions,
    SparseGradients,
    SumOfProblems,
    general_problems,
    toy_problems,
)
from tests.conformance.tasks.contents import gradients
from tests.tasks.draws import generator


def test_bowls_have_the_condition_asked_for():
    batch = Bowls((9.0, 9.0)).sample(5, generator())
    hessian = 2 * batch.weight.mT @ batch.weight
    torch.testing.assert_close(torch.linalg.eigvalsh(hessian), torch.tensor([[1.0, 9.0]]).expand(5, 2))
    conditions = torch.linalg.svdvals(Bowls((1.0, 100.0)).sample(500, generator()).weight).square()
    drawn = (conditions[:, 0] / conditions[:, 1]).log10()
    assert drawn.min() < 0.1
    assert drawn.mean() == pytest.approx(1, abs=0.1)


def test_values_by_hand():
    x = torch.tensor([[1.0, -2.0]])
    norm = Norms(2, 3.0).sample(1, generator())
    norm.weight, norm.target = torch.eye(2).unsqueeze(0), torch.zeros(1, 2)
    assert norm.loss({"x": x}).item() == pytest.approx(9 ** (1 / 3), rel=1e-5)
    clipped = ClippedBowls(2).sample(1, generator())
    clipped.target = torch.tensor([[0.0, 8.0]])
    assert clipped.loss({"x": x}).item() == pytest.approx((1 + 10) / 2)
    squares = Quadratics(2).sample(1, generator())
    squares.weight, squares.target = torch.eye(2).unsqueeze(0), torch.zeros(1, 2)
    log = LogObjective(Quadratics(2)).sample(1, generator())
    log.parts = (squares,)
    assert log.loss({"x": x}).item() == pytest.approx(math.log(5 + 1e-6) - math.log(1e-6))
    total = SumOfProblems([Quadratics(2), ClippedBowls(2)]).sample(1, generator())
    total.parts = (squares, clipped)
    assert total.loss({"0.x": x, "1.x": x}).item() == pytest.approx(5 + 5.5)


def test_softmax_regressions_can_be_learned():
    batch = SoftmaxRegressions().sample(4, generator())
    params = batch.init_params()
    start = batch.full_loss(params)
    for _ in range(200):
        _, grads = gradients(batch, params, "full_loss")
        params = {name: p - 0.5 * grads[name] for name, p in params.items()}
    assert (batch.full_loss(params) < 0.5 * start).all()
    assert (batch.full_loss(params) > 0.1).all()  # a tenth of the labels are random


def test_gradients_are_sparse_and_losses_are_not():
    batch = SparseGradients(Quadratics(50), 0.1).sample(20, generator())
    params = batch.init_params()
    losses, sparse = gradients(batch, params)
    full, dense = gradients(batch, params, "full_loss")
    assert torch.equal(losses, full)
    kept = sparse["x"] != 0
    assert torch.equal(sparse["x"][kept], dense["x"][kept])
    assert kept.float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert not torch.equal(gradients(batch, params)[1]["x"] != 0, kept)


@pytest.mark.parametrize(("share", "different"), [("problem", 1), ("tensor", 4), ("coordinate", 313)])
def test_reparametrised_problems_are_the_same_in_other_coordinates(share, different):
    problems = DigitsMLP(4)
    plain, scaled = problems.sample(3, generator()), Reparametrised(problems, share).sample(3, generator())
    start, other = plain.init_params(), scaled.init_params()
    torch.testing.assert_close(scaled.loss(other), plain.loss(start))
    scales = scaled.scales
    for name, p in start.items():
        torch.testing.assert_close(other[name] * scales[name], p)
    one = torch.cat([scales[name][0].flatten().unique() for name in scales])
    assert len(one.unique()) == pytest.approx(different, abs=3)
    every = torch.cat([scale.flatten() for scale in scales.values()]).log()
    assert every.abs().max() <= 3
    assert every.unique().numel() >= 3


def test_the_mixture_holds_every_family_and_is_scaled_kind_by_kind():
    problems = toy_problems()
    assert len(problems.distributions) == 28
    assert problems.sample(60, generator()).loss(problems.sample(60, generator()).init_params()).isfinite().all()
    scaled = Reparametrised(problems, "tensor", 1.0)
    assert not scaled.even
    assert isinstance(scaled, MixedOptimizees)
    assert {kind.share for kind in scaled.distributions} == {"tensor"}


def test_the_general_mixture_has_as_many_problems_of_every_kind():
    problems = general_problems().split("valid")
    batch = problems.sample(17, generator())
    assert batch.modes.bincount().tolist() == [2] + [1] * 15
    assert batch.loss(batch.init_params()).isfinite().all()
    assert batch.select(slice(3, 9)).even
    assert Reparametrised(MixedOptimizees([Bowls(), Norms(3)], even=True)).split("test").even
    with pytest.raises(ValueError, match=r"weights must all be the same for even=True, or left out, got \[1, 2\]"):
        MixedOptimizees([Bowls(), Norms(3)], [1, 2], even=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bowls((2.0, 1.0)), r"condition must be positive, finite and ascending, got \(2.0, 1.0\)"),
        (lambda: Norms(3, 0.0), "power must be positive and finite, got 0.0"),
        (lambda: ClippedBowls(0), "dim must be at least 1, got 0"),
        (lambda: SoftmaxRegressions(classes=1), "classes must be at least 2, got 1"),
        (lambda: SoftmaxRegressions(samples=0), "samples must be at least 1, got 0"),
        (lambda: SparseGradients(Quadratics(), 0.0), "keep must be above 0 and at most 1, got 0.0"),
        (
            lambda: Reparametrised(Quadratics(), "layer"),
            "share must be one of problem, tensor, coordinate, got 'layer'",
        ),
        (lambda: Reparametrised(Quadratics(), spread=-1.0), "spread must be finite and at least 0, got -1.0"),
        (lambda: SumOfProblems([]), "kinds must hold at least one distribution, got none"),
        (lambda: DigitsMLP().hold_out(1.0), "share must leave samples on both sides of 1000, got 1.0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
