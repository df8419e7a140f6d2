"""The runs of bench.clusters: the same start and tasks for every way, pieces kept, verdicts, figure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import clusters, report
from bench.cluster_cases import PROBLEMS, WAYS
from bench.clusters import QUICK, Run, part, reached, train
from bench.targets import judge_clusters
from metakern.learners import ClusteredLearner
from tests.bench_runs import run_quick

pytestmark = pytest.mark.usefixtures("one_thread")


def ignore(_: float) -> None:
    """Of a progress bar that nobody sees."""


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of ``python -m bench.clusters --quick``."""
    path = run_quick("clusters", tmp_path_factory.mktemp("bench"), "3-mode regression, 10-shot")
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def test_quick_run_writes_everything(quick: dict[str, Any]) -> None:
    assert quick["benchmark"] == "clusters"
    assert set(quick["machine"]) >= {"cpu", "threads", "versions", "date"}
    assert (quick["iterations"], quick["seeds"], quick["tasks"], quick["held_out_tasks"]) == (20, 2, 8, 20)
    assert list(quick["problems"]) == list(PROBLEMS)
    for name, found in quick["problems"].items():
        assert list(found["ways"]) == list(WAYS)
        plain = found["ways"]["plain"]
        assert plain["difference"]["of_seeds"] == [0, 0]
        for key, way in found["ways"].items():
            assert way["curve_iterations"] == [0, 10, 20]
            assert len(way["curve"]) == len(way["curve_seconds"]) == 3
            assert all(seconds > 0 for seconds in way["seconds"]["of_seeds"])
            assert way["curve"][0]["mean"] == pytest.approx(plain["curve"][0]["mean"]), (name, key)
            assert way["ratio"]["of_seeds"] == pytest.approx(
                [a / b for a, b in zip(way["test"]["of_seeds"], plain["test"]["of_seeds"], strict=True)]
            )
            assert ("test_told" in way) == key.startswith("oracle")
        assert plain["equal_time"]["test"] == plain["test"]
    assert quick["targets"] == judge_clusters(quick)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_starts_from_the_same_weights_and_draws_the_same_first_tasks(way: str) -> None:
    problem = PROBLEMS["regression-3"]
    runs = [Run(problem, WAYS[name], 3, QUICK) for name in ("plain", way)]
    models = [run.learner.shared if isinstance(run.learner, ClusteredLearner) else run.learner for run in runs]
    for a, b in zip(models[0].model.parameters(), models[1].model.parameters(), strict=True):
        assert torch.equal(a, b)
    other = Run(problem, WAYS[way], 4, QUICK)
    assert runs[0].generator.initial_seed() == runs[1].generator.initial_seed() != other.generator.initial_seed()
    runs[1].advance(12)
    assert runs[1].iteration == 12
    assert runs[1].seconds > 0


def test_the_same_seed_gives_the_same_run() -> None:
    a, b = (train("regression-3", "clusters", 1, QUICK, ignore) for _ in range(2))
    timeless = [[p["valid"] for p in run["curve"]] + [run["test"], run["temperature"]] for run in (a, b)]
    assert timeless[0] == timeless[1]
    assert train("regression-3", "clusters", 2, QUICK, ignore)["test"] != a["test"]


def test_test_tasks_are_looked_at_by_the_result_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves and temperatures are the same, whatever the test tasks are."""
    found = train("regression-3", "clusters", 1, QUICK, ignore)
    monkeypatch.setattr(clusters, "TEST_SEED", 5)
    other = train("regression-3", "clusters", 1, QUICK, ignore)
    assert [p["valid"] for p in found["curve"]] == [p["valid"] for p in other["curve"]]
    assert found["temperature"] == other["temperature"]
    assert found["test"] != other["test"]


def test_a_run_is_made_once_and_again_for_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(clusters, "train", lambda *of: made.append(of[:4]) or {"test": len(made)})
    assert [part("digits", "plain", 0, QUICK, tmp_path, ignore)["test"] for _ in range(3)] == [1, 1, 1]
    assert part("digits", "plain", 1, QUICK, tmp_path, ignore)["test"] == 2
    assert part("digits", "plain", 0, replace(QUICK, held_out=30), tmp_path, ignore)["test"] == 3
    assert part("digits", "plain", 0, QUICK, None, ignore)["test"] == 4
    assert len(list(tmp_path.glob("*"))) == 2


def test_where_a_run_reaches_plain_maml() -> None:
    def run(*values: float) -> dict[str, Any]:
        return {"curve": [{"iteration": 10 * i, "seconds": 2.0 * i, "valid": v} for i, v in enumerate(values)]}

    plain = run(3, 2, 1.5, 1.5, 1.5)
    assert reached(run(3, 1.5, 1, 1, 1), plain, False) == {"iterations": 0.25, "seconds": 0.25}
    assert reached(run(3, 3, 2, 2, 1.6), plain, False) is None
    assert reached(run(0, 0, 1.6, 2, 2), plain, True) == {"iterations": 0.5, "seconds": 0.5}


def test_the_figure_and_the_table(quick: dict[str, Any], tmp_path: Path) -> None:
    clusters.plot(quick, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    text = report.render_clusters(quick, "file.json")
    for found in quick["problems"].values():
        assert found["settings"]["title"] in text
    for said in ("of 20 test tasks", "2 seeds", "20 meta-iterations of 8 tasks", "`file.json`"):
        assert said in text
