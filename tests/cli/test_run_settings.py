"""Settings of a run that is resumed, repeated or evaluated; and the choice of its folder."""

import json
import math
from dataclasses import asdict

import pytest
import yaml

from metakern.cli.common import chosen
from metakern.cli.fewshot import MAMLSettings
from metakern.cli.optimizer import OptimizerSettings
from metakern.training import FolderLock
from tests.cli.commands import SINUSOID, SMALL, invoke, metrics, succeed

COSINE = f"train maml {SMALL} --outer-lr 0.01 --eval-every 4 --checkpoint-every 2"


def rates(folder):
    return [line["lr"] for line in metrics(folder) if "lr" in line]


def cosine(iteration, iterations, lr=0.01):
    """The learning rate at an iteration, counted from 0."""
    return lr * (0.03 + 0.97 * (1 + math.cos(math.pi * min(1, iteration / iterations))) / 2)


# ------------------------------------------------------------------------------------------------------- the schedule


def test_a_run_that_goes_on_for_longer_keeps_its_schedule(tmp_path):
    folder = tmp_path / "run"
    succeed(f"{COSINE} --iterations 4 --output {folder} --quiet")
    printed = succeed(f"train maml --resume --iterations 8 --output {folder}")
    assert "the outer learning rate falls over 4 iterations, and stays at 3% from there on" in printed
    assert rates(folder) == pytest.approx([cosine(i, 4) for i in range(8)], rel=1e-12)
    assert rates(folder)[4:] == pytest.approx([0.0003] * 4)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["iterations"], config["decay_iterations"]) == (8, 4)
    succeed(f"train maml --config {folder}/config.yaml --output {tmp_path}/again --quiet")
    again = [line["loss"] for line in metrics(tmp_path / "again") if "loss" in line]
    assert again == [line["loss"] for line in metrics(folder) if "loss" in line]


def test_a_run_that_ends_sooner_keeps_its_schedule(tmp_path):
    folder = tmp_path / "run"
    succeed(f"{COSINE} --iterations 2 --decay-iterations 8 --output {folder} --quiet")
    printed = succeed(f"train maml --resume --iterations 4 --output {folder}")
    assert "the outer learning rate falls over 8 iterations\n" in printed
    assert rates(folder) == pytest.approx([cosine(i, 8) for i in range(4)], rel=1e-12)


def test_the_schedule_of_a_run_that_goes_on_cannot_be_changed(tmp_path):
    folder = tmp_path / "run"
    succeed(f"{COSINE} --iterations 2 --output {folder} --quiet")
    result = invoke(f"train maml --resume --iterations 4 --decay-iterations 4 --output {folder}")
    assert result.exit_code == 1
    assert "goes on as it began, not with decay_iterations from 2 to 4" in result.stderr


def test_a_configuration_without_the_schedules_length_goes_on_with_that_of_its_run(tmp_path):
    """Earlier versions wrote such configurations."""
    folder = tmp_path / "run"
    succeed(f"{COSINE} --iterations 4 --output {folder} --quiet")
    config = folder / "config.yaml"
    config.write_text("".join(x for x in config.read_text().splitlines(True) if "decay_iterations" not in x))
    succeed(f"train maml --resume --iterations 6 --output {folder} --quiet")
    assert rates(folder) == pytest.approx([cosine(i, 4) for i in range(6)], rel=1e-12)


def test_a_run_does_not_go_on_to_fewer_iterations_than_it_has_done(tmp_path):
    folder = tmp_path / "run"
    succeed(f"{COSINE} --iterations 4 --output {folder} --quiet")
    before = (folder / "config.yaml").read_text()
    result = invoke(f"train maml --resume --iterations 3 --output {folder}")
    assert result.exit_code == 1
    assert "has done 4 iterations: --iterations must be at least as many, got 3" in result.stderr
    assert (folder / "config.yaml").read_text() == before


def test_an_optimizers_run_keeps_its_schedule(tmp_path):
    options = "--networks 2 --steps 2 --unroll 2 --hidden-size 4 --eval-every 1 --eval-tasks 2 --problem rosenbrock"
    succeed(f"train optimizer {options} --episodes 2 --checkpoint-every 1 --output {tmp_path}/run --quiet")
    printed = succeed(f"train optimizer --resume --episodes 4 --output {tmp_path}/run")
    assert "falls over 2 episodes, and stays at 3% from there on" in printed
    assert rates(tmp_path / "run") == pytest.approx([cosine(i, 2) for i in range(4)], rel=1e-12)


def test_a_schedule_that_is_none_has_no_length(tmp_path):
    result = invoke(f"{COSINE} --scheduler none --decay-iterations 3 --output {tmp_path}/run")
    assert result.exit_code == 1
    assert "--decay-iterations has no meaning with --scheduler none" in result.stderr


# ------------------------------------------------------------------------------------ options beside a configuration


def config_of(tmp_path, options):
    """The configuration of a run that repeats another one with overriding options."""
    command = f"train maml --config {tmp_path}/first/config.yaml --output {tmp_path}/second --quiet"
    succeed(f"{command} {options}")
    return yaml.safe_load((tmp_path / "second" / "config.yaml").read_text())


def test_what_was_left_open_follows_the_options_beside_a_configuration(tmp_path):
    succeed(f"{SINUSOID} --iterations 2 --output {tmp_path}/first --quiet")
    config = config_of(tmp_path, "--steps 3 --iterations 4")
    assert (config["steps"], config["eval_steps"], config["iterations"], config["decay_iterations"]) == (3, 3, 4, 4)
    measures = json.loads((tmp_path / "second" / "results.json").read_text())["runs"][0]["measures"]
    assert [row["steps"] for row in measures["loss"]] == [0, 1, 2, 3]


def test_what_was_chosen_stays(tmp_path):
    succeed(f"{SINUSOID} --iterations 2 --eval-steps 4 --output {tmp_path}/first --quiet")
    assert config_of(tmp_path, "--steps 3")["eval_steps"] == 4


def test_other_tasks_bring_their_own_suggestions():
    first = MAMLSettings(tasks="sinusoid", shots=7).resolved()
    kept = chosen(MAMLSettings, asdict(first))
    second = MAMLSettings(**{**kept, "tasks": "digits"}).resolved()
    assert second == MAMLSettings(tasks="digits", shots=7).resolved()
    assert MAMLSettings(**kept).resolved() == first


def test_another_problem_brings_its_own_suggestions():
    first = OptimizerSettings(problem="quadratics").resolved()
    kept = chosen(OptimizerSettings, asdict(first))
    second = OptimizerSettings(**{**kept, "problem": "digits"}).resolved()
    assert (second.preprocess, second.output_scale) == ("log_sign", 0.1)


# --------------------------------------------------------------------------------------------------------- the folders


def test_an_evaluation_leaves_the_runs_own_results(tmp_path):
    folder = tmp_path / "run"
    succeed(f"{SINUSOID} --iterations 2 --output {folder} --quiet")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    printed = succeed(f"eval maml {folder} --steps 4 --num-tasks 8")
    assert f"results are in {folder}/eval/" in printed
    assert {path: path.read_bytes() for path in before} == before
    results = json.loads((folder / "eval" / "results.json").read_text())
    assert results["test_tasks"] == 8


def test_runs_without_a_name_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    succeed(f"{SINUSOID} --iterations 2 --quiet")
    assert "the run is in runs/maml-2/\n" in succeed(f"{SINUSOID} --iterations 2")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["maml", "maml-2"]
    first = metrics(tmp_path / "runs" / "maml")
    succeed("train maml --resume --iterations 3 --quiet")  # the newest
    assert len(metrics(tmp_path / "runs" / "maml-2")) == len(first) + 2
    succeed(f"{SINUSOID} --iterations 1 --overwrite --quiet")  # the folder of the name
    assert len(metrics(tmp_path / "runs" / "maml")) == 2
    assert len(metrics(tmp_path / "runs" / "maml-2")) == len(first) + 2


def test_a_run_that_diverged_before_its_first_checkpoint_can_be_begun_again(tmp_path):
    folder = tmp_path / "run"
    options = "--iterations 9 --outer-lr 1e30 --optimizer sgd --max-skipped 2 --checkpoint-every 9 --eval-every 9"
    result = invoke(f"train maml {SMALL} {options} --output {folder}")
    assert result.exit_code == 1
    assert "2 outer steps in a row" in result.stderr
    assert (folder / "config.yaml").is_file()
    succeed(f"{SINUSOID} --iterations 2 --output {folder} --quiet")
    assert [line["iteration"] for line in metrics(folder) if "loss" in line] == [1, 2]
    assert len(list(folder.glob("events.out.*"))) == 1


def test_a_folder_in_use_is_named_with_its_holder_in_one_line(tmp_path):
    folder = tmp_path / "run"
    succeed(f"{SINUSOID} --iterations 2 --output {folder} --quiet")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with FolderLock(folder):
        held = (folder / ".lock.json").read_bytes()
        for how in ("--overwrite", "--resume", ""):
            result = invoke(f"{SINUSOID} --iterations 2 {how} --output {folder}")
            assert result.exit_code == 1
            (line,) = result.stderr.splitlines()
            assert "is in use: process" in line
        assert (folder / ".lock.json").read_bytes() == held
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_old_names_of_options_work_with_a_warning(tmp_path):
    command = f"train maml {SMALL} --iterations 1"
    old = f"{command} --lr 0.02 --clip-norm=0.5 --accumulate 2 --output {tmp_path}/old"
    with pytest.warns(DeprecationWarning, match="is now") as caught:
        succeed(old)
    assert [str(warning.message).partition(";")[0] for warning in caught if "is now" in str(warning.message)] == [
        "--lr is now --outer-lr", "--clip-norm is now --max-grad-norm",
        "--accumulate is now --batch-parts",
    ]  # fmt: skip
    config = yaml.safe_load((tmp_path / "old" / "config.yaml").read_text())
    assert (config["outer_lr"], config["max_grad_norm"], config["batch_parts"]) == (0.02, 0.5, 2)


def test_a_configuration_with_old_names_works_with_a_warning(tmp_path):
    (tmp_path / "old.yaml").write_text("learner: maml\nlr: 0.02\n")
    with pytest.warns(DeprecationWarning, match=r"configuration .*old.yaml: lr is now outer_lr"):
        succeed(f"train maml {SMALL} --iterations 1 --config {tmp_path}/old.yaml --output {tmp_path}/run")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["outer_lr"] == 0.02


def test_an_old_name_beside_the_new_one_is_refused(tmp_path):
    (tmp_path / "old.yaml").write_text("learner: maml\nlr: 0.02\nouter_lr: 0.01\n")
    result = invoke(f"train maml {SMALL} --config {tmp_path}/old.yaml --output {tmp_path}/run")
    assert result.exit_code == 1
    assert "lr is the old name of" in result.stderr


OLD_NAMES = {
    "outer_lr": "lr",
    "max_grad_norm": "clip_norm",
    "mixed_precision": "precision",
    "batch_parts": "accumulate",
}


def test_a_run_that_began_under_old_names_goes_on(tmp_path):
    succeed(f"train maml {SMALL} --iterations 1 --output {tmp_path}/run")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    old = text
    for new, before in OLD_NAMES.items():
        old = old.replace(f"{new}:", f"{before}:")
    assert old != text
    config.write_text(old)
    with pytest.warns(DeprecationWarning, match="is now"):
        succeed(f"train maml --resume --iterations 2 --output {tmp_path}/run")
    assert "outer_lr:" in config.read_text()
    assert len(rates(tmp_path / "run")) == 2
