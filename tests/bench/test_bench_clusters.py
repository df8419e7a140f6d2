"""bench.clusters: the same start and tasks for every way, saved runs, verdicts, figure."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import clusters, report
from bench.cluster_cases import PROBES, PROBLEMS, first_steps
from bench.clusters import FULL, QUICK, Run, described, equal_time, part, rate, reached, train
from bench.runs import Advance, describe_run, run_jobs
from bench.targets import judge_clusters, measured
from metakern.learners import ClusteredLearner
from tests.pictures import coloured_share

pytestmark = pytest.mark.usefixtures("one_thread")


def ignore(_: float) -> None:
    """Progress callback that does nothing."""


TINY = replace(QUICK, share=0.001, tasks=4, points=1, held_out=10)
CASES = [(problem, way) for problem, of in PROBLEMS.items() for way in of.ways if problem != "regression-5"]


@pytest.fixture(scope="module")
def quick() -> dict[str, Any]:
    """Results of two seeds on digits."""
    found = describe_run("clusters", "bench.clusters") | clusters.measure(["digits"], TINY, None, Console(quiet=True))
    results: dict[str, Any] = json.loads(json.dumps(found))
    return results


def test_a_measurement_holds_everything(quick: dict[str, Any]) -> None:
    assert (quick["seeds"], quick["tasks"], quick["held_out_tasks"]) == (2, 4, 10)
    (found,) = quick["problems"].values()
    assert found["settings"] | {"modes": 4, "measure": "accuracy", "steps": 5} == found["settings"]
    assert list(found["ways"]) == list(PROBLEMS["digits"].ways)
    plain = found["ways"]["plain"]
    assert plain["difference"]["of_seeds"] == [0, 0]
    assert plain["equal_time"]["test"] == plain["test"]
    for name, way in found["ways"].items():
        assert way["curve_iterations"] == [0, 2]
        assert len(way["curve"]) == len(way["curve_seconds"]) == 2
        assert all(seconds > 0 for seconds in way["seconds"]["of_seeds"])
        if name != "wide":
            assert way["curve"][0]["mean"] == pytest.approx(plain["curve"][0]["mean"]), name
        pairs = list(zip(way["test"]["of_seeds"], plain["test"]["of_seeds"], strict=True))
        assert way["difference"]["of_seeds"] == pytest.approx([a - b for a, b in pairs])
        assert way["ratio"]["of_seeds"] == pytest.approx([a / b for a, b in pairs])
        assert ("test_told" in way) == name.startswith("oracle")
        assert ("equal_time" in way) == (name == "plain" or PROBLEMS["digits"].ways[name].proposed)
        assert 0 < way.get("equal_time", {"iterations": 1})["iterations"] <= 2
    assert quick["targets"] == judge_clusters(quick)


@pytest.mark.parametrize(("problem", "way"), CASES)
def test_every_way_starts_from_the_same_learner_and_trains(problem: str, way: str) -> None:
    of = PROBLEMS[problem]
    plain, run, other = (Run(of, of.ways[name], seed, TINY) for name, seed in (("plain", 3), (way, 3), (way, 4)))
    start = run.learner.shared if isinstance(run.learner, ClusteredLearner) else run.learner
    if not of.ways[way].wide:
        for a, b in zip(plain.learner.parameters(), start.parameters(), strict=True):
            assert torch.equal(a, b)
    assert plain.generator.initial_seed() == run.generator.initial_seed() != other.generator.initial_seed()
    before = [parameter.clone() for parameter in run.learner.parameters()]
    run.advance(3)
    assert run.iteration == 3
    assert run.seconds > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, run.learner.parameters(), strict=True))


def test_a_wide_learner_has_as_many_parameters_as_the_clusters() -> None:
    for name in ("regression-3", "digits"):
        of = PROBLEMS[name]
        sizes = [sum(p.numel() for p in of.learner(of.ways[way], 0, 9).parameters()) for way in ("plain", "wide")]
        assert sizes[1] == pytest.approx(sizes[0] * of.ways["clusters"].clusters, rel=0.02)


def test_the_same_seed_gives_the_same_run() -> None:
    a, b, other = (train("regression-3", "clusters", seed, QUICK, ignore) for seed in (1, 1, 2))
    values = [[[p["valid"] for p in run["curve"]], run["test"], run["temperature"]] for run in (a, b)]
    assert values[0] == values[1]
    assert other["test"] != a["test"]


def test_test_tasks_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves and temperatures do not depend on the test tasks."""
    found = train("regression-3", "clusters", 1, QUICK, ignore)
    monkeypatch.setitem(clusters.HELD_OUT_SEEDS, "test", 5)
    other = train("regression-3", "clusters", 1, QUICK, ignore)
    for name in ("temperature", "valid", "iterations"):
        assert found[name] == other[name]
    assert [p["valid"] for p in found["curve"]] == [p["valid"] for p in other["curve"]]
    assert found["test"] != other["test"]


def test_the_learning_rate_stays_then_falls_to_zero() -> None:
    rates = [rate(iteration, 100) for iteration in (0, 50, 70, 85, 100)]
    assert rates == pytest.approx([1, 1, 1, 0.5, 0])


def test_a_run_is_made_once_and_again_for_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def pretend(*of: Any) -> dict[str, Any]:
        made.append(of)
        return {"test": len(made)}

    monkeypatch.setattr(clusters, "train", pretend)
    assert [part("digits", "plain", 0, QUICK, tmp_path, ignore)["test"] for _ in range(3)] == [1, 1, 1]
    assert part("digits", "plain", 1, QUICK, tmp_path, ignore)["test"] == 2
    assert part("digits", "plain", 0, replace(QUICK, held_out=30), tmp_path, ignore)["test"] == 3
    assert part("digits", "plain", 0, QUICK, None, ignore)["test"] == 4
    assert len(list(tmp_path.glob("*"))) == 2


@pytest.mark.parametrize(("problem", "way"), CASES)
def test_a_run_of_another_process_is_known_again(problem: str, way: str) -> None:
    """Functions in the settings are compared by name, as their addresses differ between processes."""
    assert " at 0x" not in described(problem, way, QUICK)
    assert described(problem, way, QUICK) == described(problem, way, replace(QUICK, seeds=5))
    assert described(problem, way, QUICK) != described(problem, way, FULL)


def test_equal_time_is_a_share_of_the_run() -> None:
    runs = {"plain": [{"seconds": 10.0}, {"seconds": 12.0}, {"seconds": 11.0}]}
    runs["slow"] = [{"seconds": 44.0}] * 3
    runs["fast"] = [{"seconds": 2.0}] * 3
    assert equal_time(runs, "slow", FULL).share == 0.25
    assert equal_time(runs, "fast", FULL).share == 1


def job(number: int, advance: Advance) -> tuple[int, int, int]:
    """A run in another process."""
    advance(0.5)
    if number < 0:
        raise ValueError(f"number must not be negative, got {number}")
    return number, os.getpid(), torch.get_num_threads()


def test_runs_side_by_side_come_back_in_their_order() -> None:
    done = run_jobs({f"job {number}": partial(job, number) for number in range(5)}, Console(quiet=True), workers=2)
    assert [(number, threads) for number, _, threads in done] == [(number, 1) for number in range(5)]
    assert os.getpid() not in {process for _, process, _ in done}
    with pytest.raises(ValueError, match="got -1"):
        run_jobs({"bad": partial(job, -1), "good": partial(job, 1)}, Console(quiet=True), workers=2)


def test_problems_are_described_where_they_start() -> None:
    tasks = PROBLEMS["optimizees"].tasks()
    batch, again = (tasks.sample(40, torch.Generator().manual_seed(3)) for _ in range(2))
    described = first_steps(batch)
    assert described.shape == (40, 2 * PROBES)
    starts = batch.init_params()  # the embedding does not change them
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(starts, again.init_params(), strict=True))
    torch.testing.assert_close(described[:, 0], batch.loss(starts).log10())


def test_where_a_run_reaches_plain_maml() -> None:
    def run(*values: float) -> dict[str, Any]:
        return {"curve": [{"iteration": 10 * i, "seconds": 2.0 * i, "valid": v} for i, v in enumerate(values)]}

    plain = run(3, 2, 1.5, 1.5, 1.5)
    assert reached(run(3, 1.5, 1, 1, 1), plain, False) == {"iterations": 0.25, "seconds": 0.25}
    assert reached(run(3, 3, 2, 2, 1.6), plain, False) is None
    assert reached(run(0, 0, 1.6, 2, 2), plain, True) == {"iterations": 0.5, "seconds": 0.5}


def test_the_figure_and_the_table(quick: dict[str, Any], tmp_path: Path) -> None:
    clusters.plot(quick, tmp_path / "figure.png")
    assert coloured_share(tmp_path / "figure.png") > 0.0005
    text = report.render_clusters(quick, "file.json")
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    for said in (PROBLEMS["digits"].title, "of 10 test tasks", "2 seeds", "4 tasks a meta-iteration", "`file.json`"):
        assert said in text


def test_targets_are_judged_as_met_or_missed() -> None:
    def way(mean: float, ratio: float, best: float, shares: list[float | None]) -> dict[str, Any]:
        reaches = [None if share is None else {"iterations": share, "seconds": share} for share in shares]
        figures = {"test": {"mean": mean}, "ratio": {"mean": ratio}, "ratio_best": {"mean": best}}
        return figures | {"reaches_plain": reaches}

    oracle = {"test_told": {"mean": 0.5}}
    digits = {"difference": {"low": 0.02}, "difference_best": {"low": -0.01}}
    results = {
        "seeds": 2,
        "problems": {
            "regression-3": {
                "settings": {"title": "regression", "measure": "loss"},
                "ways": {"oracle": oracle, "clusters": way(0.55, 0.6, 0.7, [0.4, 0.5])},
            },
            "digits": {"settings": {"title": "digits", "measure": "accuracy"}, "ways": {"clusters": digits}},
        },
    }
    judged = [(t["kind"], t["required"], t["measured"], t["met"]) for t in judge_clusters(results)]
    assert judged == [
        ("must", 0.75, 0.6, True),
        ("aim", 0.5, 0.6, False),
        ("aim", 0.75, 0.7, True),
        ("aim", 1.0, pytest.approx(1.1), False),
        ("must", 0.5, pytest.approx(0.45), True),
        ("aim", 1 / 3, pytest.approx(0.45), False),
        ("must", 0.0, -0.01, False),
    ]
    results["problems"]["regression-3"]["ways"]["clusters"] = way(0.55, 0.6, 0.7, [0.4, None])
    never = judge_clusters(results)[4]
    assert (never["measured"], never["met"], measured(never, 2)) == (None, False, "never")
