"""Evolution strategies of RuleLearner: what they compute, without bias where they promise it, and what they keep."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metakern.learners import RuleLearner
from metakern.rules import Adam, CoordinatewiseLSTM, GradientDescent, GuidedAdam, make
from metakern.tasks import (
    DigitsMLP,
    GradientNoise,
    MixedOptimizees,
    ProblemBatch,
    Quadratics,
    Reparametrised,
    toy_problems,
)
from metakern.training import Trainer, TrainerConfig
from tests.learners.test_rule import draw
from tests.training.problems import assert_same_state

STRATEGIES = ("es", "pes", "noise-reuse")
every_strategy = pytest.mark.parametrize("estimator", STRATEGIES)


class Descent(nn.Module):
    """x' = x - w·g, with one weight w."""

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate, dtype=torch.float64))

    def init_state(self, params: Any) -> tuple[()]:
        return ()

    def forward(self, params: Any, grads: Any, state: tuple[()]) -> tuple[Any, tuple[()]]:
        return {"x": params["x"] - self.rate * grads["x"]}, state


class Slopes:
    """f(x) = a·x²/2 from x = 1, a ~ U(1, 1 + spread)."""

    def __init__(self, spread: float = 0.0) -> None:
        self.spread = spread

    def split(self, name: str) -> Slopes:
        return self

    def sample(self, num_tasks: int, generator: torch.Generator) -> SlopeBatch:
        return SlopeBatch(1 + self.spread * torch.rand(num_tasks, generator=generator), generator)


class SlopeBatch(ProblemBatch):
    per_task = ("factor",)

    def __init__(self, factor: Tensor, generator: torch.Generator) -> None:
        super().__init__(len(factor), generator)
        self.factor = factor

    def init_params(self) -> dict[str, Tensor]:
        return {"x": torch.ones(self.num_tasks, 1, dtype=torch.float64)}

    def loss(self, params: dict[str, Tensor]) -> Tensor:
        return self.factor * params["x"].square().sum(1) / 2

    full_loss = loss


def make_learner(estimator: str, rule: Any = None, **options: Any) -> RuleLearner:
    options = {"steps": 9, "unroll": 4, "objective": "sum", "estimator": estimator} | options
    return RuleLearner(rule or Descent(), **options)


def estimates(learner: RuleLearner, problems: Any, num_tasks: int, truncations: int) -> Tensor:
    """Meta-gradients [truncations, T, W] at fixed weights."""
    batches = (draw(problems, num_tasks, seed) for seed in range(truncations))
    return torch.stack([learner.pairs.estimate(learner.rule, batch)[1] for batch in batches])


def by_derivative(rate: float, steps: int, unroll: int | None = None) -> float:
    """Derivative by the rate of the mean loss of an episode's steps, f(x) = x²/2 from 1.

    With ``unroll``, steps before the truncation count as constants: the mean over all places where it may begin.
    """

    def of(start: int) -> float:
        w = torch.tensor(rate, dtype=torch.float64, requires_grad=True)
        x, total = torch.tensor((1 - rate) ** start, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for _ in range(min(steps - start, unroll or steps)):
            total = total + x**2 / 2
            x = x - w * x
        (slope,) = torch.autograd.grad(total, w)
        return slope.item()

    return of(0) / steps if unroll is None else sum(of(start) for start in range(0, steps, unroll)) / steps


def mean_and_error(samples: Tensor) -> tuple[float, float, float]:
    """Mean over slots and truncations, its standard error from the slots' means, and the variance of one sample."""
    slots = samples.squeeze(2).mean(0)
    return slots.mean().item(), (slots.std() / len(slots) ** 0.5).item(), samples.var().item()


@pytest.mark.parametrize("steps", [8, 7], ids=["whole truncations", "restarts inside truncations"])
def test_persistent_estimates_are_unbiased_and_truncated_ones_are_not(steps):
    """The gradient of the whole episode is known. All start alike, so slots differ in their perturbations alone."""
    truth, found = by_derivative(0.1, steps), {}
    for estimator in STRATEGIES:
        learner = make_learner(estimator, steps=steps, min_steps=steps, unroll=2)
        samples = estimates(learner, Slopes(), 20, 160)[steps:]
        found[estimator] = mean, error, variance = mean_and_error(samples)
        print(f"{estimator}: {mean:.4f} ± {error:.4f}, variance of one estimate {variance:.4f}; truth {truth:.4f}")
    for estimator in ("pes", "noise-reuse"):
        mean, error, _ = found[estimator]
        assert abs(mean - truth) < 4 * error
        assert error < 0.1 * abs(truth)
    mean, error, variance = found["es"]
    assert abs(mean - truth) > 10 * error
    assert variance < found["pes"][2]
    if steps == 8:  # phases are then the same for all lives
        phases = [by_derivative(0.1, steps, 2)]
        assert mean == pytest.approx(sum(phases), rel=0.2)


class ByHand:
    """The estimates of one slot from their definition, step by step; data and perturbations come from the learner."""

    def __init__(self, estimator: str, sigma: float) -> None:
        self.estimator, self.sigma = estimator, sigma
        self.factor = 0.0

    def begin(self, slope: float, length: int) -> None:
        self.x, self.slope, self.age, self.length = [1.0, 1.0], slope, 0, length

    def truncation(self, rate: float, noise: float, later: float, unroll: int, new: tuple[float, int]) -> float:
        """One estimate: ``noise`` is ε as the truncation begins, ``later`` is that of a problem that begins in it."""
        self.factor = self.factor + noise if self.estimator == "pes" else noise
        difference, estimate = 0.0, 0.0
        for _ in range(unroll):
            if self.age == self.length:
                estimate += difference * self.factor / (2 * self.sigma)
                difference, noise, self.factor = 0.0, later, later
                self.begin(*new)
            for k, sign in enumerate((1, -1)):
                difference += sign * self.slope * self.x[k] ** 2 / 2 / unroll
                self.x[k] -= (rate + sign * self.sigma * noise) * self.slope * self.x[k]
            self.age += 1
        if self.estimator == "es":
            self.x[1] = self.x[0]
        return estimate + difference * self.factor / (2 * self.sigma)


def learned(rate: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(rate, dtype=torch.float64))


@every_strategy
@pytest.mark.parametrize("make_rule", [Descent, lambda: GradientDescent(learned(0.1))], ids=["any rule", "copies"])
def test_estimates_are_those_of_the_definition(make_rule, estimator):
    """Over twelve truncations in which problems end at all places, also at their borders."""
    learner, begun, left = make_learner(estimator, make_rule(), min_steps=4, sigma=0.05), [], set()
    noise = learner.pairs._noise
    begin = noise.begin
    noise.begin = lambda draws: (begin(draws), begun.append(noise.epsilon))
    slots = [ByHand(estimator, 0.05) for _ in range(5)]
    for seed in range(12):
        batch = draw(Slopes(1.0), 5, seed)
        _, actual = learner.pairs.estimate(learner.rule, batch)
        flight = learner.pairs._flight
        for slot, hand in enumerate(slots):
            slope, age, length = batch.factor[slot].item(), flight.ages[slot], flight.lengths[slot]
            if not seed:
                hand.begin(slope, length if age == 4 else 4 - age)
            left.add(hand.length - hand.age)
            now, later = (epsilon[slot].item() for epsilon in (begun[-1], noise.epsilon))
            expected = hand.truncation(0.1, now, later, 4, (slope, length))
            assert actual[slot].item() == pytest.approx(expected, rel=1e-9)
            assert (hand.age, hand.length) == (age, length)
            assert 4 <= length <= 9 or not seed
    assert {0, 1, 2, 3, 4, 5} <= left


@every_strategy
@pytest.mark.parametrize(
    "problems", [GradientNoise(DigitsMLP(3, batch_size=4), 0.1), toy_problems()], ids=["digits", "mixed"]
)
def test_processes_that_share_slots_have_their_estimates(problems, estimator):
    """Each keeps the problems of its slice."""
    rule = CoordinatewiseLSTM(4)
    learners = [make_learner(estimator, rule, objective="relative-log") for _ in range(3)]
    for seed in range(5):
        parts = [draw(problems, 6, seed).select(part) for part in (slice(0, 6), slice(0, 2), slice(2, 6))]
        whole, *shares = (one.pairs.estimate(rule, part) for one, part in zip(learners, parts, strict=True))
        for expected, *found in zip(whole, *shares, strict=True):
            torch.testing.assert_close(torch.cat(found), expected, rtol=2e-3, atol=2e-3)
    assert whole[1].abs().max() > 0.01


@every_strategy
def test_weights_with_a_task_axis_step_a_group_at_once(estimator, monkeypatch):
    """The estimates are those of one copy of the rule a problem, and an even mixture stays in a group of each kind."""
    rule = GuidedAdam(3)
    torch.nn.init.normal_(rule.output_weight)
    problems = MixedOptimizees([DigitsMLP(3, batch_size=4), Quadratics(3)], even=True)
    learners = [make_learner(estimator, copy.deepcopy(rule), objective="relative-log") for _ in range(2)]
    for seed in range(5):
        found = []
        for rows, one in zip((True, False), learners, strict=True):
            monkeypatch.setattr(GuidedAdam, "takes_copies", rows)
            found.append(one.pairs.estimate(one.rule, draw(problems, 5, seed)))
            assert [part.slots for part in one.pairs._flight.parts] == [(0, 1, 2), (3, 4)]
        for expected, actual in zip(*found, strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)
    assert found[0][1].abs().max() > 0.01


@every_strategy
def test_the_trainer_gets_the_mean_of_the_estimates(estimator):
    learner = make_learner(estimator, CoordinatewiseLSTM(4))
    twin = copy.deepcopy(learner)
    (losses,) = learner.meta_losses(draw(Quadratics(3), 5))
    values, gradients = twin.pairs.estimate(twin.rule, draw(Quadratics(3), 5))
    assert torch.equal(losses.detach(), values)
    losses.mean().backward()
    actual = torch.cat([p.grad.flatten() for p in learner.parameters()])
    torch.testing.assert_close(actual, gradients.mean(0))


@every_strategy
@pytest.mark.parametrize("objective", ["log", "relative-log", "last"])
def test_objectives_are_those_of_the_losses_before_each_update(objective, estimator):
    """Against the mean over many pairs of the derivative by autograd; one truncation is a whole life."""
    by_loss = {
        "log": lambda losses: (losses + 1e-3).log().mean(),
        "relative-log": lambda losses: (losses / (losses[0].detach() + 1e-6) + 1e-6).log().mean(),
        "last": lambda losses: losses[-1],
    }
    w = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    x, losses = torch.ones((), dtype=torch.float64), []
    for _ in range(4):
        losses.append(x**2 / 2)
        x = x - w * x
    (truth,) = torch.autograd.grad(by_loss[objective](torch.stack(losses)), w)
    learner = make_learner(estimator, steps=4, objective=objective, sigma=1e-3)
    for seed in range(2):  # the first ones end at random
        _, gradients = learner.pairs.estimate(learner.rule, draw(Slopes(), 8, seed))
        if learner.pairs._flight.ages == [4] * 8:
            break
        learner.pairs._flight.ages = learner.pairs._flight.lengths
    epsilon = learner.pairs._noise.epsilon
    torch.testing.assert_close(gradients, truth * epsilon**2, rtol=1e-3, atol=1e-6)


@every_strategy
def test_what_diverges_counts_as_no_difference(estimator):
    learner, calm = (make_learner(estimator, CoordinatewiseLSTM(4)) for _ in range(2))
    calm.rule = learner.rule
    for seed in range(3):
        batch, twin = draw(Quadratics(3), 4, seed), draw(Quadratics(3), 4, seed)
        batch.target[1] = torch.nan
        (losses,) = learner.meta_losses(batch)
        gradients = learner.pairs.estimate(learner.rule, draw(Quadratics(3), 4, 9))[1] if seed == 2 else None
        (expected,) = calm.meta_losses(twin)
        assert losses.isfinite().all()
        torch.testing.assert_close(losses[[0, 2, 3]], expected[[0, 2, 3]])
    assert gradients is not None
    assert gradients.isfinite().all()


def test_lives_are_log_uniform_and_begin_desynchronised():
    learner = make_learner("pes", steps=1000, min_steps=10)
    assert [learner.pairs._length(share) for share in (0.0, 0.5, 1 - 1e-9)] == [10, 100, 1000]
    learner.pairs.estimate(learner.rule, draw(Slopes(), 200))
    flight = learner.pairs._flight
    left = torch.tensor([length for age, length in zip(flight.ages, flight.lengths, strict=True) if age == 4])
    assert left.unique().numel() > 60  # of all lives that did not end in the first truncation
    assert (left < 10).any()


def test_differences_are_limited():
    options = {"sigma": 0.1, "min_steps": 4}
    free, limited = (make_learner("pes", max_difference=limit, **options) for limit in (None, 1e-3))
    for seed in range(2):
        for one in (free, limited) if seed else ():
            one.pairs._flight.ages = one.pairs._flight.lengths  # all end now, and none in the truncation
        found, small = (one.pairs.estimate(one.rule, draw(Slopes(), 6, seed))[1] for one in (free, limited))
    factor = limited.pairs._noise.factor
    assert (found / factor).abs().max() > 1e-3 / 0.2
    assert (small / factor).abs().max() == pytest.approx(1e-3 / 0.2)


TOGETHER = {
    "coordinatewise-lstm": {"hidden_size": 4},
    "rnnprop": {"hidden_size": 4},
    "meta-lstm": {"hidden_size": 4},
    "hierarchical-rnn": {"attention": True},
    "small-fc-lopt": {},
    "adam": {},
    "momentum": {},
    "sgd": {},
}


def no_copies(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(rule), "takes_copies", False)


@every_strategy
@pytest.mark.parametrize("problems", [DigitsMLP(3, batch_size=4), toy_problems()], ids=["digits", "mixed"])
@pytest.mark.parametrize("name", TOGETHER)
def test_all_in_one_launch_gives_what_each_problem_alone_gives(name, problems, estimator, monkeypatch):
    """With problems that end and begin in truncations."""
    torch.manual_seed(0)
    rule = make(name, TOGETHER[name], learned=True)
    found = []
    for together in (True, False):
        if not together:
            no_copies(rule, monkeypatch)
        learner = make_learner(estimator, rule, objective="log")
        assert rule.can_take_copies() is together
        found.append([learner.pairs.estimate(rule, draw(problems, 4, seed)) for seed in range(3)])
    for (losses, gradients), (expected, slopes) in zip(*found, strict=True):
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients, slopes, rtol=2e-3, atol=2e-3)
    assert gradients.abs().max() > 1e-4


def test_kinds_of_two_dtypes_give_what_each_problem_alone_gives(monkeypatch):
    """By a rule that steps all kinds at once where it can."""
    torch.manual_seed(0)
    rule, found = make("hierarchical-rnn", learned=True), []
    problems = MixedOptimizees([Slopes(), Quadratics(3)], even=True)
    for together in (True, False):
        if not together:
            no_copies(rule, monkeypatch)
        learner = make_learner("pes", rule, objective="log")
        found.append([learner.pairs.estimate(rule, draw(problems, 4, seed)) for seed in range(3)])
    for (losses, gradients), (expected, slopes) in zip(*found, strict=True):
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients, slopes, rtol=2e-3, atol=2e-3)
    assert gradients.abs().max() > 1e-4


@pytest.mark.parametrize("rates", [{"x": torch.full((3,), 0.05)}, {"*": torch.tensor(0.05)}, [torch.tensor(0.05)]])
def test_rates_of_every_kind_are_copied(rates, monkeypatch):
    lr = {k: nn.Parameter(r) for k, r in rates.items()} if isinstance(rates, dict) else [nn.Parameter(r) for r in rates]
    rule, found = GradientDescent(lr, clip_norm=0.5), []
    for together in (True, False):
        if not together:
            no_copies(rule, monkeypatch)
        learner = make_learner("pes", rule, sigma=0.1)
        found.append(torch.stack([learner.pairs.estimate(rule, draw(Quadratics(3), 4, s))[1] for s in range(3)]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert found[0].abs().max() > 0.01


def test_rates_that_differ_by_step_are_not_copied():
    """All tasks share one count of steps, and problems begin at different times."""
    params = {"x": torch.zeros(3)}
    assert make("meta-sgd", params=params).can_take_copies()
    assert not make("lslr", {"steps": 9}, params=params).can_take_copies()


def training(folder: Any, estimator: str, problems: Any, iterations: int, rule: Any = None) -> Trainer:
    torch.manual_seed(0)
    learner = make_learner(estimator, rule or CoordinatewiseLSTM(4), objective="relative-log", steps=7)
    config = TrainerConfig(iterations=iterations, num_tasks=4, eval_tasks=2, eval_every=4, checkpoint_every=2, keep=9)
    optimizer = torch.optim.Adam(learner.parameters(), 1e-2)
    trainer = Trainer(learner, problems, optimizer, config, folder=folder)
    trainer.callbacks = ()
    return trainer


@every_strategy
@pytest.mark.parametrize(
    ("problems", "make"),
    [
        (GradientNoise(DigitsMLP(3, batch_size=4), 0.1), lambda: CoordinatewiseLSTM(4)),
        (MixedOptimizees([toy_problems(), Quadratics(2)]), lambda: CoordinatewiseLSTM(4)),
        (MixedOptimizees([Reparametrised(Quadratics(3)), Quadratics(2)], even=True), lambda: GuidedAdam(3)),
    ],
    ids=["digits", "mixed", "even"],
)
def test_training_goes_on_to_the_same_bits(problems, make, estimator, tmp_path):
    """Problems in flight, their draws, the pair's states, ε and A are in the checkpoint."""
    torch.manual_seed(1)
    rule = make()
    whole = training(tmp_path / "whole", estimator, problems, 6, copy.deepcopy(rule))
    whole.fit()
    parted = training(tmp_path / "parted", estimator, problems, 4, copy.deepcopy(rule))
    parted.fit()
    again = training(tmp_path / "parted", estimator, problems, 6, rule)
    assert again.resume() == 4
    again.fit()
    assert_same_state(again.learner.state_dict(), whole.learner.state_dict())
    assert len(whole.learner.state_dict()["pairs._extra_state"]["shares"]) == 1
    assert whole.best_weights["pairs._extra_state"] == {"shares": []}


def test_states_of_other_runs_are_refused(tmp_path):
    problems = Quadratics(3)
    training(tmp_path, "pes", problems, 2).fit()
    with pytest.raises(ValueError, match="the problems in flight must be of NoiseReuse, got 'PES'"):
        training(tmp_path, "noise-reuse", problems, 4).resume()
    two = training(tmp_path, "pes", problems, 4)
    two.learner.set_process(0, 2)
    with pytest.raises(ValueError, match="are those of 1 processes, and this run has 2: start 1"):
        two.resume()
    other = training(tmp_path, "pes", Quadratics(4), 4)
    other.resume()
    with pytest.raises(ValueError, match=r"saved weight must be 8 of \[torch.Size\(\[4, 4\]\)\]"):
        other.fit()


@pytest.mark.parametrize(
    "rule", [Adam(nn.Parameter(torch.tensor(0.01))), GradientDescent(nn.Parameter(torch.tensor(0.01)))]
)
@every_strategy
def test_rules_with_other_states_train_too(rule, estimator):
    learner = make_learner(estimator, rule)
    for seed in range(4):
        (losses,) = learner.meta_losses(draw(toy_problems(), 6, seed))
        losses.mean().backward()
    assert 0 < next(rule.parameters()).grad.abs() < torch.inf


@every_strategy
def test_a_learned_start_is_perturbed_with_the_other_weights(estimator):
    """Each of a pair starts from its own; the estimate of the start's gradient has the right direction."""
    torch.manual_seed(0)
    rule = make("meta-lstm-with-start", params={"x": torch.full((3,), 2.0)})
    learner = make_learner(estimator, rule, steps=4, sigma=1e-3)
    total, truth = torch.zeros(3), torch.zeros(3)
    for seed in range(40):
        batch = draw(Quadratics(3), 8, seed)
        if learner.pairs._flight is not None:
            learner.pairs._flight.ages = learner.pairs._flight.lengths
        gradients = learner.pairs.estimate(rule, batch)[1]
        place = next(i for i, (name, _) in enumerate(rule.named_parameters()) if name.startswith("initial"))
        first = sum(p.numel() for p in list(rule.parameters())[:place])
        if seed:
            total += gradients[:, first : first + 3].mean(0)
            start = rule.initialisation()["x"].detach().expand(8, 3).clone().requires_grad_()
            truth += torch.autograd.grad(batch.loss({"x": start}).sum(), start)[0].mean(0)
        starts = [copied.initialisation()["x"] for copied in learner.pairs._copies.rules[:2]]
    assert torch.equal(learner.pairs._copies.rows[:2, first : first + 3], torch.stack(starts))
    assert not torch.equal(*starts)
    assert torch.cosine_similarity(total, truth, dim=0) > 0.5


class Plain:
    """A user's batch that only follows the protocol."""

    num_tasks = 3


def fixed_rule(learner: RuleLearner) -> None:
    RuleLearner(Adam(0.1), estimator="pes")


def fewer_problems(learner: RuleLearner) -> None:
    for number in (3, 2):
        next(learner.meta_losses(draw(Slopes(), number)))


def parts(learner: RuleLearner) -> None:
    learner.on_iteration(0, Slopes(), torch.Generator())
    for _ in range(2):
        next(learner.meta_losses(draw(Slopes(), 3)))


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda learner: next(learner.meta_losses(Plain())), TypeError, "batch must be of problems derived from metak"),
        (fixed_rule, ValueError, "rule must have weights to learn, got a Adam without any"),
        (fewer_problems, ValueError, "batch must have a problem for each of 3 slots, got 2"),
        (parts, ValueError, "batch_parts must be 1 with estimator 'pes', which keeps a problem for every task"),
    ],
)
def test_what_cannot_be_kept_is_refused(act, error, message):
    with pytest.raises(error, match=message):
        act(make_learner("pes"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"estimator": "reinforce"}, ValueError, "estimator must be one of tbptt, es, pes, noise-reuse, got 'rei"),
        ({"sigma": 0.1}, ValueError, "sigma belongs to the estimators es, pes, noise-reuse, got sigma=0.1 with esti"),
        ({"min_steps": 5}, ValueError, "min_steps belongs to the estimators es, pes, noise-reuse"),
        ({"max_difference": 1.0}, ValueError, "max_difference belongs to the estimators es, pes, noise-reuse"),
        ({"estimator": "pes", "second_order": True}, ValueError, "second_order differentiates .*'pes' never"),
        ({"estimator": "pes", "sigma": 0.0}, ValueError, "sigma must be positive and finite, got 0.0"),
        ({"estimator": "pes", "sigma": "a"}, TypeError, "sigma must be a number, got 'a'"),
        ({"estimator": "es", "max_difference": -1}, ValueError, "max_difference must be positive and finite, got -1"),
        ({"estimator": "es", "min_steps": 19}, ValueError, "min_steps must be from unroll, 20, to steps, 100, got 19"),
        ({"estimator": "es", "min_steps": 101}, ValueError, "min_steps must be from unroll, 20, to steps, 100, got"),
        ({"estimator": "es", "steps": 10}, ValueError, "min_steps must be from unroll, 20, to steps, 10, got 20"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_together_are_named(options, error, message):
    with pytest.raises(error, match=message):
        RuleLearner(Descent(), **options)
