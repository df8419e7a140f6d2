"""Loading a run into Python with its best weights, tasks and settings."""

import json
import shutil

import pytest
import torch

from metakern import runs
from metakern.evaluation import training_curve
from metakern.evaluation.adaptation import measure_adaptation
from metakern.learners import ClusteredLearner, MAMLLearner, RuleLearner
from metakern.optim import LearnedOptimizer
from metakern.rules import CoordinatewiseLSTM
from tests.cli.commands import DIGITS, SINUSOID, succeed
from tests.tasks.pictures import write_omniglot

CLUSTERS = "--tasks regression-3 --cluster-begin 2 --iterations 6 --cluster-refresh 2"

SHARED = "--tasks regression-3 --iterations 6 --cluster-refresh 2"

KINDS = {
    "sinusoid": (f"{SINUSOID} --iterations 4", MAMLLearner),
    "digits": (DIGITS, MAMLLearner),
    "lslr": (f"{SINUSOID} --iterations 4 --rates lslr --ema 0.9", MAMLLearner),
    "anil": (f"{SINUSOID} --iterations 4 --anil --rates meta-sgd", MAMLLearner),
    "clusters": (f"{SINUSOID} {CLUSTERS} --clusters 2", ClusteredLearner),
    "soft": (f"{SINUSOID} {CLUSTERS} --clusters auto --cluster-eval-temperature 0.5", ClusteredLearner),
    "shared": (
        f"{SINUSOID} {SHARED} --clusters 3 --cluster-shared --cluster-by embedding --cluster-batches one",
        ClusteredLearner,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_measures_as_it_did_when_it_ended(kind, tmp_path):
    """Measured on the test tasks of the run's results."""
    command, learner = KINDS[kind]
    succeed(f"{command} --output {tmp_path}/run --quiet")
    run = runs.load(tmp_path / "run")
    assert type(run.learner) is learner
    assert (run.folder, run.command) == (tmp_path / "run", "maml")
    assert run.settings["steps"] == 2
    (expected,) = json.loads((tmp_path / "run" / "results.json").read_text())["runs"]
    summary = measure_adaptation(run.learner, run.tasks, num_tasks=6, name="run").summary()
    assert json.loads(json.dumps(summary)) == expected["measures"]
    assert len(repr(run)) < 500
    with pytest.raises(AttributeError, match=r"is a run of `metakern train maml` and has no rule"):
        _ = run.rule


@pytest.fixture(scope="module")
def optimizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimizer") / "run"
    options = "--episodes 2 --networks 2 --steps 4 --unroll 2 --hidden-size 6 --eval-every 1 --problem rosenbrock"
    succeed(f"train optimizer {options} --output {folder} --quiet")
    return folder


def test_a_learned_optimizer_comes_back_as_a_learner_and_as_a_rule(optimizer):
    run = runs.load(str(optimizer))
    assert isinstance(run.learner, RuleLearner)
    assert (run.learner.steps, run.learner.unroll, run.command) == (4, 2, "optimizer")
    saved = CoordinatewiseLSTM.from_pretrained(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(run.rule.parameters(), saved.parameters(), strict=True))
    curves = [
        training_curve(lambda p, r=rule: LearnedOptimizer(p, r), run.tasks, num_tasks=2, steps=3, seed=0)
        for rule in (run.rule, saved)
    ]
    assert torch.equal(*curves)


def test_images_may_have_moved(tmp_path, monkeypatch):
    write_omniglot(tmp_path / "a", monkeypatch)
    options = "--tasks omniglot --ways 2 --queries 2 --model mlp --hidden 4 --iterations 2 --eval-every 2"
    sizes = "--num-tasks 2 --eval-tasks 2 --test-tasks 2"
    succeed(f"train maml {options} {sizes} --data {tmp_path}/a --output {tmp_path}/run")
    shutil.move(tmp_path / "a", tmp_path / "b")
    with pytest.raises((ValueError, OSError), match="/a"):
        runs.load(tmp_path / "run")
    run = runs.load(tmp_path / "run", data=str(tmp_path / "b"))
    assert run.learner.evaluate(run.tasks.sample(2, torch.Generator()))["accuracy"].shape == (2,)


def test_a_run_that_has_not_ended_gives_its_best_weights_so_far(tmp_path):
    folder = tmp_path / "run"
    succeed(f"{SINUSOID} --iterations 4 --eval-every 2 --output {folder} --quiet")
    ended = runs.load(folder).learner.state_dict()
    (folder / "model.safetensors").unlink()
    so_far = runs.load(folder).learner.state_dict()
    assert all(torch.equal(so_far[name], tensor) for name, tensor in ended.items())


def test_a_configuration_that_a_person_wrote_counts_as_it_is_meant(tmp_path):
    succeed(f"{SINUSOID} --iterations 2 --inner-lr 1e-3 --output {tmp_path} --quiet")
    config = tmp_path / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("hidden: '8'", "hidden: 8").replace("inner_lr: 0.001", "inner_lr: 1e-3"))
    assert config.read_text().count("1e-3") == 1
    run = runs.load(tmp_path)
    assert (run.learner.inner_lr, run.learner.model[0].out_features) == (0.001, 8)
    config.write_text(text.replace("inner_lr: 0.001", "inner_lr: fast"))
    with pytest.raises(ValueError, match="inner_lr must be a number, got 'fast'"):
        runs.load(tmp_path)


def test_what_cannot_be_loaded_is_named(tmp_path, optimizer):
    with pytest.raises(ValueError, match=r"none/config\.yaml cannot be read: No such file"):
        runs.load(tmp_path / "none")
    folder = tmp_path / "run"
    shutil.copytree(optimizer, folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"holds no trained learner: it has no model\.safetensors, and .*no checkpoint"
    ):
        runs.load(folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("problem: rosenbrock", "problem: 3"))
    with pytest.raises(ValueError, match=r"config\.yaml does not describe a run: 3"):
        runs.load(folder)
    (folder / "config.yaml").write_text("learner: optimizer\n")
    with pytest.raises(ValueError, match=r"config\.yaml does not describe a run: .*problem"):
        runs.load(folder)
    (folder / "config.yaml").write_text("learner: Learner\n")
    with pytest.raises(ValueError, match=r"its config\.yaml names 'Learner', which only the program that trained it"):
        runs.load(folder)
