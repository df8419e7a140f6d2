"""RuleLearner: the meta-gradient follows the definition, for problems of one kind and of several."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metakern.learners import MetaLearner, RuleLearner
from metakern.rules import CoordinatewiseLSTM
from metakern.rules.plain_lstm import PlainLSTM
from metakern.rules.protocol import detached
from metakern.tasks import ClassicFunction, DigitsMLP, MixedOptimizees, Quadratics
from metakern.tasks.optimizees import QuadraticBatch

MIXTURE = MixedOptimizees([Quadratics(3), ClassicFunction("booth"), Quadratics(2)])
PROBLEMS = {"plain": Quadratics(3), "mixed": MIXTURE}
every_kind = pytest.mark.parametrize("problems", PROBLEMS.values(), ids=PROBLEMS)


def make_rule(seed: int = 0, **options: Any) -> CoordinatewiseLSTM:
    torch.manual_seed(seed)
    return CoordinatewiseLSTM(hidden_size=5, preprocess="none", output_scale=1.0, **options)


def in_double(batch: Any) -> Any:
    """The batch with its numbers and its starting points in float64."""
    for group in getattr(batch, "groups", (batch,)):
        if hasattr(group, "weight"):
            group.weight, group.target = group.weight.double(), group.target.double()
        start = {name: x.double() for name, x in group.init_params().items()}
        group.init_params = lambda start=start: {name: x.clone() for name, x in start.items()}
    return batch


def draw(problems: Any, num_tasks: int = 8, seed: int = 0) -> Any:
    return problems.sample(num_tasks, torch.Generator().manual_seed(seed))


def weights_of(module: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in module.parameters()])


def meta_gradients(learner: RuleLearner, batch: Any) -> list[Tensor]:
    """Meta-gradients of every unroll, one vector each; weights do not change."""
    weights = list(learner.parameters())
    return [
        torch.cat([grad.flatten() for grad in torch.autograd.grad(losses.mean(), weights)])
        for losses in learner.meta_losses(batch)
    ]


def train(learner: RuleLearner, problems: Any, iterations: int, lr: float, num_tasks: int = 8) -> None:
    optimizer = torch.optim.Adam(learner.parameters(), lr)
    for seed in range(iterations):
        for losses in learner.meta_losses(draw(problems, num_tasks, seed)):
            optimizer.zero_grad()
            losses.mean().backward()
            nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimizer.step()


def unroll_by_definition(
    rule: Any, batch: Any, steps: int, second_order: bool, before: int = 0, measure: Any = None
) -> Tensor:
    """Losses [steps, T] of the visited points of an unroll that follows ``before`` steps, all in one graph."""
    params = batch.init_params()
    state, visited = rule.init_state(params), []
    for step in range(before + steps):
        if step == before:
            params, state, visited = detached(params), detached(state), []
        points, structure = pytree.tree_flatten(params)
        points = [p if p.requires_grad else p.requires_grad_() for p in points]
        losses = batch.loss(params)
        grads = torch.autograd.grad(losses.sum(), points, create_graph=second_order)
        params, state = rule(params, pytree.tree_unflatten(list(grads), structure), state)
        visited.append((measure or batch.loss)(params))
    return torch.stack(visited)


@pytest.mark.parametrize(("name", "learned"), [("adam", ["lr"]), ("meta-sgd", None)])
def test_rules_may_be_named(name, learned):
    if learned is None:
        with pytest.raises(ValueError, match="params must be given for rule 'meta-sgd'"):
            RuleLearner(name)
        return
    learner = RuleLearner(name, steps=4, unroll=2)
    assert [n for n, _ in learner.rule.named_parameters()] == learned
    batch = Quadratics(2).sample(3, torch.Generator().manual_seed(0))
    next(iter(learner.meta_losses(batch))).mean().backward()
    assert learner.rule.lr.grad.abs() > 0


def test_it_is_a_meta_learner():
    learner = RuleLearner(make_rule())
    assert isinstance(learner, MetaLearner)
    assert list(map(id, learner.parameters())) == list(map(id, learner.rule.parameters()))


#: Objectives of the losses [K, T] at θ_1 to θ_K and the losses [T] at θ_0, by definition.
OBJECTIVES = {
    "sum": lambda visited, first: visited.mean(),
    "log": lambda visited, first: (visited + 1e-3).log().mean(),
    "relative-log": lambda visited, first: (visited / (first + 1e-6) + 1e-6).log().mean(),
    "last": lambda visited, first: visited[-2].mean(),
}


@every_kind
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("second_order", [False, True])
def test_the_meta_gradient_is_that_of_the_definition(problems, second_order, objective):
    rule = make_rule(backend="reference").double()
    batch = in_double(draw(problems))
    visited = unroll_by_definition(rule, batch, 4, second_order)
    total = OBJECTIVES[objective](visited, batch.loss(batch.init_params()))
    expected = torch.cat([grad.flatten() for grad in torch.autograd.grad(total, list(rule.parameters()))])
    learner = RuleLearner(rule, steps=4, unroll=4, second_order=second_order, objective=objective)
    (actual,) = meta_gradients(learner, batch)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@every_kind
@pytest.mark.parametrize("objective", ["sum", "log"])
def test_the_values_are_losses_of_every_problem(problems, objective):
    rule = make_rule(backend="reference").double()
    batch = in_double(draw(problems))
    (losses,) = RuleLearner(rule, steps=4, unroll=4, objective=objective).meta_losses(batch)
    assert losses.shape == (8,)
    torch.testing.assert_close(losses, unroll_by_definition(rule, batch, 4, False).mean(0))


def test_every_problem_has_the_gradient_of_its_own_loss():
    """A trainer may weigh problems, not only take their mean."""
    rule = make_rule(backend="reference").double()
    batch = in_double(draw(MIXTURE))
    (losses,) = RuleLearner(rule, steps=3, unroll=3, objective="sum").meta_losses(batch)
    expected = unroll_by_definition(rule, batch, 3, False).mean(0)
    for task in range(8):
        pairs = [torch.autograd.grad(of[task], rule.head.weight, retain_graph=True)[0] for of in (losses, expected)]
        torch.testing.assert_close(*pairs, rtol=1e-9, atol=1e-12)


class HeldOut(QuadraticBatch):
    """Quadratics whose held-out loss is another function."""

    has_held_out = True

    def held_out_loss(self, params):
        return self.loss(params) * params["x"].square().sum(1)


@pytest.mark.parametrize(("objective", "held_out"), [("relative-log", False), ("relative-log", True), ("last", True)])
def test_a_later_unroll_has_the_gradient_of_the_definition(objective, held_out):
    """f_0 is the loss at the start of the episode, and held-out samples replace the minibatches in every loss."""
    rule = make_rule(backend="reference").double()
    batch = in_double(draw(Quadratics(3)))
    batch.__class__ = HeldOut
    measure = batch.held_out_loss if held_out else batch.loss
    visited = unroll_by_definition(rule, batch, 3, False, before=3, measure=measure)
    total = OBJECTIVES[objective](visited, measure(batch.init_params()))
    expected = torch.cat([grad.flatten() for grad in torch.autograd.grad(total, list(rule.parameters()))])
    data = "held-out" if held_out else "train"
    _, actual = meta_gradients(RuleLearner(rule, steps=6, unroll=3, objective=objective, loss_on=data), batch)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_problems_without_held_out_samples_are_refused():
    learner = RuleLearner(make_rule(), steps=4, unroll=2, loss_on="held-out")
    with pytest.raises(ValueError, match=r"loss_on 'held-out' needs problems with held-out samples, .*got Quadratic"):
        next(learner.meta_losses(draw(Quadratics(3))))
    networks = MixedOptimizees([DigitsMLP(3, batch_size=4).hold_out(0.5), DigitsMLP(4, batch_size=4).hold_out(0.5)])
    assert all(losses.isfinite().all() for losses in learner.meta_losses(draw(networks)))


def test_first_and_second_order_differ():
    first, second = (
        meta_gradients(RuleLearner(make_rule(), steps=4, unroll=4, second_order=order), draw(Quadratics(3)))[0]
        for order in (False, True)
    )
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("problems", [DigitsMLP(5, batch_size=8), MIXTURE], ids=["plain", "mixed"])
@pytest.mark.parametrize("second_order", [False, True])
def test_fused_and_plain_rules_have_the_same_meta_gradients(second_order, problems):
    rule = CoordinatewiseLSTM()
    fused, plain = (
        meta_gradients(RuleLearner(each, steps=10, unroll=5, second_order=second_order), draw(problems, 4))
        for each in (rule, PlainLSTM(rule))
    )
    for ours, expected in zip(fused, plain, strict=True):
        assert (ours - expected).norm() < 1e-4 * expected.norm()


@every_kind
def test_state_and_parameters_are_carried_over_unrolls(problems):
    """Splitting an episode into unrolls changes where gradients stop, not the trajectory."""
    learners = [RuleLearner(make_rule(), steps=12, unroll=unroll) for unroll in (4, 12)]
    values = [torch.stack(list(learner.meta_losses(draw(problems)))) for learner in learners]
    assert [len(value) for value in values] == [3, 1]
    torch.testing.assert_close(values[0].mean(0), values[1][0], rtol=1e-5, atol=1e-5)


def test_weights_may_move_between_unrolls():
    learner = RuleLearner(make_rule(), steps=6, unroll=3)
    kept, moved = [losses.tolist() for losses in learner.meta_losses(draw(Quadratics(3)))], []
    for losses in learner.meta_losses(draw(Quadratics(3))):
        moved.append(losses.tolist())
        losses.mean().backward()
        with torch.no_grad():
            learner.rule.head.bias += 0.5
    assert moved[0] == kept[0]
    assert moved[1] != kept[1]


def test_a_mixture_takes_one_launch_a_step():
    """One for all coordinates of all groups."""
    sizes = []

    class Counting(CoordinatewiseLSTM):
        def forward(self, params, grads, state):
            sizes.append(state.num_coordinates)
            return super().forward(params, grads, state)

    batch = draw(MIXTURE)
    assert len(batch.groups) == 3
    list(RuleLearner(Counting(5), steps=4, unroll=2).meta_losses(batch))
    assert sizes == [sum(leaf.numel() for leaf in pytree.tree_leaves(batch.init_params()))] * 4


def test_a_mixture_meets_what_its_groups_meet_alone():
    learner = RuleLearner(make_rule(), steps=6, unroll=3)
    modes = draw(MIXTURE, 9).modes

    def groups() -> list[Any]:
        return [draw(MIXTURE, 9).select(modes == mode) for mode in modes.unique()]

    expected = torch.cat([learner.evaluate(group)["loss"] for group in groups()])
    torch.testing.assert_close(learner.evaluate(draw(MIXTURE, 9))["loss"], expected)
    parts = [group.num_tasks / 9 * meta_gradients(learner, group)[0] for group in groups()]
    gradient = meta_gradients(learner, draw(MIXTURE, 9))[0]
    assert len(parts) == 3
    assert (gradient - sum(parts)).norm() < 1e-4 * gradient.norm()


@pytest.mark.parametrize("problems", [DigitsMLP(5, batch_size=8), MIXTURE], ids=["plain", "mixed"])
def test_processes_that_share_a_batch_have_its_meta_gradient(problems):
    """Each takes a slice; the mean of their gradients is the gradient of the whole."""
    learner = RuleLearner(make_rule(), steps=4, unroll=2)
    whole = meta_gradients(learner, draw(problems))
    shares = [meta_gradients(learner, draw(problems).select(slice(first, first + 4))) for first in (0, 4)]
    for expected, *parts in zip(whole, *shares, strict=True):
        assert (torch.stack(parts).mean(0) - expected).norm() < 1e-4 * parts[0].norm()


@every_kind
def test_evaluation_is_the_full_loss_after_all_steps_without_a_graph(problems):
    learner = RuleLearner(make_rule(), steps=6, unroll=3, second_order=True)
    found = learner.evaluate(draw(problems))
    assert set(found) == {"loss"}
    assert found["loss"].shape == (8,)
    assert not found["loss"].requires_grad
    batch = draw(problems)  # the last of the visited points; for these problems every loss is on all data
    last = unroll_by_definition(learner.rule, batch, 6, False)[-1]
    torch.testing.assert_close(found["loss"], last.detach())


def test_a_loss_that_is_not_finite_is_seen():
    """The trainer skips such a step."""
    batch = draw(Quadratics(3))
    batch.target[0, 0] = torch.nan
    losses = next(RuleLearner(make_rule(), steps=2, unroll=2).meta_losses(batch))
    assert losses.isfinite().tolist() == [False, *[True] * 7]


@every_kind
def test_training_learns(problems):
    learner = RuleLearner(make_rule(), steps=20, unroll=10)
    before = learner.evaluate(draw(problems, 32, 1000))["loss"].log().mean()
    train(learner, problems, 30, 1e-2, 16)
    assert learner.evaluate(draw(problems, 32, 1000))["loss"].log().mean() < before - 1


def test_a_copy_starts_where_the_original_is_and_trains_alone():
    """A rule for every cluster, warm-started from the shared one."""
    shared = RuleLearner(make_rule(), steps=4, unroll=2)
    train(shared, Quadratics(3), 1, 1e-2)
    before, copies = weights_of(shared), [copy.deepcopy(shared) for _ in range(2)]
    assert all(torch.equal(weights_of(each), before) for each in copies)
    train(copies[0], Quadratics(3), 1, 1e-2)
    train(copies[1], ClassicFunction("booth"), 1, 1e-2)
    assert torch.equal(weights_of(shared), before)
    assert len(torch.stack([before, *map(weights_of, copies)]).unique(dim=0)) == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": -1}, ValueError, "steps must be at least 1, got -1"),
        ({"steps": 10.0}, TypeError, r"steps must be an integer, got 10\.0"),
        ({"unroll": 0}, ValueError, "unroll must be at least 1, got 0"),
        ({"steps": 10, "unroll": 3}, ValueError, "unroll must divide steps, 10, got 3"),
        ({"objective": "last", "unroll": 1}, ValueError, "objective 'last' needs an unroll of at least 2, got 1"),
        ({"loss_on": "test"}, ValueError, "loss_on must be one of train, held-out, got 'test'"),
        ({"objective": "mean"}, ValueError, "objective must be one of sum, log, relative-log, last, got 'mean'"),
    ],
)
def test_bad_settings_are_named(options, error, message):
    with pytest.raises(error, match=message):
        RuleLearner(make_rule(), **options)
