"""train optimizer with rules, problems, objectives and estimators by name, and what does not fit together."""

import json
import math

import pytest
import yaml

from metakern.cli.optimizer import OptimizerSettings
from metakern.rules import load
from metakern.rules.registry import names
from metakern.runs import load as load_run
from metakern.runs.problems import make_problems, make_rule_learner, rule_options
from metakern.tasks import MixedOptimizees, Reparametrised
from tests.cli.commands import invoke, metrics, succeed

SHORT = "--episodes 2 --networks 2 --steps 4 --unroll 2 --eval-every 1 --eval-tasks 2 --quiet"
PES = f"train optimizer {SHORT} --estimator pes --rule adam --problem mixed --objective relative-log --monitor relative"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    succeed(f"{PES} --augment tensor --optimizer rmsprop-0.9 --max-grad-element 10 --non-finite zero --output {folder}")
    return folder


def test_the_configuration_holds_rule_problem_and_estimator(trained):
    config = yaml.safe_load((trained / "config.yaml").read_text())
    chosen = {name: config[name] for name in ("rule", "problem", "estimator", "objective", "augment", "monitor")}
    assert chosen == {
        "rule": "adam", "problem": "mixed", "estimator": "pes", "objective": "relative-log", "augment": "tensor",
        "monitor": "relative",
    }  # fmt: skip
    assert (config["sigma"], config["min_steps"], config["max_difference"]) == (0.01, 2, None)
    assert (config["optimizer"], config["max_grad_element"], config["non_finite"]) == ("rmsprop-0.9", 10.0, "zero")
    assert type(load(trained)).__name__ == "Adam"
    run = load_run(trained)
    assert (run.learner.estimator, run.learner.objective) == ("pes", "relative-log")
    assert all(isinstance(kind, Reparametrised) for kind in run.tasks.distributions)


def test_a_run_goes_on_and_repeats(trained, tmp_path):
    succeed(
        f"train optimizer --config {trained}/config.yaml --episodes 4 --decay-iterations 2 --output {tmp_path}/four"
    )
    succeed(f"train optimizer --resume --episodes 4 --output {trained}")
    assert metrics(trained) == metrics(tmp_path / "four")
    assert all(math.isfinite(line["loss"]) for line in metrics(trained) if "loss" in line)
    history = json.loads((trained / "training.json").read_text())
    assert history["best"] <= math.log(1e6)


def test_every_rule_has_a_name_and_trains(tmp_path):
    """With fresh weights; those with many are made, and trained by the tests of their own."""
    for name in names():
        options = "lr=0.1" if name in ("sgd", "meta-sgd", "lslr") else None
        options = "lr=0.1,steps=4" if name == "lslr" else options
        settings = OptimizerSettings(
            rule=name, rule_options=options, problem="bowls", steps=4, unroll=2, estimator="pes"
        ).resolved()
        learner = make_rule_learner(settings)
        assert next(learner.rule.parameters()).requires_grad
        assert learner.rule.horizon == 4
    succeed(f"train optimizer {SHORT} --rule meta-sgd --problem bowls --output {tmp_path}/run")
    assert load(tmp_path / "run").rates.x.shape == (2,)


def test_options_of_a_rule_are_numbers_words_or_text():
    found = rule_options("hidden_size=4, lr=1e-3,nesterov=true,preprocess=none,backend=null")
    assert found == {"hidden_size": 4, "lr": 1e-3, "nesterov": True, "preprocess": "none", "backend": None}
    assert rule_options(None) == {}
    settings = OptimizerSettings(rule="momentum", rule_options="lr=0.5,nesterov=true", problem="booth").resolved()
    rule = make_rule_learner(settings).rule
    assert (rule.lr.item(), rule.nesterov) == (0.5, True)


def test_held_out_samples_and_scales_are_those_of_the_problems():
    settings = OptimizerSettings(loss_on="held-out", augment="coordinate", augment_spread=1.0).resolved()
    problems = make_problems(settings)
    assert (problems.share, problems.spread, len(problems.problems.inputs)) == ("coordinate", 1.0, 750)
    mixed = make_problems(OptimizerSettings(problem="mixed", augment="problem").resolved())
    assert isinstance(mixed, MixedOptimizees)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rule lamb", "rule must be one of adam, coordinatewise-lstm"),
        ("--estimator reinforce", "estimator must be one of tbptt, es, pes, noise-reuse, got 'reinforce'"),
        ("--augment all", "augment must be one of none, problem, tensor, coordinate, got 'all'"),
        ("--loss-on test", "loss_on must be one of train, held-out, got 'test'"),
        ("--problem bowls --loss-on held-out", "loss_on held-out needs a problem with samples to hold out, as digits"),
        (
            "--estimator pes --second-order",
            "second_order differentiates through gradients, which estimator 'pes' never",
        ),
        ("--estimator pes --batch-parts 2 --networks 4", "batch_parts must be 1 with estimator pes, which keeps"),
        ("--estimator pes --min-steps 200", "min_steps must be from unroll, 20, to steps, 100, got 200"),
        ("--estimator es --sigma 0", "sigma must be positive and finite, got 0.0"),
        ("--sigma 0.1", "--sigma has no meaning with --estimator tbptt; es, pes, noise-reuse perturb weights"),
        ("--min-steps 30 --max-difference 1", "--min-steps, --max-difference have no meaning with --estimator tbptt"),
        ("--augment-spread 1", "--augment-spread has no meaning with --augment none"),
        (
            "--rule adam --hidden-size 5",
            "--hidden-size has no meaning with --rule adam, whose --rule-options are lr, beta",
        ),
        ("--rule adam --backend cpp", "--backend has no meaning with --rule adam, which has none to choose"),
        ("--rule adam --rule-options rate=1", "options of rule 'adam' are lr, beta1, beta2, eps; got 'rate'"),
        ("--rule adam --rule-options lr", "rule_options must be name=value,name=value with each name once, got 'lr'"),
        ("--rule adam --rule-options lr=1,lr=2", "rule_options must be name=value,name=value with each name once"),
        ("--rule adam --rule-options lr=-1", "lr must be finite and at least 0, got -1"),
        ("--rule meta-sgd --problem mixed", "params must be given for rule 'meta-sgd'"),
        ("--objective last --unroll 1", "objective 'last' needs an unroll of at least 2, got 1"),
        ("--monitor relative", "monitor must be one of loss, got 'relative'"),
        ("--non-finite keep", "non_finite must be one of skip, zero, got 'keep'"),
    ],
)
def test_what_does_not_fit_together_is_named_and_nothing_starts(options, message, tmp_path):
    result = invoke(f"train optimizer {options} --output {tmp_path}/run")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_configuration_may_hold_what_its_estimator_leaves_without_meaning(trained, tmp_path):
    """Perturbations are those of evolution strategies alone."""
    again = f"train optimizer --config {trained}/config.yaml --quiet --episodes 1 --output"
    succeed(f"{again} {tmp_path}/run --estimator tbptt")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["estimator"], config["sigma"], config["min_steps"]) == ("tbptt", None, None)
