"""Problems for learned optimizers: what every kind promises, quadratics, and noisy gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metakern.tasks import (
    SPLITS,
    ClassicFunction,
    DigitsCNN,
    DigitsMLP,
    DigitsRegression,
    DigitsRNN,
    GradientNoise,
    MixedOptimizees,
    Quadratics,
    TaskDistribution,
)
from tests.tasks.draws import generator

PROBLEMS = {
    "quadratics": Quadratics(3),
    "noisy quadratics": GradientNoise(Quadratics(3), 0.1),
    "regression": DigitsRegression(batch_size=7),
    "mlp": DigitsMLP(hidden_size=5, batch_size=7),
    "cnn": DigitsCNN(channels=2, batch_size=7),
    "rnn": DigitsRNN(hidden_size=4, batch_size=7),
    "ackley": ClassicFunction("ackley", 3),
    "mixture": MixedOptimizees([Quadratics(3), GradientNoise(DigitsMLP(5, batch_size=7), 0.1), Quadratics(2)]),
}
every_kind = pytest.mark.parametrize("problems", PROBLEMS.values(), ids=PROBLEMS)


def losses_and_gradients(batch: Any, steps: int = 2) -> Tensor:
    """What ``steps`` steps of gradient descent meet, for each problem: losses and norms of gradients, [T, ...]."""
    params, met = batch.init_params(), []
    for _ in range(steps):
        leaves, structure = pytree.tree_flatten(params)
        points = [leaf.requires_grad_() for leaf in leaves]
        losses = batch.loss(pytree.tree_unflatten(points, structure))
        grads = torch.autograd.grad(losses.sum(), points)
        met += [losses.detach(), torch.cat([grad.norm(dim=1) for grad in grads])]
        params = pytree.tree_unflatten([p.detach() - 0.01 * g for p, g in zip(points, grads, strict=True)], structure)
    return torch.stack([*met, batch.full_loss(params)], 1)


@every_kind
@pytest.mark.parametrize("num_tasks", [1, 4])
def test_a_batch_gives_a_loss_for_every_problem(problems, num_tasks):
    assert isinstance(problems, TaskDistribution)
    batch = problems.sample(num_tasks, generator())
    params = batch.init_params()
    assert batch.num_tasks == num_tasks == sum(len(leaf) for leaf in pytree.tree_leaves(params))
    assert batch.loss(params).shape == batch.full_loss(params).shape == (num_tasks,)


@every_kind
def test_the_generator_decides_everything(problems):
    first, again, other = (losses_and_gradients(problems.sample(5, generator(seed))) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first != other).all()
    assert len(first.unique(dim=0)) == 5  # no two problems meet the same


@every_kind
@pytest.mark.parametrize(
    "tasks", [slice(0, 3), slice(3, 6), slice(1, 6, 2), torch.tensor([0, 4])], ids=["first", "last", "odd", "indices"]
)
def test_selected_problems_start_and_draw_as_in_the_whole_batch(problems, tasks):
    """So that processes share a meta-batch: each takes a slice of what all of them draw."""
    whole = losses_and_gradients(problems.sample(6, generator()))
    selected = problems.sample(6, generator()).select(tasks)
    assert selected.num_tasks == len(whole[tasks])
    torch.testing.assert_close(losses_and_gradients(selected), whole[tasks], rtol=1e-5, atol=1e-6)


@every_kind
def test_selections_of_one_batch_do_not_disturb_each_other(problems):
    """So a process may split its share further."""
    whole = losses_and_gradients(problems.sample(6, generator()))
    batch = problems.sample(6, generator())
    parts = [batch.select(slice(0, 2)), batch.select(slice(2, 6)).select(slice(1, 3))]
    expected = [whole[0:2], whole[3:5]]
    for part, want in zip(parts, expected, strict=True):
        torch.testing.assert_close(losses_and_gradients(part), want, rtol=1e-5, atol=1e-6)


@every_kind
def test_the_generator_moves_with_samples_alone(problems):
    """So processes that do different things with their shares go on to the same tasks, none of them seen before."""
    left, right = generator(), generator()
    first = problems.sample(6, left)
    losses_and_gradients(first)
    problems.sample(6, right)
    assert torch.equal(left.get_state(), right.get_state())
    met = [losses_and_gradients(problems.sample(6, stream)) for stream in (left, right)]
    assert torch.equal(*met)
    assert len(torch.cat([met[0], losses_and_gradients(problems.sample(6, generator()))]).unique(dim=0)) == 12


@pytest.mark.parametrize("problems", [Quadratics(3), ClassicFunction("ackley", 9)], ids=["quadratics", "ackley"])
def test_splits_of_endless_problems_share_none_even_from_one_seed(problems):
    """Nor is one split's stream another's, a few draws later."""

    def drawn(split: Any) -> Tensor:
        batch = split.sample(50, generator())
        return batch.weight if isinstance(problems, Quadratics) else batch.init_params()

    splits = [drawn(problems.split(name)) for name in SPLITS]
    assert torch.equal(splits[0], drawn(problems))
    assert torch.equal(splits[2], drawn(problems.split("valid").split("test")))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert torch.isin(splits[i], splits[j]).float().mean() < 0.01


@every_kind
def test_a_selection_of_nothing_is_an_error(problems):
    with pytest.raises(
        ValueError, match=r"tasks must select at least one of the 3 problems, .*got slice\(3, 5, None\)"
    ):
        problems.sample(3, generator()).select(slice(3, 5))


@every_kind
def test_problems_move_between_devices(problems):
    """The meta device computes no values: what stays behind would raise."""
    batch = problems.sample(4, generator()).to("meta").select(slice(0, 3))
    params = batch.init_params()
    assert {leaf.device.type for leaf in pytree.tree_leaves(params)} == {"meta"}
    assert batch.full_loss(params).device.type == "meta"


@every_kind
def test_problems_of_a_batch_do_not_touch_each_other(problems):
    batch = problems.sample(4, generator())
    leaves, structure = pytree.tree_flatten(batch.init_params())
    points = [leaf.requires_grad_() for leaf in leaves]
    chosen = batch.loss(pytree.tree_unflatten(points, structure))[1]
    grads = torch.autograd.grad(chosen, points, materialize_grads=True)
    touched = torch.cat([grad.abs().amax(1) > 0 for grad in grads])
    assert touched.tolist() == [False, True, False, False]


def test_quadratics_are_the_squared_distance():
    batch = Quadratics(4).sample(2, generator())
    params = batch.init_params()
    expected = [(w @ p - y).square().sum() for w, p, y in zip(batch.weight, params, batch.target, strict=True)]
    torch.testing.assert_close(batch.loss(params), torch.stack(expected))


def test_noise_is_added_to_gradients_and_to_nothing_else():
    clean, noisy = Quadratics(50).sample(40, generator()), GradientNoise(Quadratics(50), 0.5).sample(40, generator())
    point = clean.init_params().requires_grad_()
    assert torch.equal(noisy.init_params(), point)
    assert torch.equal(noisy.loss(point), clean.loss(point))
    (expected,) = torch.autograd.grad(clean.loss(point).sum(), point)
    noise = [torch.autograd.grad(noisy.loss(point).sum(), point)[0] - expected for _ in range(2)]
    for each in noise:
        assert abs(each.mean()) < 0.05
        assert each.std() == pytest.approx(0.5, rel=0.05)
    correlation = (noise[0] * noise[1]).mean() / 0.25
    assert abs(correlation) < 0.1  # drawn anew
    assert torch.equal(torch.autograd.grad(noisy.full_loss(point).sum(), point)[0], expected)


def test_noise_around_a_mixture_is_refused():
    noisy = GradientNoise(MixedOptimizees([Quadratics(2)]), 0.1).sample(2, generator())
    with pytest.raises(TypeError, match=r"must be one tensor .*, got a tuple; put GradientNoise into MixedOptimizees"):
        noisy.init_params()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quadratics(0), "dim must be at least 1, got 0"),
        (lambda: Quadratics().split("all"), "split must be one of train, valid, test, got 'all'"),
        (lambda: Quadratics().sample(0, generator()), "num_tasks must be at least 1, got 0"),
        (lambda: GradientNoise(Quadratics(), -1.0), "std must be finite and at least 0, got -1.0"),
        (lambda: GradientNoise(Quadratics(), math.nan), "std must be finite and at least 0, got nan"),
        (lambda: GradientNoise(Quadratics(), 0.1).split("all"), "split must be one of train, valid, test, got 'all'"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
