"""train optimizer --scales: learned factors of the updates, kept with the run and used in its evaluation."""

from __future__ import annotations

import json

import pytest
import torch

from metakern import runs
from metakern.cli.optimizer import OptimizerSettings
from metakern.evaluation.optimizers import rule_curve
from metakern.learners import ScaledRuleLearner
from metakern.rules import Adam
from metakern.runs.problems import make_rule_learner
from tests.cli.commands import invoke, succeed

TRAIN = (
    "train optimizer --problem digits-regression --rule adam --episodes 2 --networks 2 --steps 4 --unroll 2 "
    "--eval-tasks 2 --quiet"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with a factor for each kind of problem."""
    folder = tmp_path_factory.mktemp("scaled") / "run"
    succeed(f"{TRAIN} --scales shapes --scale-rate 5 --output {folder}")
    return folder


@pytest.mark.parametrize(("scales", "number"), [("one", 1), ("shapes", 4)])
def test_scales_make_a_learner_with_so_many_factors(scales, number):
    settings = OptimizerSettings(problem="digits", scales=scales, scale_rate=3.0).resolved()
    learner = make_rule_learner(settings)
    assert isinstance(learner, ScaledRuleLearner)
    assert (learner.factors().tolist(), learner.rule.rate) == ([1.0] * number, 3.0)
    labels = learner.label(runs.problems.make_problems(settings).sample(2, torch.Generator()))
    assert labels.tolist() == [number // 4] * 2  # digits are networks of two matrices


def test_factors_are_kept_with_the_run(trained):
    content = json.loads((trained / "training.json").read_text())
    first, *others = content["scales"]
    assert first != 1.0  # linear models
    assert others == [1.0, 1.0, 1.0]  # kinds that the problem has none of
    run = runs.load(trained)
    assert run.learner.factors().tolist() == content["scales"]
    assert type(run.rule).__name__ == "Adam"


def test_a_run_without_its_factors_is_not_loaded(trained, tmp_path):
    (tmp_path / "run").mkdir()
    for path in trained.iterdir():
        if path.is_file() and path.name != "training.json":
            (tmp_path / "run" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"lacks the factors of its run, which training\.json holds"):
        runs.load(tmp_path / "run")
    (tmp_path / "run" / "training.json").write_text('{"config": {"scales": "shapes"}, "scale_offsets": [1.0]}')
    with pytest.raises(ValueError, match="does not hold a run's factors"):
        runs.load(tmp_path / "run")


def test_evaluation_scales_the_updates(trained, tmp_path):
    """With Adam, whose update is its rate times a direction, a factor is a factor of the rate."""
    rate = runs.load(trained).rule.lr.item()

    def final(factor, folder):
        content = json.loads((trained / "training.json").read_text())
        content["scale_offsets"][0] = float(torch.tensor(factor).log()) / 5
        (trained / "training.json").write_text(json.dumps(content))
        succeed(f"eval optimizer {trained} --networks 2 --steps 3 --quiet --output {folder}")
        return json.loads((folder / "results.json").read_text())["optimizers"][0]

    doubled, stopped = final(2.0, tmp_path / "doubled"), final(0.0, tmp_path / "stopped")
    assert stopped["curve_mean"] == [stopped["curve_mean"][0]] * 4  # without updates losses stay
    assert doubled["optimizer"] == "Adam, scaled"
    problems = runs.load(trained).tasks.split("test")
    expected = rule_curve(Adam(lr=2 * rate), problems, num_tasks=2, steps=3, seed=1000)
    assert doubled["curve_mean"] == pytest.approx(expected.mean(1).tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--scales kinds", "scales must be one of none, one, shapes, got 'kinds'"),
        ("--scales one --estimator pes", "scales need estimator tbptt, which has gradients of them, got pes"),
        ("--scales one --scale-rate 0", "scale_rate must be positive and finite, got 0.0"),
        ("--scale-rate 2", "--scale-rate has no meaning with --scales none, where no factors are learned"),
    ],
)
def test_what_does_not_fit_together_is_named_and_nothing_starts(options, message, tmp_path):
    result = invoke(f"train optimizer {options} --output {tmp_path}/run")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())
