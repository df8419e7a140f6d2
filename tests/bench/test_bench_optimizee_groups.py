"""bench.optimizee_groups: the three ways solve equally many problems and have the same meta-gradient."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench import optimizee_groups, report
from bench.optimizee_groups import MIXTURES, QUICK, measure_cell, mixture, ways
from tests.bench.bench_runs import run_quick

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of ``python -m bench.optimizee_groups --quick``."""
    path = run_quick("optimizee_groups", tmp_path_factory.mktemp("bench"), "a meta-iteration of 3 steps")
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def test_quick_run_writes_everything(quick: dict[str, Any]) -> None:
    assert quick["benchmark"] == "optimizee_groups"
    assert quick["command"].startswith("python -m bench.optimizee_groups --quick --threads 1")
    assert set(quick["machine"]) >= {"cpu", "threads", "versions", "date"}
    (cell,) = quick["cells"]
    assert (cell["mixture"], cell["kinds"], cell["tasks"]) == ("both", list(MIXTURES["both"]), 6)
    assert 1 < cell["groups"] <= 6
    assert list(cell["contenders"]) == ["one launch", "grouped", "one by one"]
    times = {way: entry["median_s"] for way, entry in cell["contenders"].items()}
    assert cell["speedup_over_one_by_one"] == pytest.approx({w: times["one by one"] / t for w, t in times.items()})
    assert 0 < cell["max_relative_difference"] < 1e-3


def test_every_way_solves_the_same_kinds_of_problems() -> None:
    problems = mixture("both")
    (whole,), grouped, alone = ways(problems, 12).values()
    assert whole.num_tasks == sum(batch.num_tasks for batch in grouped) == len(alone) == 12
    shapes = [
        {n: x.shape[1:] for n, x in group.items()} for group in whole.init_params() for _ in next(iter(group.values()))
    ]
    assert [{n: x.shape[1:] for n, x in batch.init_params().items()} for batch in alone] == shapes
    assert all(len(x) == 1 for batch in alone for x in batch.init_params().values())


def test_times_of_unequal_work_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizee_groups, "TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match=r"the meta-gradients of test functions differ by .* relative"):
        measure_cell("test functions", 4, QUICK, lambda _: None)


def test_the_table(quick: dict[str, Any]) -> None:
    lines = report.render_optimizee_groups(quick, "file.json").splitlines()
    assert lines[0] == "| problems | kinds | one by one | grouped by shape | grouped, one launch |"
    assert lines[2].startswith(f"| 6 both | {quick['cells'][0]['groups']} | ")
    assert lines[2].count("x) |") == 2
    text = "\n".join(lines)
    assert "of 3 inner steps" in text
    assert "`file.json`" in text
