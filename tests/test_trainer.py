"""Meta-training: training learns, bad settings are named."""

import math

import pytest
import torch

from metakern.rules import CoordinatewiseLSTM
from metakern.tasks import Quadratics
from metakern.trainer import MAX_SKIPPED, MetaTrainer, MetaTrainingConfig


def make_rule(seed: int = 0, **options) -> CoordinatewiseLSTM:
    torch.manual_seed(seed)
    return CoordinatewiseLSTM(hidden_size=5, preprocess="none", output_scale=1.0, **options)


def test_the_same_seed_gives_the_same_bits():
    trained = []
    for _ in range(2):
        rule = make_rule()
        history = MetaTrainer(rule, Quadratics(3), MetaTrainingConfig(steps=20, seed=3)).fit(3)
        trained.append((history.evaluations, [p.detach().clone() for p in rule.parameters()]))
    assert trained[0][0] == trained[1][0]
    assert all(torch.equal(a, b) for a, b in zip(trained[0][1], trained[1][1], strict=True))


def test_training_on_quadratics_learns():
    rule = make_rule()
    trainer = MetaTrainer(rule, Quadratics(5), MetaTrainingConfig(steps=40, num_tasks=16, seed=1))
    before = trainer.evaluate()
    history = trainer.fit(30)
    assert history.best < before / 3
    assert trainer.evaluate() == pytest.approx(history.best)  # the best weights are those that stay


def test_the_callback_sees_every_episode():
    seen = []
    trainer = MetaTrainer(make_rule(), Quadratics(3), MetaTrainingConfig(steps=20, eval_every=2))
    history = trainer.fit(5, lambda episode, so_far: seen.append((episode, len(so_far.episodes))))
    assert [count for _, count in seen] == [1, 2, 3, 4, 5]
    assert [episode for episode, _ in seen] == history.episodes
    assert [at for at, _ in history.evaluations] == [2, 4, 5]


def test_a_meta_gradient_that_is_not_finite_is_skipped_and_many_stop_the_run():
    rule = make_rule()
    trainer = MetaTrainer(rule, Quadratics(3), MetaTrainingConfig(steps=2, unroll=1))
    trainer.train_problems = BrokenProblems()
    before = [p.detach().clone() for p in rule.parameters()]
    assert trainer.run_episode().skipped == 2
    assert all(torch.equal(a, b) for a, b in zip(rule.parameters(), before, strict=True))
    with pytest.raises(RuntimeError, match=f"{MAX_SKIPPED} meta-gradients in a row were not finite; lower lr"):
        trainer.fit(MAX_SKIPPED)


class BrokenProblems:
    """Quadratics whose loss is NaN."""

    def sample(self, num_tasks, generator):
        batch = Quadratics(3).sample(num_tasks, generator)
        batch.loss = lambda params: params.sum(-1) * math.nan
        return batch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": math.inf}, "lr must be positive and finite, got inf"),
        ({"num_tasks": 0}, "num_tasks must be at least 1, got 0"),
        ({"steps": -1}, "steps must be at least 1, got -1"),
        ({"steps": 10, "unroll": 3}, "unroll must divide steps, 10, got 3"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"clip_norm": math.nan}, "clip_norm must be positive and finite, got nan"),
        ({"objective": "mean"}, "objective must be one of sum, log, got 'mean'"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MetaTrainingConfig(**options)


def test_sizes_are_integers():
    with pytest.raises(TypeError, match=r"steps must be an integer, got 10\.0"):
        MetaTrainingConfig(steps=10.0)


def test_training_without_a_finite_evaluation_is_no_success(monkeypatch):
    trainer = MetaTrainer(make_rule(), Quadratics(3), MetaTrainingConfig(steps=2, unroll=2))
    monkeypatch.setattr(trainer, "evaluate", lambda: math.inf)
    with pytest.raises(RuntimeError, match="no evaluation gave a finite loss"):
        trainer.fit(1)


def test_no_episodes_are_an_error():
    with pytest.raises(ValueError, match="episodes must be at least 1, got 0"):
        MetaTrainer(make_rule(), Quadratics(3)).fit(0)
