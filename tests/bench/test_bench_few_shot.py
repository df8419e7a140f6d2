"""bench.few_shot: same start and tasks for every method, saved runs, equal time, table."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console

from bench import report
from bench.few_shot import learning, tune
from bench.few_shot.__main__ import QUICK, measure, shortened
from bench.few_shot.cases import METHODS, SAMPLERS, SHOTS, UNIFORM, Case, Plan, cases
from bench.few_shot.learning import kept, train
from bench.few_shot.tables import few_shot_lines
from metakern.learners import ClusteredLearner
from metakern.runs.fewshot import make_learner, make_tasks
from metakern.runs.folder import read_config
from tests.cli.commands import succeed

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:plain PyTorch serves this small MLP"),
]


CHOSEN = [case for case in cases() if case.method in ("maml", "meta-lstm")]


def ignore(_: float) -> None:
    """Progress callback that does nothing."""


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """Tiny runs of MAML and Meta-LSTM."""
    torch.set_num_threads(1)
    header = {"command": "python -m bench.few_shot --quick", "targets": []}
    machine = {"cpu": "x", "threads": 1, "cpu_capability": "avx2", "versions": {"torch": "2"}, "date": "today"}
    return header | {"machine": machine} | measure(CHOSEN, QUICK, None, Console(quiet=True))


def test_there_is_every_method_by_every_sampler_and_number_of_shots() -> None:
    assert len(cases()) == len(set(cases())) == len(METHODS) * len(SHOTS) * len(SAMPLERS) == 20


def test_results_have_every_seed_and_no_more_tasks_for_equal_time(results: dict[str, Any]) -> None:
    assert [(case["method"], case["shots"], case["sampler"]) for case in results["cases"]] == [
        (case.method, case.shots, case.sampler) for case in CHOSEN
    ]
    for case in results["cases"]:
        assert len(case["test"]["of_seeds"]) == QUICK.seeds
        assert all(0 <= value <= 1 for value in case["test"]["of_seeds"])
        assert [point["tasks"] for point in case["curve"]] == [0, 8]
        assert case["equal_time"]["tasks"] <= results["tasks"] == 8
        if case["method"] == "maml":
            assert case["difference"]["of_seeds"] == [0.0, 0.0]


@pytest.mark.parametrize("shots", SHOTS)
def test_all_methods_start_from_the_same_network_and_test_on_the_same_tasks(shots: int) -> None:
    starts = []
    for case in (case for case in cases() if case.shots == shots):
        settings = case.settings(3, QUICK)
        tasks = make_tasks(settings)
        learner: Any = make_learner(settings, tasks)
        model = learner.shared.model if isinstance(learner, ClusteredLearner) else learner.model
        starts.append([p.detach() for p in model.parameters()])
        batch = tasks.split("test").sample(3, torch.Generator().manual_seed(learning.HELD_OUT_SEEDS["test"]))
        starts[-1].append(batch.query_x)
    for start in starts[1:]:
        assert all(torch.equal(a, b) for a, b in zip(start, starts[0], strict=True))


def test_held_out_tasks_are_of_other_digits() -> None:
    """The images of a split are of its own digits; test tasks are drawn by a seed of their own."""
    tasks = make_tasks(Case("maml", 1, UNIFORM).settings(0, QUICK))
    images = {
        split: {
            tuple(image.tolist())
            for image in tasks.split(split).sample(40, torch.Generator().manual_seed(1)).query_x.flatten(0, 1)
        }
        for split in ("train", "valid", "test")
    }
    assert not images["train"] & images["test"]
    assert not images["valid"] & images["test"]
    assert len(set(learning.HELD_OUT_SEEDS.values())) == 2


def test_a_run_is_repeatable_and_its_file_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, plan = Case("anil", 1, "clusters"), replace(QUICK, iterations=3)
    found = kept(tmp_path, case, 1, plan, ignore)
    again = train(case, 1, plan, ignore)
    assert again["test"] == found["test"]
    assert [point["accuracy"] for point in again["curve"]] == [point["accuracy"] for point in found["curve"]]
    monkeypatch.setattr("bench.few_shot.learning.train", lambda *_: pytest.fail("trained again"))
    assert kept(tmp_path, case, 1, plan, ignore) == found
    assert [path.name for path in tmp_path.iterdir()] == ["anil-1-shot-clusters-3-1.json"]
    monkeypatch.setattr("bench.few_shot.learning.train", lambda *_: {"new": True})
    changed = replace(case, changed=(("outer_lr", 0.5),))
    assert kept(tmp_path, changed, 1, plan, ignore)["new"]


def test_every_part_of_a_rule_learns() -> None:
    """Meta-LSTM's weights and its start; a run of other settings differs."""
    moved = []
    for rate in (1e-3, 1e-1):
        case = Case("meta-lstm", 5, UNIFORM, (("outer_lr", rate), ("rule_options", "hidden_size=4")))
        learner = make_learner(case.settings(0, QUICK), make_tasks(case.settings(0, QUICK)))
        names = {name for name, p in learner.named_parameters() if p.requires_grad}
        assert {"model.0.weight", "rule.head.weight", "rule.lstm.weight_hh_l0"} <= names
        moved.append(train(case, 0, replace(QUICK, valid=20), ignore, test=False))
    assert "test" not in moved[0]
    assert moved[0]["curve"][0]["accuracy"] == moved[1]["curve"][0]["accuracy"]
    assert moved[0]["curve"][1]["accuracy"] != moved[1]["curve"][1]["accuracy"]


def test_equal_time_is_that_of_maml_with_the_uniform_sampler() -> None:
    seconds = {
        Case("maml", 5, UNIFORM): (2.0, 4.0),
        Case("lstm", 5, UNIFORM): (12.0, 12.0),
        Case("anil", 5, "clusters"): (1.0, 1.0),
    }
    runs = {case: [{"seconds": value} for value in values] for case, values in seconds.items()}
    plans = shortened(runs, Plan(iterations=400))
    assert [plan.iterations for plan in plans.values()] == [400, 100, 400]


def test_the_command_of_a_case_makes_its_learner(tmp_path: Path) -> None:
    """It is a line for the command line, and the configuration of its run has the case's settings."""
    case = Case("meta-lstm", 1, "clusters", (("rule_options", "hidden_size=4"),))
    plan = replace(QUICK, iterations=1)
    words = case.command(plan).removeprefix("metakern ")
    succeed(f"{words} --eval-tasks 2 --test-tasks 2 --output {tmp_path}/run --quiet")
    config, expected = read_config(tmp_path / "run" / "config.yaml", "maml"), case.settings(0, plan)
    own = {name: value for name, value in config.items() if name not in ("eval_tasks", "test_tasks", "metakern")}
    assert own == {name: getattr(expected, name) for name in own}


def test_the_table(results: dict[str, Any]) -> None:
    lines = few_shot_lines(results)
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + len(CHOSEN) // len(SHOTS)
    assert len({row.count("|") for row in rows}) == 1
    text = report.TABLES["few_shot"](results, "file.json")
    for said in (
        "Meta-LSTM, 5 steps | balanced over clusters",
        "of 2 seeds",
        "on 4 test tasks",
        "`file.json`",
        " (8) ",
    ):
        assert said in text


def test_settings_to_try_are_those_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    tried = tune.changes("outer_lr=1e-2,rule_options=hidden_size:4;num_layers:1")
    assert tried == (("outer_lr", 1e-2), ("rule_options", "hidden_size=4,num_layers=1"))
    with pytest.raises(typer.BadParameter, match="set must name settings of train maml, got outer_rate"):
        tune.changes("outer_rate=1")
    partial(tune.main, "anil", 1, UNIFORM, ["inner_lr=0.3"], 2)()
    assert capsys.readouterr().out.startswith("anil, 1-shot, uniform, inner_lr=0.3: 0.")
