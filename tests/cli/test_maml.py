"""train maml and eval maml: a run's folder, repeated and resumed runs, one-line errors."""

import json
import math
import os
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
import yaml
from safetensors.torch import load_file

from metakern.cli.fewshot import MAMLSettings
from tests.cli.commands import DIGITS, ENVIRONMENT, SINUSOID, invoke, metakern, metrics, succeed
from tests.pictures import coloured_share


def measures(folder) -> list:
    """Measures of every run in results.json."""
    return [run["measures"] for run in json.loads((folder / "results.json").read_text())["runs"]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on digits and its output."""
    folder = tmp_path_factory.mktemp("maml") / "run"
    return folder, succeed(f"{DIGITS} --output {folder}")


def test_a_run_leaves_its_configuration_metrics_figures_checkpoints_versions_and_weights(run):
    folder, _ = run
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if "tfevents" not in path.name}
    assert files == {
        ".lock", "config.yaml", "environment.json", "metrics.jsonl", "model.safetensors", "results.json", "figures",
        "figures/learning.png", "figures/adaptation.png", "checkpoints", "checkpoints/00000002.pt",
        "checkpoints/00000002.sha256", "checkpoints/00000004.pt", "checkpoints/00000004.sha256",
    }  # fmt: skip


def test_the_configuration_is_complete(run):
    folder, _ = run
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config.keys() - {"learner", "metakern"} == {field.name for field in fields(MAMLSettings)}
    absent = {"data", "parameters", "mixed_precision", "rule", "rule_options"}
    assert {key for key, value in config.items() if value is None} == absent
    assert (config["tasks"], config["hidden"], config["shots"], config["seed"]) == ("digits", "8", 1, 0)


def test_metrics_are_one_json_object_a_line(run):
    folder, _ = run
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    iterations = [line for line in lines if "evaluation" not in line]
    assert [line["iteration"] for line in iterations] == [1, 2, 3, 4]
    for line in iterations:
        assert {"loss", "lr", "grad_norm", "tasks_per_second", "seconds"} <= line.keys()
        assert line["tasks_per_second"] > 0
    evaluations = [line for line in lines if "evaluation" in line]
    assert [line["iteration"] for line in evaluations] == [2, 4]
    assert all(0 <= line["evaluation"]["accuracy"] <= 1 for line in evaluations)


def test_tensorboard_shows_the_same_numbers(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = run
    events = EventAccumulator(str(folder)).Reload()
    lines = [line for line in metrics(folder) if "evaluation" not in line]
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([line["loss"] for line in lines])
    accuracies = [line["evaluation"]["accuracy"] for line in metrics(folder) if "evaluation" in line]
    assert [event.value for event in events.Scalars("valid/accuracy")] == pytest.approx(accuracies)


def test_the_figures_are_pictures_that_show_something(run):
    folder, _ = run
    for name in ("learning", "adaptation"):
        assert coloured_share(folder / "figures" / f"{name}.png") > 0.002, name


def test_without_a_terminal_the_output_is_plain_lines_and_a_table(run):
    _, printed = run
    assert "\x1b" not in printed
    assert "iteration 4/4: loss" in printed
    for text in ("tasks/s", "validation loss", "accuracy", "left", "6 unseen tasks", "inner steps"):
        assert text in printed


def test_the_environment_names_versions_and_the_command(run):
    folder, _ = run
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["environment"]["torch"] == torch.__version__
    assert environment["packages"]["tensorboard"]
    assert environment["command"].split()[0] == "metakern"


def test_the_configuration_repeats_a_run(run, tmp_path):
    folder, _ = run
    succeed(f"train maml --config {folder}/config.yaml --output {tmp_path}/again")
    assert metrics(tmp_path / "again") == metrics(folder)
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert measures(tmp_path / "again") == measures(folder)


def test_options_beside_a_configuration_override_it(run, tmp_path):
    folder, _ = run
    succeed(f"train maml --config {folder}/config.yaml --seed 1 --iterations 2 --quiet --output {tmp_path}/other")
    config = yaml.safe_load((tmp_path / "other" / "config.yaml").read_text())
    assert (config["seed"], config["iterations"], config["tasks"]) == (1, 2, "digits")
    assert metrics(tmp_path / "other")[0]["loss"] != metrics(folder)[0]["loss"]


def test_quiet_prints_nothing(tmp_path):
    assert succeed(f"{SINUSOID} --iterations 2 --quiet --output {tmp_path}/run") == ""
    assert succeed(f"eval maml {tmp_path}/run --num-tasks 4 --quiet") == ""


def test_a_run_is_not_written_over_unless_it_is_asked_for(tmp_path):
    command = f"{SINUSOID} --iterations 2 --output {tmp_path}/run"
    succeed(command)
    before = metrics(tmp_path / "run")
    result = invoke(command)
    assert result.exit_code == 1
    assert "holds a run already: --resume continues it, --overwrite replaces it" in result.stderr
    assert metrics(tmp_path / "run") == before
    succeed(f"{command} --overwrite --seed 3")
    assert len(metrics(tmp_path / "run")) == len(before)
    assert metrics(tmp_path / "run") != before


def test_two_processes_of_torchrun_train_one_run(tmp_path):
    run = f"{SINUSOID} --iterations 4 --output"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, "-m", "metakern", *run.split(), str(tmp_path / "two")],
        capture_output=True, text=True, timeout=300, env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("iteration 4/4") == 1
    assert result.stdout.count("unseen tasks") == 1
    succeed(f"{run} {tmp_path}/one")
    for two, one in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        if "loss" in one:
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    environment = json.loads((tmp_path / "two" / "environment.json").read_text())
    assert environment["processes"] == 2


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_measures_test_tasks_after_every_number_of_steps(run, tmp_path):
    folder, _ = run
    printed = succeed(f"eval maml {folder} --num-tasks 6 --output {tmp_path}/eval")
    assert measures(tmp_path / "eval") == measures(folder)  # the saved weights are those at the end of training
    (found,) = measures(folder)
    assert [row["steps"] for row in found["loss"]] == [0, 1, 2]
    accuracy = found["accuracy"][2]
    assert f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['interval']:.1f} %" in printed
    assert coloured_share(tmp_path / "eval" / "figures" / "adaptation.png") > 0.002


def test_more_steps_than_in_training_can_be_evaluated(run, tmp_path):
    folder, _ = run
    succeed(f"eval maml {folder} --num-tasks 4 --steps 4 --output {tmp_path}/eval --quiet")
    assert [row["steps"] for row in measures(tmp_path / "eval")[0]["loss"]] == [0, 1, 2, 3, 4]


def test_runs_are_compared_on_the_same_tasks(run, tmp_path):
    folder, _ = run
    succeed(f"train maml --config {folder}/config.yaml --seed 1 --clusters 2 --output {tmp_path}/other --quiet")
    printed = succeed(f"eval maml {folder} {tmp_path}/other --num-tasks 6 --output {tmp_path}/eval")
    assert "other" in printed
    assert measures(tmp_path / "eval") == [*measures(folder), *measures(tmp_path / "other")]
    assert coloured_share(tmp_path / "eval" / "figures" / "clusters-other.png") > 0.0005
    assert coloured_share(tmp_path / "eval" / "figures" / "learning.png") > 0.002


def test_runs_of_different_tasks_are_not_compared(run, tmp_path):
    folder, _ = run
    succeed(f"{SINUSOID} --iterations 2 --output {tmp_path}/other --quiet")
    result = invoke(f"eval maml {folder} {tmp_path}/other --output {tmp_path}/eval")
    assert result.exit_code == 1
    kinds = "digits, 5-way 1-shot with 3 queries; sinusoid, 10-shot with 10 queries"
    assert f"runs must be of the same tasks to be compared, got {kinds}" in result.stderr


def test_a_folder_without_a_run_is_named(tmp_path):
    result = invoke(f"eval maml {tmp_path}/none")
    assert result.exit_code == 1
    assert "none/config.yaml cannot be read: No such file or directory" in result.stderr


# ---------------------------------------------------------------------------------------------------- the other options


@pytest.mark.parametrize(
    "options",
    [
        "--rates lslr", "--rates meta-sgd", "--first-order", "--anil", "--parameters 0.*", "--optimizer sgd",
        "--ema 0.9 --max-grad-norm 1 --batch-parts 2",
        "--tasks regression-3 --shots 4", "--tasks digits-domains --queries 2", "--rule meta-sgd", "--rule lslr",
    ],
)  # fmt: skip
def test_a_run_with(options, tmp_path):
    succeed(f"{SINUSOID} --iterations 2 {options} --output {tmp_path}/run --quiet")
    assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path / "run") if "loss" in line)
    assert (tmp_path / "run" / "results.json").is_file()


@pytest.mark.filterwarnings("ignore:plain PyTorch serves this small MLP")
def test_a_rule_for_the_inner_steps_is_learned_and_found_again(tmp_path):
    printed = succeed(f"{SINUSOID} --iterations 3 --rule adam --inner-lr 0.02 --output {tmp_path}/run")
    assert "inner steps of 0.02 by adam" in printed
    rate = load_file(tmp_path / "run" / "model.safetensors")["rule.lr"]
    assert rate.item() != pytest.approx(0.02, rel=1e-6)
    before = measures(tmp_path / "run")
    succeed(f"eval maml {tmp_path}/run --num-tasks 6 --quiet")
    assert measures(tmp_path / "run") == before


@pytest.mark.filterwarnings("ignore:plain PyTorch serves this small MLP")
@pytest.mark.parametrize(
    ("options", "weight", "size"),
    [
        ("--rule meta-lstm --rule-options hidden_size=4", "rule.lstm.weight_hh_l0", 4),
        ("--rule coordinatewise-lstm --rule-options num_layers=1,hidden_size=3", "rule.lstm.weight_hh_l0", 3),
    ],
)
def test_a_learned_rule_adapts_to_few_shots_with_its_own_options(options, weight, size, tmp_path):
    printed = succeed(f"{DIGITS} --iterations 3 {options} --first-order --output {tmp_path}/run")
    assert f"inner steps by {options.split()[1]}" in printed
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert weights[weight].shape == (4 * size, size)
    assert any(name.startswith("model.") for name in weights)  # the start, which is learned too
    before = measures(tmp_path / "run")
    succeed(f"eval maml {tmp_path}/run --num-tasks 6 --quiet")
    assert measures(tmp_path / "run") == before


@pytest.mark.filterwarnings("ignore:plain PyTorch serves this small MLP")
def test_a_learned_rule_trains_on_batches_by_cluster(tmp_path):
    options = "--rule meta-lstm --rule-options hidden_size=4 --first-order --clusters 2 --cluster-by embedding"
    succeed(f"{DIGITS} --iterations 3 {options} --cluster-batches balanced --cluster-shared --output {tmp_path}/run")
    assert (tmp_path / "run" / "results.json").is_file()


def test_patience_ends_a_run_early(tmp_path):
    succeed(f"{SINUSOID} --iterations 60 --eval-every 1 --patience 1 --outer-lr 0.5 --output {tmp_path}/run")
    assert len(metrics(tmp_path / "run")) < 60


@pytest.mark.parametrize("clusters", ["2", "auto"])
def test_a_run_in_clusters_draws_their_map(clusters, tmp_path):
    options = f"--tasks regression-3 --iterations 4 --cluster-begin 2 --clusters {clusters}"
    printed = succeed(f"{SINUSOID} {options} --output {tmp_path}/run")
    assert f"clusters: {clusters}" in printed
    assert coloured_share(tmp_path / "run" / "figures" / "clusters.png") > 0.0005
    before = measures(tmp_path / "run")
    succeed(f"eval maml {tmp_path}/run --num-tasks 6 --quiet")
    assert measures(tmp_path / "run") == before


def test_batches_by_cluster_train_one_learner(tmp_path):
    options = "--tasks regression-3 --iterations 3 --clusters 2 --cluster-by embedding --cluster-batches balanced"
    succeed(f"{SINUSOID} {options} --cluster-shared --output {tmp_path}/run --quiet")
    assert not [name for name in load_file(tmp_path / "run" / "model.safetensors") if name.startswith("learners.")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--tasks mnist",
            "tasks must be one of sinusoid, regression-2, regression-3, regression-5, digits, digits-domai",
        ),
        ("--model resnet", "model must be one of auto, mlp, conv4, resnet12, got 'resnet'"),
        ("--model conv4", "model conv4 needs images of 16 pixels or more, omniglot or mini-imagenet, got 'sinusoid'"),
        (
            "--tasks omniglot --model resnet12 --filters 12",
            "filters of resnet12 must be a multiple of 8, 512 or 640 as",
        ),
        ("--rates learned", "rates must be one of fixed, lslr, meta-sgd, got 'learned'"),
        ("--rule lion", "rule must be one of adam, coordinatewise-lstm,"),
        ("--rule adam --rates lslr", "rates must be left out where rule is given, which has its own, got 'lslr'"),
        ("--rule adam --rule-options lr=1", "rule_options must leave out lr, which is inner_lr, a setting"),
        ("--rule lslr --rule-options steps=1", "rule_options must leave out steps, which is steps, a setting"),
        ("--rule adam --rule-options layers=1", "options of rule 'adam' are lr, beta1, beta2, eps; got 'layers'"),
        ("--rule adam --rule-options lr", "rule_options must be name=value,name=value with each name once, got 'lr'"),
        (
            "--rule meta-lstm-with-start --clusters 2",
            "which rule meta-lstm-with-start does not train, as it learns others to start from: rule meta-lstm learns",
        ),
        ("--optimizer lion", "optimizer must be one of adam, adamw, rmsprop, rmsprop-0.9, sgd, got 'lion'"),
        ("--scheduler step", "scheduler must be one of cosine, none, got 'step'"),
        ("--hidden 4;4", "hidden must be numbers with commas between, as 40,40, got '4;4'"),
        ("--clusters many", "clusters must be a number, auto, or 0 for none, got 'many'"),
        ("--outer-lr nan", "outer_lr must be positive and finite, got nan"),
        ("--device tpu9", "device must be cpu, cuda or auto, got 'tpu9'"),
        ("--device meta", "device must be cpu, cuda or auto, got 'meta'"),
        ("--monitor accuracy", "monitor must be one of loss, got 'accuracy'"),
        ("--mixed-precision fp8", "mixed_precision must be None or one of bf16, fp16, got 'fp8'"),
        ("--ema 1", "ema must be above 0 and below 1.0, got 1.0"),
        ("--batch-parts 40", "num_tasks must be at least 40, one for each process and part, got 32"),
        ("--anil --parameters 0.*", "parameters must be left out where anil chooses them, got '0.*'"),
        ("--tasks omniglot", "data must name the folder of omniglot, got none: --data FOLDER"),
        ("--tasks omniglot --data nowhere", "nowhere"),
        ("--config nowhere.yaml", "configuration nowhere.yaml cannot be read: No such file or directory"),
        ("--output file/run", "folder file/run cannot be written: Not a directory"),
    ],
)
def test_errors_are_one_line_that_names_what_is_wrong(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    result = invoke(f"train maml {arguments}")
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # no run was started


def test_settings_that_there_are_not_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.yaml").write_text("learner: maml\nsteps: 3\nwarp: 9\n")
    result = invoke("train maml --config old.yaml")
    assert result.exit_code == 1
    assert "configuration old.yaml has unknown settings warp; known are tasks, data," in result.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("outer_lr: fast", "outer_lr must be a number, got 'fast'"),
        ("steps: 2.5", "steps must be an integer, got 2.5"),
        ("anil: 1", "anil must be true or false, got 1"),
        ("hidden: [40, 40]", "hidden must be text, got [40, 40]"),
        ("seed: null", "seed must be an integer, got None"),
    ],
)
def test_a_value_of_another_type_in_a_configuration_is_named(line, message, tmp_path):
    (tmp_path / "config.yaml").write_text(f"learner: maml\n{line}\n")
    for command in (f"train maml --config {tmp_path}/config.yaml", f"eval maml {tmp_path}"):
        result = invoke(command)
        assert result.exit_code == 1
        assert f"config.yaml: {message}" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_a_configuration_that_a_person_wrote_counts_as_it_is_meant(tmp_path):
    """YAML 1.1 takes 1e-3 for text and 8 for a number."""
    succeed(f"{SINUSOID} --iterations 2 --outer-lr 1e-3 --output {tmp_path}/run --quiet")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    edited = text.replace("lr: 0.001\n", "lr: 1e-3\n", 1).replace("hidden: '8'", "hidden: 8")
    assert edited.count("1e-3") == edited.count("hidden: 8") == 1
    config.write_text(edited)
    succeed(f"eval maml {tmp_path}/run --num-tasks 4 --quiet")
    succeed(f"train maml --resume --output {tmp_path}/run --quiet")
    assert config.read_text() == text


def test_a_gpu_that_is_not_there_is_named_before_anything_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke(f"train maml --device cuda --output {tmp_path}/run")
    assert result.exit_code == 1
    assert "device cuda needs a GPU, and torch finds none: --device cpu" in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_best_weights_can_be_those_of_the_best_accuracy(tmp_path):
    succeed(f"{DIGITS} --monitor accuracy --output {tmp_path}/run --quiet")
    evaluations = [line["evaluation"]["accuracy"] for line in metrics(tmp_path / "run") if "evaluation" in line]
    state = torch.load(tmp_path / "run" / "checkpoints" / "00000004.pt", weights_only=True)
    assert state["history"]["best"] == max(evaluations)


def test_evaluations_of_both_learners_have_folders_of_their_own(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _ = run
    succeed(f"eval maml {folder} {folder} --num-tasks 4 --quiet")
    succeed("eval optimizer --networks 2 --steps 2 --quiet")
    assert {path.parent.name for path in (tmp_path / "runs" / "eval").rglob("results.json")} == {"maml", "optimizer"}


def test_the_real_entry_point_trains_into_runs(tmp_path):
    result = metakern(*f"{SINUSOID} --iterations 2".split(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "maml" / "model.safetensors").is_file()
