"""RuleLearner starts from the initial parameters that a rule learns, and trains them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from metakern.learners import RuleLearner
from metakern.learners.starts import starting_params
from metakern.rules import CoordinatewiseLSTM, MetaLSTM
from metakern.tasks import ClassicFunction, MixedOptimizees, Quadratics

START = torch.tensor([1.0, -2.0, 0.5])


def make(**options: Any) -> RuleLearner:
    torch.manual_seed(0)
    rule = MetaLSTM({"x": START}, hidden_size=4)
    return RuleLearner(rule, **{"steps": 4, "unroll": 2, "objective": "sum", **options})


def draw(problems: Any = None, num_tasks: int = 3, seed: int = 0) -> Any:
    problems = Quadratics(3) if problems is None else problems
    return problems.sample(num_tasks, torch.Generator().manual_seed(seed))


def test_every_problem_starts_from_the_learned_parameters() -> None:
    learner = make()
    (params,) = starting_params(learner.rule, draw()).values()
    assert torch.equal(params.detach(), START.expand(3, 3))
    mixed = MixedOptimizees([Quadratics(3), Quadratics(3)])
    for group in starting_params(learner.rule, draw(mixed, 4)):
        assert torch.equal(group["x"].detach(), START.expand(len(group["x"]), 3))
    assert not torch.equal(starting_params(CoordinatewiseLSTM(), draw())["x"], START.expand(3, 3))


@pytest.mark.parametrize("second_order", [False, True])
def test_the_first_unroll_has_the_gradient_of_the_start(second_order: bool) -> None:
    learner, batch = make(second_order=second_order), draw()
    first, second = learner.meta_losses(batch)
    start = learner.rule.initialisation()["x"]
    (got,) = torch.autograd.grad(first.sum(), start)

    def by_hand(x: Tensor) -> Tensor:
        params, state, total = {"x": x.expand(3, 3)}, learner.rule.init_state({"x": x.expand(3, 3)}), torch.zeros(())
        for step in range(3):
            losses = batch.loss(params)
            if step:
                total = total + losses.sum() / 2
            if step < 2:
                (grad,) = torch.autograd.grad(losses.sum(), params["x"], create_graph=second_order, retain_graph=True)
                of_step = losses if second_order else losses.detach()
                params, state = learner.rule(params, {"x": grad}, state, loss=of_step)
        return total

    x = START.clone().requires_grad_()
    (expected,) = torch.autograd.grad(by_hand(x), x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(second.sum(), start, allow_unused=True) == (None,)


def test_training_moves_the_start_towards_the_solutions() -> None:
    learner, solution = make(steps=2), torch.tensor([3.0, 1.0, -1.0])
    optimizer = torch.optim.Adam(learner.parameters(), 0.2)
    before = float((START - solution).norm())
    for seed in range(30):
        batch = draw(seed=seed)
        batch.target = (batch.weight @ solution.view(1, 3, 1)).squeeze(-1)
        for losses in learner.meta_losses(batch):
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
    assert float((learner.rule.initialisation()["x"].detach() - solution).norm()) < 0.6 * before
    found = learner.evaluate(draw())["loss"]
    assert not found.requires_grad
    assert found.isfinite().all()


def test_a_start_for_other_problems_is_refused() -> None:
    rule = make().rule
    with pytest.raises(ValueError, match=r"rule must learn initial values .* but its initialisation\(\) has .*x"):
        starting_params(rule, draw(Quadratics(2)))
    with pytest.raises(ValueError, match="make the rule for these problems"):
        starting_params(rule, draw(MixedOptimizees([Quadratics(3), ClassicFunction("booth")]), 4))
