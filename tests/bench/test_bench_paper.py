"""bench.paper: all ways compute one meta-gradient, times and curves join to a table, test tasks stay apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.func import functional_call

from bench.paper import learning, report, tables, test_tasks, timing
from bench.paper.learning import Plan, kept
from bench.paper.plain import logits
from bench.paper.tasks import TRAINING, VALIDATION, balanced, held_out_tasks, network, validation_tasks
from metakern.learners.scaled import kinds_by_shape
from metakern.tasks.digit_networks import load_digits

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = timing.Plan(1, 2, 0.0, 1, False, False)
TINY = Plan(iterations=2, tasks=3, steps=2, unroll=1, points=1, seeds=2)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """Times of both rules, of one tiny round."""
    torch.set_num_threads(1)
    return {rule: timing.measure_rule(rule, PLAN, "cpu", lambda _: None) for rule in learning.RULES}


@pytest.mark.parametrize("rule", learning.RULES)
def test_all_ways_compute_one_meta_gradient(measured: dict[str, Any], rule: str) -> None:
    entry = measured[rule]
    assert list(entry["differences"]) == ["sequential", "vmap", "metakern", "metakern, clusters"]
    assert all(x < timing.TOLERANCE for differ in entry["differences"].values() for x in differ.values())
    assert entry["differences"]["sequential"]["gradient"] > 0  # computed another way
    for shares in entry["profile"].values():
        assert {"optimizee", "rule", "backward", "rest"} <= shares.keys()
        assert sum(share for name, share in shares.items() if name != "seconds") == pytest.approx(1)


def test_ways_that_differ_are_refused() -> None:
    ones = [torch.ones(2), torch.ones(3)]
    with pytest.raises(ArithmeticError, match="vmap differs from metakern"):
        timing.differences({"metakern": ones, "vmap": [torch.ones(2), torch.tensor([1.0, 1.0, 1.001])]}, "metakern")


@pytest.mark.parametrize("name", TRAINING)
def test_plain_networks_are_the_modules(name: str) -> None:
    problem, images = network(name), load_digits("train")[0][:5]
    params = {key: p[0] for key, p in problem.sample(1, torch.Generator().manual_seed(0)).init_params().items()}
    expected = functional_call(problem.network, params, (images,))
    torch.testing.assert_close(logits(name.partition("-")[0], params, images), expected)


def test_tasks_have_data_of_their_own() -> None:
    (group,) = balanced(["mlp-20-sigmoid"], "train", 3, torch.Generator().manual_seed(0)).groups
    assert group.inputs.shape == (3, 200, 64)
    images, labels = load_digits("train")
    pixels = images.sort(1).values
    for inputs, targets in zip(group.inputs, group.targets, strict=True):
        same = (inputs.sort(1).values.unsqueeze(1) == pixels).all(2)  # a symmetry permutes pixels
        assert same.any(1).all()
        pairs = {(int(labels[row.nonzero()[0, 0]]), int(target)) for row, target in zip(same, targets, strict=True)}
        assert len(pairs) == len({old for old, _ in pairs}) == len({new for _, new in pairs})  # names are a permutation
    assert not torch.equal(group.targets[0], group.targets[1])
    whole, part = group.select(slice(None)), group.select(slice(1, 2))
    torch.testing.assert_close(whole.minibatch()[0][1:2], part.minibatch()[0])
    params = group.init_params()
    (losses, mean) = group.full_loss(params), group.problem.losses(params, group.inputs, group.targets)
    torch.testing.assert_close(losses, mean)


def test_test_networks_and_images_are_in_no_other_set() -> None:
    sized = [name for name in test_tasks.NETWORKS if name != "regression-8"]
    assert not set(sized) & {*TRAINING, *VALIDATION}
    assert held_out_tasks().num_tasks == len(test_tasks.NETWORKS) * test_tasks.TASKS
    kinds = kinds_by_shape(validation_tasks())
    assert kinds.bincount().tolist() == [8, 8, 8, 8]


@pytest.mark.parametrize("way", ["plain", "scales", "curvature", "soft", "told"])
def test_every_way_trains(way: str, tmp_path: Path) -> None:
    run = kept(tmp_path, "lstm", way, 0, TINY, lambda _: None)
    assert [point["iteration"] for point in run["curve"]] == [0, 2]
    assert run["curve"][0]["loss"] != run["curve"][1]["loss"]
    assert len(run.get("test_of_tasks", ())) == (64 if way in learning.REPORTED else 0)
    (path,) = tmp_path.glob("*.json")
    (tried,) = report.tried(tmp_path)
    assert (tried["way"], tried["curve"]) == (way, run["curve"])
    path.write_text(json.dumps(run | {"seconds": -1.0}))
    assert kept(tmp_path, "lstm", way, 0, TINY, lambda _: None)["seconds"] == -1.0  # from its file


def curve(*losses: float) -> dict[str, Any]:
    """A run of these validation meta-losses, tested at the last."""
    points = [{"iteration": 10 * at, "seconds": 2.0 * at, "loss": loss} for at, loss in enumerate(losses)]
    test = {"loss": losses[-1] + 0.1, "final": 0.5}
    return {"curve": points, "seconds": points[-1]["seconds"], "test": test}


def test_targets_and_tables_are_of_the_figures(measured: dict[str, Any], tmp_path: Path) -> None:
    runs = {
        way: [curve(1.0, 0.5, 0.3), curve(1.0, 0.5, 0.2)] if way == "plain" else [curve(1.0, 0.1, 0.0)] * 2
        for way in learning.REPORTED
    }
    machine = {"cpu": "x", "threads": 1, "cpu_capability": "avx2", "versions": {"torch": "2"}, "date": "now"}
    times = {"steps": 2, "tasks_of_a_kind": 1, "kinds": list(TRAINING), "machine": machine, "rules": measured}
    learned = {"lstm": report.learned(runs)}
    found = {"times": {"avx2": times}, "learning": learned}
    found["derived_seconds"] = report.seconds_by_way(found["times"], learned)
    own = learned["lstm"]["ways"]
    assert own["scales"]["reaches"] == [{"iterations": 10, "share": 0.5, "seconds": 2.0}] * 2
    assert own["plain"]["reaches"][0] == {"iterations": 20, "share": 1.0, "seconds": 4.0}
    assert own["scales"]["difference"]["mean"] == pytest.approx(-0.25)
    assert learned["lstm"]["goal"]["mean"] == pytest.approx(0.25)
    ratio = measured["lstm"]["speedup"]["sequential"]["median"]
    assert found["derived_seconds"]["avx2"]["lstm"]["sequential"] == pytest.approx(4 * ratio)
    targets = {(t["kind"], t["name"]): t for t in report.judge(found)}
    assert targets["must", "against sequential, lstm, avx2"]["measured"] == ratio
    assert targets["must", "lstm, clusters: share of the iterations of one rule to its last meta-loss"]["met"]
    settings = {"steps": 2, "iterations": 20, "tasks": 3, "seeds": 2, "test_tasks": 64}
    lines = tables.paper_lines(settings | found)
    assert sum(line.startswith("| coordinatewise LSTM, AVX2 | ") for line in lines) == 4
    assert "| coordinatewise LSTM | one rule | 0.350" in "\n".join(lines)
    assert "50%, 2 s |" in "\n".join(lines)
    report.plot(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    timing.show(times, Console(file=(tmp_path / "table.txt").open("w")))
