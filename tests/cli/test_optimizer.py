"""train optimizer and eval optimizer: written files, and one-line errors."""

import io
import json
import math

import pytest
import torch
import yaml
from rich.console import Console

from metakern.cli.optimizer import PROBLEMS, optimizer_table, verdict
from metakern.cli.tables import BEST, print_table
from metakern.evaluation import BASELINES, Curve
from metakern.rules import CoordinatewiseLSTM, load
from tests.cli.commands import invoke, metakern, metrics, succeed

RUN = "--episodes 2 --networks 2 --steps 4 --unroll 2 --hidden-size 6 --seed 5 --eval-every 1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short training run and its output, from the real entry point."""
    folder = tmp_path_factory.mktemp("run")
    result = metakern(*f"train optimizer --output out {RUN}".split(), cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "out", result.stdout


def test_training_writes_weights_history_and_a_figure(trained):
    folder, printed = trained
    assert "best validation loss" in printed
    assert "episode 2/2: loss" in printed  # without a terminal, lines replace the progress bar
    rule = CoordinatewiseLSTM.from_pretrained(str(folder))
    assert rule.hidden_size == 6
    history = json.loads((folder / "training.json").read_text())
    assert len(history["episodes"]) == 2
    assert [iteration for iteration, _ in history["evaluations"]] == [1, 2]
    assert history["best"] == min(loss for _, loss in history["evaluations"])
    assert history["config"]["steps"] == 4
    assert history["command"].startswith("metakern train optimizer --output out")
    assert history["environment"]["torch"] == torch.__version__
    assert (folder / "figures" / "learning.png").stat().st_size > 10_000


def test_the_best_weights_by_validation_are_kept(trained, tmp_path):
    """Each evaluation measures the weights that a run stopped there would keep."""
    folder, _ = trained
    evaluations = json.loads((folder / "training.json").read_text())["evaluations"]
    best = min(evaluations, key=lambda pair: pair[1])[0]
    checkpoint = torch.load(folder / "checkpoints" / "00000002.pt", weights_only=True)
    kept = CoordinatewiseLSTM.from_pretrained(str(folder)).state_dict()
    assert all(torch.equal(kept[name], checkpoint["best_weights"][f"rule.{name}"]) for name in kept)
    assert checkpoint["history"]["best_iteration"] == best


def test_the_configuration_repeats_a_run(trained, tmp_path):
    folder, _ = trained
    succeed(f"train optimizer --config {folder}/config.yaml --output {tmp_path}/again")
    first, second = (CoordinatewiseLSTM.from_pretrained(str(path)) for path in (folder, tmp_path / "again"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert metrics(tmp_path / "again") == metrics(folder)
    assert len(metrics(folder)) == 4


def test_the_learning_rate_falls_along_a_cosine_to_three_percent(tmp_path):
    succeed(f"train optimizer {RUN} --episodes 4 --problem quadratics --output {tmp_path}/q --outer-lr 0.01")
    rates = [line["lr"] for line in metrics(tmp_path / "q") if "lr" in line]
    expected = [0.01 * (0.03 + 0.97 * (1 + math.cos(math.pi * i / 4)) / 2) for i in range(4)]
    assert rates == pytest.approx(expected)


def test_the_outer_loop_is_set_as_for_maml(tmp_path):
    options = "--optimizer sgd --scheduler none --max-grad-norm 0 --ema 0.9 --patience 1 --batch-parts 2 --outer-lr 0.5"
    succeed(f"train optimizer {RUN} --episodes 9 --problem quadratics {options} --output {tmp_path}/q")
    config = yaml.safe_load((tmp_path / "q" / "config.yaml").read_text())
    assert (config["optimizer"], config["scheduler"], config["batch_parts"]) == ("sgd", "none", 2)
    assert {line["lr"] for line in metrics(tmp_path / "q") if "lr" in line} == {0.5}
    newest = max((tmp_path / "q" / "checkpoints").glob("*.pt"))
    checkpoint = torch.load(newest, weights_only=True)
    assert checkpoint["average"] is not None
    assert checkpoint["optimizer"]["state"] == {} or "exp_avg" not in checkpoint["optimizer"]["state"][0]  # SGD's
    assert checkpoint["iteration"] < 9 or checkpoint["worse"] <= 1  # stops at the first without improvement


def test_a_commands_own_settings_come_first(tmp_path):
    printed = succeed("train optimizer --help")
    assert 0 < printed.index("--problem") < printed.index("--max-skipped")
    succeed(f"train optimizer {RUN} --episodes 1 --problem quadratics --output {tmp_path}/q")
    names = list(yaml.safe_load((tmp_path / "q" / "config.yaml").read_text()))
    assert names.index("problem") < names.index("max_skipped")


@pytest.mark.parametrize("problem", sorted(set(PROBLEMS) - {"digits", "quadratics"}))
def test_every_problem_trains_by_its_name(problem, tmp_path):
    succeed(f"train optimizer {RUN} --episodes 1 --eval-tasks 2 --problem {problem} --output {tmp_path}/run --quiet")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["problem"] == problem
    assert math.isfinite(metrics(tmp_path / "run")[0]["loss"])


def test_evaluation_prints_both_tables_and_writes_figures(trained, tmp_path):
    folder, _ = trained
    printed = succeed(f"eval optimizer {folder} --networks 2 --steps 15 --speed")
    titles = ("Training loss of 2 unseen networks after 15 steps", "Seconds per meta-iteration")
    for text in (*titles, "Learned LSTM", "SGD", "Momentum 0.9", "RMSprop", "Adam", "metakern, fused", "plain PyTorch"):
        assert text in printed
    figures = json.loads((folder / "results.json").read_text())
    assert [row["optimizer"] for row in figures["optimizers"]][:2] == ["Learned LSTM", "SGD"]
    assert len(figures["optimizers"][0]["curve_mean"]) == 16
    assert figures["speed"]["ratio"] > 0
    assert (folder / "curves.png").stat().st_size > 10_000


def test_quadratics_are_trained_without_preprocessing(tmp_path):
    succeed(f"train optimizer --problem quadratics {RUN} --output {tmp_path}/q")
    rule = CoordinatewiseLSTM.from_pretrained(str(tmp_path / "q"))
    assert (rule.preprocess, rule.output_scale) == ("none", 1.0)
    succeed(f"eval optimizer {tmp_path}/q --networks 2 --steps 3")
    assert json.loads((tmp_path / "q" / "results.json").read_text())["problem"] == "quadratics"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train optimizer --steps 10 --unroll 3", "unroll must divide steps, 10, got 3"),
        ("train optimizer --preprocess best", "preprocess must be one of none, log_sign, log_and_clip, got 'best'"),
        ("train optimizer --backend tpu", "backend must be one of auto, cpp, cuda, triton, reference, got 'tpu'"),
        ("eval optimizer nowhere", "'nowhere' is not a folder, and pretrained rule must be one of digits_"),
        ("eval optimizer x[/a]", "'x[/a]' is not a folder"),
        ("train optimizer --outer-lr inf", "outer_lr must be positive and finite, got inf"),
        ("train optimizer --problem mnist", "problem must be one of digits, digits-regression, digits-cnn, digits-rnn"),
        ("train optimizer --objective mean", "objective must be one of sum, log, relative-log, last, got 'mean'"),
    ],
)
def test_errors_are_one_line_that_names_what_is_wrong(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("*.pt"))


def test_a_folder_that_cannot_be_written_is_named_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke(f"train optimizer --output {tmp_path}/file/run")
    assert result.exit_code == 1
    assert f"folder {tmp_path}/file/run cannot be written: Not a directory" in result.stderr
    assert "episode" not in result.stdout


def test_a_damaged_rule_is_named(trained, tmp_path):
    folder, _ = trained
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text((folder / "config.json").read_text())
    (damaged / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    result = invoke(f"eval optimizer {damaged}")
    assert result.exit_code == 1
    assert "is truncated, damaged or not a safetensors file" in result.stderr


def curves(*losses: float) -> list[Curve]:
    """Curves of the learned optimizer and of baselines A, B, ..., two problems each, with a given final loss."""
    return [Curve(name, torch.full((1, 2), loss)) for name, loss in zip(("Learned", *"ABC"), losses, strict=False)]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((1.0, 2.0, 0.5), "The learned optimizer does not beat: B."),
        ((1.0, 1.0), "The learned optimizer does not beat: A."),
        ((1.0, 2.0), "The learned optimizer beats every tuned baseline."),
        ((1.0, math.nan, 2.0, math.inf), "The learned optimizer beats every tuned baseline."),
        ((1.0, math.nan, 0.5), "The learned optimizer does not beat: B."),
        ((math.nan, 2.0), "The learned optimizer diverged."),
        ((math.inf, math.nan), "The learned optimizer diverged."),
    ],
)
def test_the_verdict_is_the_truth(losses, expected):
    assert verdict(curves(*losses)) == expected


def test_what_diverges_is_never_the_best_and_says_so():
    console = Console(file=io.StringIO(), width=80)
    table = optimizer_table(curves(math.nan, 2.0, 0.5, -math.inf), "functions")
    assert [row.style for row in table.rows] == ["", "", BEST, ""]
    print_table(console, table)
    printed = console.file.getvalue()
    assert "Training loss of 2 unseen functions after 0 steps" in printed
    assert [line.count("diverged") for line in printed.splitlines() if "│" in line] == [4, 0, 0, 4]
    assert "nan" not in printed


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_are_whole(width):
    console = Console(file=io.StringIO(), width=width)
    print_table(console, optimizer_table([Curve("Momentum 0.9", torch.full((2, 3), 1.23e-10), 0.000178)], "networks"))
    printed = console.file.getvalue()
    assert all(text in printed for text in ("Momentum 0.9", "0.000178", "1.2e-10", "deviation"))
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= width


def test_functions_are_called_functions_and_a_pipe_has_lines(tmp_path):
    succeed(f"train optimizer {RUN} --episodes 1 --problem rosenbrock --output {tmp_path}/run --quiet")
    printed = succeed(f"eval optimizer {tmp_path}/run --networks 2 --steps 3")
    assert "Training loss of 2 unseen functions" in printed
    assert "networks" not in printed
    lines = [line for line in printed.splitlines() if line.startswith("training unseen functions")]
    assert [line.partition(":")[0].split()[-1] for line in lines] == ["1/97", "25/97", "49/97", "73/97", "97/97"]
    assert [line.split(": ")[1].split(" · ")[0] for line in lines] == ["Learned LSTM", *BASELINES]


def test_the_rule_in_the_package_beats_every_tuned_baseline():
    """The README's claim, on fewer networks and with other seeds than its table."""
    from metakern.evaluation import compare_optimizers
    from metakern.tasks import DigitsMLP

    rule = CoordinatewiseLSTM.pretrained("digits_lstm")
    learned, *baselines = compare_optimizers(rule, DigitsMLP(), num_tasks=20, seed=7)
    for baseline in baselines:
        assert learned.final.mean() < baseline.final.mean(), baseline.name


@pytest.mark.parametrize("name", ["digits_hierarchical_rnn", "digits_mlp", "digits_rnnprop"])
def test_the_other_rules_in_the_package_beat_tuned_adam(name):
    """At the rate that bench/results/<name>/results.json has for Adam, on fewer networks and with another seed."""
    from metakern.evaluation import rule_curve, training_curve
    from metakern.tasks import DigitsMLP

    options = {"num_tasks": 8, "steps": 100, "seed": 7}
    learned = rule_curve(load(name), DigitsMLP(split="test"), **options)[-1]
    adam = training_curve(lambda params: torch.optim.Adam(params, 0.1), DigitsMLP(split="test"), **options)[-1]
    assert learned.mean() < adam.mean()


def test_a_users_own_problem(tmp_path):
    """The shipped general optimizer on problems that a user's file makes, and messages for files that do not."""
    own = tmp_path / "own.py"
    own.write_text(
        "import torch\nfrom torch import nn\nfrom metakern.tasks import NetworkProblem\n"
        "def data(split):\n    x = torch.linspace(-1, 1, 20).view(20, 1)\n    return x, x.square()\n"
        "def problem():\n    return NetworkProblem(lambda: nn.Linear(1, 1), data, loss=nn.functional.mse_loss)\n"
        "def other():\n    return 3\n"
    )
    succeed(f"eval optimizer general --problem {own}:problem --networks 2 --steps 3 --output {tmp_path}/out")
    assert (tmp_path / "out" / "curves.png").exists()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["optimizers"][0]["optimizer"] == "Guided Adam"
    for name, message in (("missing", "has no function missing"), ("other", "must return problems with sample")):
        failed = invoke(f"eval optimizer general --problem {own}:{name}")
        assert failed.exit_code == 1
        assert message in " ".join(failed.output.split())
