"""Evolution strategies under the trainer: processes share the pairs, checkpoints hold the problems of all."""

import os

import pytest
import torch

from metakern.learners import RuleLearner
from metakern.rules import CoordinatewiseLSTM
from metakern.tasks import MixedOptimizees, Quadratics
from metakern.training import Trainer, TrainerConfig, load_checkpoint
from tests.training.problems import assert_same_state, make_trainer
from tests.training.processes import ended, start_ranks

PROBLEMS = MixedOptimizees([Quadratics(3), Quadratics(2)])


def training(folder, iterations):
    torch.manual_seed(0)
    learner = RuleLearner(CoordinatewiseLSTM(4), steps=7, unroll=3, objective="relative-log", estimator="pes")
    config = TrainerConfig(iterations=iterations, num_tasks=5, eval_tasks=2, eval_every=4, checkpoint_every=2, keep=9)
    trainer = Trainer(learner, PROBLEMS, torch.optim.SGD(learner.parameters(), 1e-3), config, folder=folder)
    trainer.callbacks = ()
    return trainer


def train_in_two_ways(folder):
    """Once in one go, once with a break, both in this group of processes."""
    training(folder / "whole", 6).fit()
    training(folder / "parted", 4).fit()
    again = training(folder / "parted", 6)
    assert again.resume() == 4
    again.fit()
    torch.save(dict(again.learner.rule.state_dict()), folder / f"{os.environ['RANK']}.saved")


def test_processes_share_the_pairs_and_go_on_to_the_same_bits(tmp_path):
    ranks = start_ranks(2, train_in_two_ways, tmp_path, output=tmp_path / "err")
    assert [ended(rank) for rank in ranks] == [0, 0], (tmp_path / "err" / "0").read_text()
    whole, parted = (load_checkpoint(tmp_path / name / "checkpoints" / "00000006.pt") for name in ("whole", "parted"))
    assert_same_state(parted["learner"], whole["learner"])
    shares = whole["learner"]["pairs._extra_state"]["shares"]
    assert [len(share["flight"]["ages"]) for share in shares] == [2, 3]
    first, second = (torch.load(tmp_path / f"{rank}.saved") for rank in range(2))
    assert_same_state(first, second)
    alone = training(None, 6)
    alone.fit()
    for name, weight in alone.learner.rule.state_dict().items():
        torch.testing.assert_close(first[name], weight, rtol=1e-3, atol=1e-4)
    with pytest.raises(
        ValueError, match="the problems in flight are those of 2 processes, and this run has 1: start 2"
    ):
        training(tmp_path / "whole", 8).resume()


def step_with(gradient, **settings):
    """The step of SGD by 0.05, for a learner whose first weight's gradient is given."""
    trainer = make_trainer(optimizer=torch.optim.SGD, scheduled=False, ema=None, **settings)
    weight = trainer.learner.head.bias
    before = weight.detach().clone()
    weight.register_hook(lambda _: torch.tensor([gradient], dtype=weight.dtype))
    trainer._outer.run(trainer._draw(), lambda: 0)
    return ((before - weight.detach()) / 0.05).item(), trainer._outer.skipped


@pytest.mark.parametrize(
    ("gradient", "settings", "expected"),
    [
        (3.0, {"max_grad_element": 0.5, "max_grad_norm": None}, (1.0, 0)),  # two steps, 0.5 each
        (-3.0, {"max_grad_element": 0.5, "max_grad_norm": None}, (-1.0, 0)),
        (0.25, {"max_grad_element": 0.5, "max_grad_norm": None}, (0.5, 0)),
        (float("nan"), {"non_finite": "zero", "max_grad_norm": None}, (0.0, 0)),
        (float("-inf"), {"non_finite": "zero", "max_grad_element": 1e4}, (0.0, 0)),
        (float("nan"), {"max_grad_element": 1e4}, (0.0, 2)),
    ],
)
def test_elements_are_limited_and_those_that_are_not_finite_count_as_zero(gradient, settings, expected):
    assert step_with(gradient, **{"batch_parts": 1, **settings}) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_grad_element": 0.0}, ValueError, "max_grad_element must be above 0 and below inf, got 0.0"),
        ({"max_grad_element": "1"}, TypeError, "max_grad_element must be a number or None, got '1'"),
        ({"non_finite": "ignore"}, ValueError, "non_finite must be one of skip, zero, got 'ignore'"),
    ],
)
def test_bad_settings_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        TrainerConfig(**settings)
