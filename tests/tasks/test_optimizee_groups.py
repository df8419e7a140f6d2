"""Mixtures of problems: kinds as often as asked, grouped, and every group computes what it would alone."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch.utils import _pytree as pytree

from metakern.tasks import ClassicFunction, DigitsMLP, MixedOptimizees, Quadratics
from tests.conformance.tasks.contents import contents
from tests.tasks.draws import generator

MIXTURE = MixedOptimizees([Quadratics(3), ClassicFunction("beale"), DigitsMLP(5, batch_size=7)], [1, 2, 1])


def test_kinds_are_drawn_by_their_weights():
    modes = MIXTURE.sample(4000, generator()).modes
    assert modes.dtype == torch.int64
    torch.testing.assert_close(modes.bincount() / 4000, torch.tensor([0.25, 0.5, 0.25]), rtol=0, atol=0.03)
    assert MixedOptimizees([Quadratics(2), Quadratics(3)], [0, 1]).sample(9, generator()).modes.tolist() == [1] * 9
    equal = MixedOptimizees([Quadratics(2), Quadratics(3)]).sample(1000, generator()).modes
    assert 440 < equal.sum() < 560


def test_problems_of_a_kind_are_one_group_in_the_order_of_modes():
    batch = MIXTURE.sample(20, generator())
    params = batch.init_params()
    first, second, third = batch.modes.bincount().tolist()
    assert [{name: tensor.shape for name, tensor in group.items()} for group in params] == [
        {"x": (first, 3)},
        {"x": (second, 2)},
        {"0.weight": (third, 5, 64), "0.bias": (third, 5), "2.weight": (third, 10, 5), "2.bias": (third, 10)},
    ]
    assert torch.equal(batch.modes, batch.modes.sort().values)
    for loss in (batch.loss, batch.full_loss):
        at_zero = loss(pytree.tree_map(torch.zeros_like, params))
        beale = 1.5**2 + 2.25**2 + 2.625**2
        torch.testing.assert_close(at_zero[batch.modes == 1], torch.full((second,), beale))
        torch.testing.assert_close(at_zero[batch.modes == 2], torch.full((third,), math.log(10)))
        torch.testing.assert_close(at_zero[batch.modes == 0], batch.groups[0].target.square().sum(1))


def test_a_group_alone_meets_what_it_meets_in_the_mixture():
    whole = contents(MIXTURE.sample(9, generator()))
    modes = MIXTURE.sample(9, generator()).modes
    for mode in modes.unique():
        alone = MIXTURE.sample(9, generator()).select(modes == mode)
        assert len(alone.groups) == 1
        assert (alone.modes == mode).all()
        torch.testing.assert_close(contents(alone), whole[modes == mode])


def test_a_split_is_one_of_every_kind():
    test = MIXTURE.split("test")
    assert test.weights == MIXTURE.weights
    assert len(test.distributions[2].inputs) == 400


def test_a_users_own_batch_is_selected_by_slices():
    """The protocol of a batch asks for no more."""

    class Own:
        num_tasks = 6

        def __init__(self):
            self.asked = []

        def select(self, tasks):
            self.asked.append(tasks)
            return self

    own = Own()
    batch = MIXTURE.sample(4, generator())
    type(batch)([*batch.groups, own], torch.tensor([*batch.modes.tolist(), *[3] * 6])).select(slice(0, 10, 3))
    assert [list(range(6))[tasks] for tasks in own.asked] == [[2, 5]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixedOptimizees([]), "distributions must hold at least one, got none"),
        (lambda: MixedOptimizees([Quadratics()], [1, 2]), "weights must be 1, one a distribution, got 2"),
        (lambda: MixedOptimizees([Quadratics()], [0]), "weights must be finite, at least 0, and not all 0, got [0]"),
        (lambda: MixedOptimizees([Quadratics()], [-1]), "weights must be finite, at least 0, and not all 0, got [-1]"),
        (lambda: MixedOptimizees([Quadratics()], [math.inf]), "weights must be finite, at least 0"),
        (lambda: MIXTURE.sample(4, generator()).select(torch.tensor([2, 1])), "of the 4 problems, ascending, got"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
