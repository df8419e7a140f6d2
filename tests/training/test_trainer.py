"""Trainer settings: steps, evaluations, best weights, averages, skipped steps, errors."""

import itertools
import math
import warnings

import pytest
import torch
from torch import nn

from metakern.learners import MAMLLearner
from metakern.tasks import Episodes
from metakern.training import Interrupted, Trainer, TrainerConfig
from tests.conftest import assert_close
from tests.training.problems import FULL, Events, Learner, Lines, assert_same_state, make_trainer, meta_gradient


def plain(**settings):
    """A trainer with one outer step per batch, no options, and SGD with learning rate 0.05."""
    learner = settings.pop("learner", None) or Learner(outer_steps=1, dropout=0.0)
    off = {"batch_parts": 1, "max_grad_norm": None, "ema": None, "scheduled": False, "optimizer": torch.optim.SGD}
    return make_trainer(learner=learner, **{**off, **settings})


def test_an_outer_step_is_the_optimizers_along_the_mean_losss_gradient():
    trainer = plain(iterations=1, tasks=Lines())
    start = {name: p.detach().clone() for name, p in trainer.learner.named_parameters()}
    seen = []
    trainer.callbacks = (Events(lambda t, record: seen.append((record, t.learner.centres))),)
    draw = trainer._draw
    trainer._draw = lambda: seen.append(draw()) or seen[-1]
    trainer.fit()
    batch, (record, centres) = seen
    twin = Learner(outer_steps=1)
    twin.load_state_dict({**start, "seen": torch.tensor(0), "_extra_state": {"centres": centres}})
    loss = twin.losses(batch).mean()
    loss.backward()
    for name, p in trainer.learner.named_parameters():
        gradient = dict(twin.named_parameters())[name].grad
        expected = start[name] if gradient is None else start[name] - 0.05 * gradient
        assert_close(name, p.detach(), expected, 1e-12)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in twin.parameters() if p.grad is not None))
    assert record.loss == pytest.approx(loss.item(), rel=1e-12)
    assert record.grad_norm == pytest.approx(norm, rel=1e-12)
    assert (record.iteration, record.lr, record.skipped) == (1, 0.05, 0)


def test_every_outer_step_of_a_batch_sees_the_one_before():
    steps = []
    learner = Learner(outer_steps=3, dropout=0.0)
    trainer = plain(iterations=2, learner=learner)
    trainer.optimizer.register_step_post_hook(lambda *_: steps.append(learner.head.weight.detach().clone()))
    trainer.fit()
    assert len(steps) == 6
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(steps))


@pytest.mark.parametrize("parts", [2, 5])
def test_accumulated_parts_are_the_whole_batch(parts):
    gradients = []
    for batch_parts in (1, parts):
        trainer = plain(batch_parts=batch_parts)
        gradients.append(meta_gradient(trainer, trainer._draw()))
    assert sum(g is not None for g in gradients[0]) == 4
    for whole, accumulated in zip(*gradients, strict=True):
        assert (whole is None) == (accumulated is None)
        if whole is not None:
            assert_close("the accumulated gradient", accumulated, whole, 1e-12)


def test_clipping_bounds_the_step_and_the_record_has_the_norm_before():
    free, clipped = plain(iterations=1), plain(iterations=1, max_grad_norm=0.01)
    steps = []
    for trainer in (free, clipped):
        before = torch.cat([p.detach().flatten() for p in trainer.learner.parameters()])
        record = trainer.fit().records[0]
        after = torch.cat([p.detach().flatten() for p in trainer.learner.parameters()])
        steps.append(((after - before) / 0.05, record.grad_norm))
    (gradient, norm), (clipped_gradient, clipped_norm) = steps
    assert norm == clipped_norm > 0.1
    assert clipped_gradient.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert_close("the direction", clipped_gradient / 0.01, gradient / norm, 1e-3)


def test_the_average_follows_its_formula_and_is_what_is_evaluated_and_kept():
    weights = []
    trainer = plain(iterations=6, ema=0.4, eval_every=6)
    start = trainer.learner.head.weight.detach().clone()
    trainer.optimizer.register_step_post_hook(lambda *_: weights.append(trainer.learner.head.weight.detach().clone()))
    trainer.fit()
    average = start
    for step, weight in enumerate(weights, 1):
        decay = min(0.4, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    assert (1 + 1) / (10 + 1) < 0.4 < (1 + 6) / (10 + 6)  # the steps see both sides of the minimum
    assert_close("the average", trainer.average.average["head.weight"], average, 1e-12)
    last = trainer.learner.head.weight.detach().clone()
    evaluated = trainer.history.evaluations[-1][1]
    assert trainer.evaluate() == evaluated
    assert torch.equal(trainer.learner.head.weight, last)
    trainer.load_best()
    assert_close("the best weights", trainer.learner.head.weight.detach(), average, 1e-12)
    trainer.average = None
    assert trainer.evaluate() == evaluated


class Replaced(Learner):
    """Replaces some of its parameters before the fifth iteration, as clusters do that start again."""

    @torch.no_grad()
    def on_iteration(self, iteration, tasks, generator):
        if iteration == 4:
            return [self.head.weight.fill_(5.0)]
        return []


def test_the_optimizer_forgets_parameters_that_a_learner_replaces():
    learner = Replaced(outer_steps=1, dropout=0.0)
    trainer = plain(learner=learner, optimizer=torch.optim.Adam, iterations=6)
    trainer.fit()
    state = trainer.optimizer.state
    steps = {name: int(state[p]["step"]) for name, p in learner.named_parameters() if p in state}
    assert steps == {"body.weight": 6, "body.bias": 6, "head.weight": 2, "head.bias": 6}


def test_the_average_starts_anew_where_a_learner_replaces_its_parameters():
    """Other parameters go on."""
    averages = []
    learner = Replaced(outer_steps=1, dropout=0.0)
    trainer = plain(learner=learner, ema=0.9, optimizer=Still)
    trainer.callbacks = (Events(lambda t, _: averages.append({k: v.clone() for k, v in t.average.average.items()})),)
    start = {name: p.detach().clone() for name, p in learner.named_parameters()}
    trainer.average.average["body.weight"].zero_()  # a history of its own, which must not be lost
    trainer.fit()
    assert torch.equal(averages[3]["head.weight"], start["head.weight"])
    assert (averages[4]["head.weight"] == 5).all()
    assert (averages[5]["head.weight"] == 5).all()
    distances = [(average["body.weight"] - start["body.weight"]).norm() for average in averages]
    assert all(0 < b < a for a, b in itertools.pairwise(distances))


class Still(torch.optim.SGD):
    """An optimizer that moves nothing."""

    def step(self, closure=None):
        pass


def test_evaluations_draw_the_same_tasks_and_leave_training_alone():
    trainer, twin = make_trainer(), make_trainer(callbacks=[Events(lambda t, _: t.evaluate("test"))])
    assert trainer.evaluate() == trainer.evaluate()
    assert trainer.evaluate("test") != trainer.evaluate()
    trainer.fit()
    twin.fit()
    assert_same_state(twin.state_dict(), trainer.state_dict())


def test_an_evaluation_is_the_mean_over_tasks_however_they_are_parted():
    values = [make_trainer(num_tasks=n, eval_tasks=7).evaluate() for n in (2, 3, 7, 20)]
    for value in values[1:]:
        assert value == pytest.approx(values[0], rel=1e-12)


def evaluated_as(values, **settings):
    """A trained trainer whose learner reports scripted losses and accuracies."""
    learner = Learner(outer_steps=1)
    script = iter(values)
    learner.evaluate = lambda batch: dict.fromkeys(("loss", "accuracy"), torch.full((batch.num_tasks,), next(script)))
    trainer = plain(learner=learner, iterations=len(values), eval_every=1, eval_tasks=5, **settings)
    trainer.fit()
    return trainer


@pytest.mark.parametrize(
    ("monitor", "best", "iterations"), [("loss", (1.0, 2), 4), ("accuracy", (5.0, 1), 3)], ids=["loss", "accuracy"]
)
def test_training_stops_when_evaluations_do_not_become_better(monitor, best, iterations):
    trainer = evaluated_as([5.0, 1.0, 2.0, 1.0, 0.5, 0.1], monitor=monitor, patience=2)
    assert (trainer.history.best, trainer.history.best_iteration) == best
    assert trainer.iteration == iterations
    assert trainer.finished
    assert trainer.load_best() == best[1]


def test_an_evaluation_that_is_not_finite_is_never_the_best():
    trainer = evaluated_as([math.nan, 3.0, math.nan, -math.inf])
    assert (trainer.history.best, trainer.history.best_iteration) == (3.0, 2)
    hopeless = evaluated_as([math.nan, math.nan, 1.0], patience=2)
    assert hopeless.iteration == 2
    with pytest.raises(RuntimeError, match="an evaluation with a finite loss first"):
        hopeless.load_best()


def test_plateaus_lower_the_rate_after_evaluations():
    learner = Learner(outer_steps=1)
    learner.evaluate = lambda batch: {"loss": torch.ones(batch.num_tasks)}
    trainer = plain(learner=learner, iterations=4, eval_every=1)
    trainer.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(trainer.optimizer, factor=0.1, patience=1)
    rates = [record.lr for record in trainer.fit().records]
    assert rates == pytest.approx([0.05, 0.05, 0.05, 0.005])


def test_the_schedule_goes_by_iterations():
    rates = [record.lr for record in make_trainer(iterations=3).fit().records]
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(3)])


class Spoiled(Learner):
    """Its loss, or only its gradient, is not finite in given iterations."""

    def __init__(self, bad, gradient_only=False):
        super().__init__(outer_steps=1)
        self.bad, self.gradient_only, self.calls = bad, gradient_only, 0

    def meta_losses(self, batch):
        self.calls += 1
        for losses in super().meta_losses(batch):
            zero = self.head.weight.sum() * 0
            spoil = zero.abs().sqrt() if self.gradient_only else zero * math.nan
            yield losses + spoil if self.calls in self.bad else losses


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_step_that_is_not_finite_is_skipped_and_counted(gradient_only):
    weights = []
    trainer = plain(
        learner=Spoiled({2, 3, 5}, gradient_only),
        max_skipped=3,
        ema=0.5,
        callbacks=[Events(lambda t, _: weights.append((t.learner.head.weight.detach().clone(), t.average.steps)))],
    )
    history = trainer.fit()
    assert [record.skipped for record in history.records] == [0, 1, 2, 2, 3, 3]
    assert history.skipped == 3
    assert [steps for _, steps in weights] == [1, 1, 1, 2, 2, 3]
    assert torch.equal(weights[0][0], weights[2][0])
    assert not torch.equal(weights[2][0], weights[3][0])
    assert all(p.isfinite().all() for p in trainer.learner.parameters())
    assert math.isfinite(history.records[1].loss) == gradient_only


def test_a_schedule_steps_over_skipped_iterations_without_a_warning():
    learner = Spoiled({1, 2})
    optimizer = torch.optim.SGD(learner.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    config = TrainerConfig(iterations=4, num_tasks=8, eval_every=4, eval_tasks=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = Trainer(learner, Lines(), optimizer, config, scheduler=schedule).fit()
    assert [record.skipped for record in history.records] == [1, 2, 2, 2]
    assert [record.lr for record in history.records] == [0.1, 0.1, 0.05, 0.05]


def test_too_many_skipped_steps_in_a_row_end_training_and_say_what_to_look_at(tmp_path):
    events = Events()
    trainer = plain(learner=Spoiled({3, 4, 5}), max_skipped=3, callbacks=[events], folder=tmp_path, checkpoint_every=1)
    with pytest.raises(RuntimeError, match=r"3 outer steps in a row .*loss nan.*lower the optimizer's lr \(0\.05\)"):
        trainer.fit()
    assert events.events[-1] == "RuntimeError"
    assert make_trainer(scheduled=False, optimizer=torch.optim.SGD, ema=None).resume(tmp_path) == 4


def test_callbacks_hear_of_everything_in_its_order(tmp_path):
    events = Events()
    history = make_trainer(tmp_path, callbacks=[events], iterations=4).fit()
    measures = ["accuracy", "loss"]
    assert events.events[:6] == ["start", 1, 2, "00000002.pt", 3, measures]
    assert events.events[-1] == "NoneType"
    assert history.evaluations[0][0] == 3
    assert history.as_dict()["records"][3]["iteration"] == 4


class Failing(Events):
    """A callback whose on_end raises."""

    def on_end(self, trainer, history, error):
        super().on_end(trainer, history, error)
        raise OSError(28, "No space left on device")


def test_a_callback_that_fails_at_the_end_does_not_keep_the_others_from_it():
    others = Events(), Events()
    with pytest.raises(OSError, match="No space left"):
        make_trainer(iterations=1, callbacks=[others[0], Failing(), others[1]]).fit()
    assert [each.events[-1] for each in others] == ["NoneType", "NoneType"]


def test_a_callback_that_fails_at_the_end_does_not_hide_what_ended_the_training(capsys):
    def stop(trainer, record):
        raise Interrupted(15, "SIGTERM: stopped")

    last = Events()
    trainer = make_trainer(callbacks=[Failing(), Events(stop), last])
    with (
        pytest.warns(RuntimeWarning, match=r"Failing\.on_end failed: .*No space left on device"),
        pytest.raises(Interrupted) as caught,
    ):
        trainer.fit()
    assert caught.value.code == 143
    assert last.events[-1] == "Interrupted"
    assert capsys.readouterr().err == "SIGTERM: stopped\n"


def test_mixed_precision_computes_in_it_and_trains():
    learner = MAMLLearner(nn.Sequential(nn.Linear(2, 8, bias=False), nn.Tanh(), nn.Linear(8, 1)), inner_lr=0.05)
    dtypes = []
    learner.model[0].register_forward_hook(lambda *call: dtypes.append(call[2].dtype))

    class Lines32(Lines):
        def sample(self, num_tasks, generator):
            return super().sample(num_tasks, generator).to(torch.float32)

        def split(self, name):
            return Lines32(name)

    config = TrainerConfig(iterations=60, num_tasks=8, mixed_precision="bf16", eval_every=30, eval_tasks=16)
    history = Trainer(learner, Lines32(), torch.optim.Adam(learner.parameters(), 0.02), config).fit()
    assert set(dtypes) == {torch.bfloat16}
    assert learner.model[0].weight.dtype == torch.float32
    assert history.records[-1].loss < 0.7 * history.records[0].loss


def test_a_precision_that_the_device_has_not_is_refused():
    with pytest.raises(RuntimeError, match="mixed_precision fp16 must run on a GPU, got device cpu"):
        make_trainer(mixed_precision="fp16")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
        ({"num_tasks": 2.0}, TypeError, "num_tasks must be an integer, got 2.0"),
        ({"patience": 0}, ValueError, "patience must be at least 1, got 0"),
        ({"seed": "x"}, TypeError, "seed must be an integer, got 'x'"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be above 0 and below inf, got 0.0"),
        ({"ema": 1.0}, ValueError, "ema must be above 0 and below 1.0, got 1.0"),
        ({"ema": "x"}, TypeError, "ema must be a number or None, got 'x'"),
        ({"mixed_precision": "fp8"}, ValueError, "mixed_precision must be None or one of bf16, fp16, got 'fp8'"),
        ({"device": 0}, TypeError, "device must be a string, got 0"),
        ({"batch_parts": 6}, ValueError, "num_tasks must be at least 6, one for each process and part, got 5"),
    ],
)
def test_bad_settings_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        make_trainer(**settings)


def test_bad_parts_are_named():
    learner, config = Learner(), TrainerConfig(**FULL)
    optimizer = torch.optim.SGD(learner.parameters(), 0.1)
    with pytest.raises(TypeError, match=r"learner must be an nn\.Module with meta_losses and evaluate"):
        Trainer(nn.Linear(1, 1), Lines(), optimizer, config)
    with pytest.raises(TypeError, match="tasks must have sample and split"):
        Trainer(learner, [1, 2], optimizer, config)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got float"):
        Trainer(learner, Lines(), 0.1, config)
    with pytest.raises(ValueError, match="optimizer must hold parameters of learner only, got 2 others"):
        Trainer(learner, Lines(), torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1), config)


def failing(**methods):
    learner = Learner(outer_steps=1)
    for name, method in methods.items():
        setattr(learner, name, method)
    return learner


@pytest.mark.parametrize(
    ("learner", "error", "message"),
    [
        (lambda: failing(meta_losses=lambda batch: iter([torch.zeros(())])), ValueError, r"one loss a task, \[3\]"),
        (
            lambda: failing(meta_losses=lambda batch: iter([])),
            RuntimeError,
            "at least one tensor",
        ),
        (lambda: failing(evaluate=lambda batch: {"loss": torch.zeros(2)}), ValueError, r"loss must have shape \[4\]"),
        (lambda: failing(evaluate=lambda b: {"x": torch.zeros(b.num_tasks)}), ValueError, "monitor must be one of"),
        (lambda: Uneven(), RuntimeError, "as many tensors for every part of a batch"),
    ],
    ids=["loss", "none", "measure", "monitor", "uneven"],
)
def test_what_a_learner_must_give(learner, error, message):
    with pytest.raises(error, match=message):
        plain(learner=learner(), iterations=1, num_tasks=6, eval_tasks=4, batch_parts=2).fit()


class Uneven(Learner):
    """Takes as many outer steps as its number of earlier calls."""

    calls = 0

    def meta_losses(self, batch):
        self.calls += 1
        for _ in range(self.calls):
            yield self.losses(batch)


def test_interrupted_ends_a_process_with_the_signals_code():
    error = Interrupted(15, "SIGTERM: stopped")
    assert (error.code, str(error)) == (143, "SIGTERM: stopped")


class Sums(nn.Module):
    """A model of two inputs, by keyword, that returns its output in a dict."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": self.left(left) + self.right(right)}


class Pairs:
    """y = a·left + b·right with a and b of a task's own around 1 and 2."""

    def sample(self, num_tasks: int, generator: torch.Generator) -> Episodes:
        numbers = torch.randn(num_tasks, 12, 2, generator=generator)
        slopes = torch.randn(num_tasks, 2, 1, generator=generator) / 10 + torch.tensor([[1.0], [2.0]])
        y = numbers @ slopes
        x = [{"left": part[..., :1], "right": part[..., 1:]} for part in (numbers[:, :6], numbers[:, 6:])]
        return Episodes(x[0], y[:, :6], x[1], y[:, 6:])

    def split(self, name: str) -> "Pairs":
        return self


def test_a_model_of_several_inputs_and_an_output_in_a_dict() -> None:
    learner = MAMLLearner(Sums(), loss=lambda output, y: nn.functional.mse_loss(output["sum"], y), inner_lr=0.1)
    config = TrainerConfig(iterations=60, num_tasks=8, eval_every=30, eval_tasks=16, batch_parts=2)
    trainer = Trainer(learner, Pairs(), torch.optim.Adam(learner.parameters(), 0.1), config)
    before = trainer.evaluate("valid")["loss"]
    trainer.fit()
    assert trainer.evaluate("valid")["loss"] < 0.05 * before
