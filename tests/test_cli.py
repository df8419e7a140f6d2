"""The command line through its real entry point: what it writes, and errors in one line."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from metakern.evaluation import Curve
from metakern.rules import CoordinatewiseLSTM


def metakern(*arguments: str, cwd) -> subprocess.CompletedProcess:
    environment = os.environ | {"COLUMNS": "120", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "metakern", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short training run and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    arguments = "train optimizer --output out --episodes 2 --networks 2 --steps 4 --unroll 2 --hidden-size 6 --seed 5"
    result = metakern(*arguments.split(), cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "out", result


def test_training_writes_weights_history_and_a_figure(trained):
    folder, result = trained
    assert "best validation loss" in result.stdout
    assert "episode 2/2: loss" in result.stdout  # without a terminal, lines take the place of the progress bar
    rule = CoordinatewiseLSTM.from_pretrained(str(folder))
    assert rule.hidden_size == 6
    history = json.loads((folder / "training.json").read_text())
    assert len(history["episodes"]) == 2
    assert history["config"]["steps"] == 4
    assert history["command"].startswith("metakern train optimizer --output out")
    assert history["environment"]["torch"] == torch.__version__
    assert (folder / "training.png").stat().st_size > 10_000


def test_the_seed_repeats_a_run(trained, tmp_path):
    folder, _ = trained
    arguments = "train optimizer --output again --episodes 2 --networks 2 --steps 4 --unroll 2 --hidden-size 6 --seed 5"
    assert metakern(*arguments.split(), cwd=tmp_path).returncode == 0
    first, second = (CoordinatewiseLSTM.from_pretrained(str(path)) for path in (folder, tmp_path / "again"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_evaluation_prints_both_tables_and_writes_figures(trained, tmp_path):
    folder, _ = trained
    result = metakern("eval", "optimizer", str(folder), "--networks", "2", "--steps", "15", "--speed", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    titles = ("Training loss of 2 unseen networks after 15 steps", "Seconds per meta-iteration")
    for text in (*titles, "Learned LSTM", "SGD", "Momentum 0.9", "RMSprop", "Adam", "metakern, fused", "plain PyTorch"):
        assert text in result.stdout
    figures = json.loads((folder / "results.json").read_text())
    assert [row["optimizer"] for row in figures["optimizers"]][:2] == ["Learned LSTM", "SGD"]
    assert len(figures["optimizers"][0]["curve_mean"]) == 16
    assert figures["speed"]["ratio"] > 0
    assert (folder / "curves.png").stat().st_size > 10_000


def test_quadratics_are_trained_without_preprocessing(tmp_path):
    arguments = "train optimizer --problem quadratics --output q --episodes 1 --networks 2 --steps 4 --unroll 2"
    result = metakern(*arguments.split(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rule = CoordinatewiseLSTM.from_pretrained(str(tmp_path / "q"))
    assert (rule.preprocess, rule.output_scale) == ("none", 1.0)
    assert metakern("eval", "optimizer", "q", "--networks", "2", "--steps", "3", cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "q" / "results.json").read_text())["problem"] == "quadratics"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train optimizer --steps 10 --unroll 3", "unroll must divide steps, 10, got 3"),
        ("train optimizer --preprocess best", "preprocess must be one of none, log_sign, log_and_clip, got 'best'"),
        ("train optimizer --backend tpu", "backend must be one of auto, cpp, cuda, triton, reference, got 'tpu'"),
        ("eval optimizer nowhere", "'nowhere' is not a folder, and pretrained rule must be one of digits_lstm"),
        ("eval optimizer x[/a]", "'x[/a]' is not a folder"),
        ("train optimizer --lr inf", "lr must be positive and finite, got inf"),
    ],
)
def test_errors_are_one_line_that_names_what_is_wrong(arguments, message, tmp_path):
    result = metakern(*arguments.split(), cwd=tmp_path)
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_named_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    result = metakern("train", "optimizer", "--output", "file/run", cwd=tmp_path)
    assert result.returncode == 1
    assert "file/run" in result.stderr
    assert "episode" not in result.stdout


def test_a_damaged_rule_is_named(trained, tmp_path):
    folder, _ = trained
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text((folder / "config.json").read_text())
    (damaged / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    result = metakern("eval", "optimizer", str(damaged), cwd=tmp_path)
    assert result.returncode == 1
    assert "is truncated, damaged or not a safetensors file" in result.stderr


def test_the_verdict_is_the_truth():
    from metakern.cli import verdict

    curves = [Curve(name, torch.full((1, 2), loss)) for name, loss in (("Learned", 1.0), ("A", 2.0), ("B", 0.5))]
    assert verdict(curves) == "The learned optimizer does not beat: B."
    assert verdict(curves[:2]) == "The learned optimizer beats every tuned baseline."
    curves[0].losses.fill_(math.nan)
    assert verdict(curves[:2]) == "The learned optimizer does not beat: A."


def test_info_says_what_is_in_use(tmp_path):
    result = metakern("info", cwd=tmp_path)
    assert result.returncode == 0
    for text in ("cpu_capability", "compiler", torch.__version__):
        assert text in result.stdout


def test_the_rule_in_the_package_beats_every_tuned_baseline():
    """The claim of the README, on fewer networks and other draws than its table."""
    from metakern.evaluation import compare_optimizers
    from metakern.tasks import DigitsMLP

    rule = CoordinatewiseLSTM.pretrained("digits_lstm")
    learned, *baselines = compare_optimizers(rule, DigitsMLP(), num_tasks=20, seed=7)
    for baseline in baselines:
        assert learned.final.mean() < baseline.final.mean(), baseline.name
