"""Meta-training: the meta-gradient is the one of the definition, training learns, bad settings are named."""

import math

import pytest
import torch

from metakern.rules import CoordinatewiseLSTM
from metakern.rules.plain_lstm import PlainLSTM
from metakern.tasks import DigitsMLP, Quadratics
from metakern.trainer import MAX_SKIPPED, MetaTrainer, MetaTrainingConfig


def make_rule(seed: int = 0, **options) -> CoordinatewiseLSTM:
    torch.manual_seed(seed)
    return CoordinatewiseLSTM(hidden_size=5, preprocess="none", output_scale=1.0, **options)


def unroll_by_definition(rule, problems, steps, second_order, objective):
    """The meta-loss of one unroll as it is written in the paper: losses of the visited points, all in one graph."""
    params = problems.init_params()
    state = rule.init_state(params)
    total = 0.0
    for _ in range(steps):
        point = params if params.requires_grad else params.requires_grad_()
        (grads,) = torch.autograd.grad(problems.loss(point).sum(), point, create_graph=second_order)
        params, state = rule(params, grads if second_order else grads.detach(), state)
        losses = problems.loss(params)
        total = total + (losses if objective == "sum" else (losses + 1e-3).log()).sum()
    return total / (steps * problems.num_tasks)


@pytest.mark.parametrize("objective", ["sum", "log"])
@pytest.mark.parametrize("second_order", [False, True])
def test_the_meta_gradient_is_that_of_the_definition(second_order, objective):
    config = MetaTrainingConfig(num_tasks=3, steps=4, unroll=4, second_order=second_order, objective=objective)
    rule = make_rule(backend="reference").double()
    sample = Quadratics(3).sample(3, torch.Generator().manual_seed(0))
    sample.weight, sample.target = sample.weight.double(), sample.target.double()
    start = sample.init_params().double()
    sample.init_params = lambda: start.clone()
    expected = torch.autograd.grad(
        unroll_by_definition(rule, sample, 4, second_order, objective), list(rule.parameters())
    )
    trainer = MetaTrainer(rule, Quadratics(3), config)
    *_, meta_loss = trainer._unroll(sample, start, rule.init_state(start))
    actual = torch.autograd.grad(meta_loss, list(rule.parameters()))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


def test_first_and_second_order_differ():
    trained = []
    for second_order in (False, True):
        rule = make_rule()
        MetaTrainer(rule, Quadratics(3), MetaTrainingConfig(steps=4, unroll=4, second_order=second_order)).run_episode()
        trained.append(torch.cat([p.detach().flatten() for p in rule.parameters()]))
    assert not torch.equal(*trained)


@pytest.mark.parametrize("second_order", [False, True])
def test_fused_and_plain_rules_train_alike(second_order):
    config = MetaTrainingConfig(num_tasks=4, steps=10, unroll=5, lr=1e-4, second_order=second_order)
    rule = CoordinatewiseLSTM()
    plain = PlainLSTM(rule)
    episodes = [MetaTrainer(r, DigitsMLP(batch_size=16), config).run_episode() for r in (rule, plain)]
    assert episodes[0].loss == pytest.approx(episodes[1].loss, rel=1e-4)
    for fused, reference in zip(rule.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(fused, reference, rtol=0, atol=5e-5)  # two Adam steps of 1e-4


def test_an_episode_carries_state_and_parameters_over_unrolls():
    """Cutting an episode into unrolls changes where gradients stop, not where the problems go."""
    losses = []
    for unroll in (4, 12):
        rule = make_rule()
        trainer = MetaTrainer(rule, Quadratics(3), MetaTrainingConfig(steps=12, unroll=unroll))
        trainer.optimizer = torch.optim.SGD(rule.parameters(), lr=0.0)  # the rule stays as it is
        losses.append(trainer.run_episode().loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


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
