"""Files and output of Trainer(folder=...) from Python, the same as from the command line."""

import json
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from metakern import runs
from metakern.learners import ClusteredLearner, MAMLLearner
from metakern.models import mlp
from metakern.runs.metrics import read_metrics
from metakern.tasks import Sinusoid
from metakern.training import History, Record, Trainer, TrainerConfig
from tests.pictures import coloured_share
from tests.training.problems import Learner, Lines

CONFIG = TrainerConfig(iterations=4, num_tasks=4, eval_every=2, eval_tasks=4, checkpoint_every=2)


def train(folder, learner=None, tasks=None, config=CONFIG, **options):
    torch.manual_seed(0)
    learner = learner or MAMLLearner(mlp(1, 4, 1), steps=2, inner_lr=0.01)
    optimizer = torch.optim.Adam(learner.parameters(), 1e-3, betas=(0.8, 0.9))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    trainer = Trainer(learner, tasks or Sinusoid(5, 5), optimizer, config, scheduler=schedule, folder=folder, **options)
    trainer.resume(required=False)
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("python") / "run"
    return folder, train(folder, progress=False)


def test_a_training_in_python_leaves_what_a_command_leaves(trained):
    folder, _ = trained
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if "tfevents" not in path.name}
    assert files == {
        ".lock", "config.yaml", "environment.json", "metrics.jsonl", "model.safetensors", "figures",
        "figures/learning.png", "checkpoints", "checkpoints/00000002.pt", "checkpoints/00000002.sha256",
        "checkpoints/00000004.pt", "checkpoints/00000004.sha256",
    }  # fmt: skip
    assert coloured_share(folder / "figures" / "learning.png") > 0.002


def test_its_configuration_says_what_it_was_given(trained):
    folder, _ = trained
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["learner"] == "MAMLLearner"
    assert {name: config[name] for name in asdict(CONFIG)} == asdict(CONFIG)
    assert (config["optimizer"], config["optimizer.lr"], config["optimizer.betas"]) == ("Adam", 0.001, [0.8, 0.9])
    assert (config["scheduler"], config["scheduler.T_max"]) == ("CosineAnnealingLR", 4)
    assert (config["learner.steps"], config["learner.inner_lr"]) == (2, 0.01)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["tensorboard"]
    assert environment["command"] == " ".join(["python", *sys.argv])
    with pytest.raises(ValueError, match=r"names 'MAMLLearner', which only the program that trained it can make"):
        runs.load(folder)


def test_its_metrics_and_events_are_its_history(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, trainer = trained
    iterations, evaluations = read_metrics(folder / "metrics.jsonl")
    losses = [record.loss for record in trainer.history.records]
    assert [line["loss"] for line in iterations] == losses
    assert [(line["iteration"], line["evaluation"]) for line in evaluations] == trainer.history.evaluations
    events = EventAccumulator(str(folder)).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses, rel=1e-6)


def test_its_weights_are_the_best_ones(trained):
    folder, trainer = trained
    learner = MAMLLearner(mlp(1, 4, 1), steps=2, inner_lr=0.01)
    runs.load_weights(folder, learner)
    trainer.load_best()
    assert all(map(torch.equal, learner.parameters(), trainer.learner.parameters()))


def test_progress_is_shown_unless_it_is_quiet(tmp_path, capsys):
    train(tmp_path / "shown")
    assert "iteration 4/4: loss" in capsys.readouterr().out
    train(tmp_path / "quiet", progress=False)
    train(None)
    assert capsys.readouterr().out == ""
    train(None, progress=True)
    assert "iteration 4/4: loss" in capsys.readouterr().out


def test_a_resumed_training_goes_on_in_its_folder(tmp_path, trained):
    folder, _ = trained
    train(tmp_path / "run", config=TrainerConfig(**{**asdict(CONFIG), "iterations": 2}), progress=False)
    train(tmp_path / "run", progress=False)
    both = (read_metrics(path / "metrics.jsonl")[0] for path in (tmp_path / "run", folder))
    assert len({tuple(line["loss"] for line in lines) for lines in both}) == 1


def test_learners_of_every_kind_are_recorded(tmp_path):
    """Shared weights, extra state, clusters."""
    shared = MAMLLearner(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), steps=1, inner_lr=0.01)
    shared.model[1].weight = shared.model[0].weight
    clustered = ClusteredLearner(MAMLLearner(mlp(1, 4, 1), steps=1, inner_lr=0.01), 2, pool=9, begin=1)
    for name, learner, tasks in (
        ("shared", shared, None), ("clusters", clustered, None), ("extra", Learner(), Lines()),
    ):  # fmt: skip
        trainer = train(tmp_path / name, learner, tasks, progress=False)
        assert (tmp_path / name / "model.safetensors").is_file()
        assert yaml.safe_load((tmp_path / name / "config.yaml").read_text())["learner"] == type(learner).__name__
        assert len(trainer.history.records) == 4


def test_numbers_of_numpy_are_numbers(tmp_path):
    learner = MAMLLearner(mlp(1, 4, 1), steps=1, inner_lr=0.01)
    learner.note, learner.sizes = np.float64(0.5), [np.int64(3), 4]
    train(tmp_path, learner, progress=False)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (config["learner.note"], config["learner.sizes"]) == (0.5, [3, 4])


def test_a_history_is_short_to_read():
    assert repr(History()) == "History(0 iterations, 0 evaluations)"
    records = [Record(i, 0.51239, 1.0, 0.1, 2.0, 3, 0.5) for i in range(1, 1001)]
    history = History(records, [(500, {"loss": 0.5}), (1000, {"loss": 0.4})], 0.4, 1000)
    expected = "1000 iterations, last loss 0.5124, 2 evaluations, best 0.4 after 1000, 3 outer steps skipped"
    assert repr(history) == f"History({expected})"
