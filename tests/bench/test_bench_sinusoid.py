"""bench.train_sinusoid: same tasks and weights for both ways, intervals, verdicts, the README."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import report, train_sinusoid
from bench.mlp_inner_loop.cases import sinusoid
from bench.targets import judge_sinusoid
from bench.train_sinusoid import HELD_OUT_SEED, QUICK, WAYS, at_test, summary, train, training_seed
from tests.bench.bench_runs import run_quick

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of ``python -m bench.train_sinusoid --quick``."""
    path = run_quick("train_sinusoid", tmp_path_factory.mktemp("bench"), "test loss, mean and 95 % interval")
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def test_quick_run_writes_everything(quick: dict[str, Any]) -> None:
    assert quick["benchmark"] == "sinusoid"
    assert quick["command"].startswith("python -m bench.train_sinusoid --quick --threads 1")
    assert set(quick["machine"]) >= {"cpu", "threads", "versions", "date"}
    assert (quick["iterations"], quick["seeds"], quick["held_out_tasks"]) == (20, 2, 10)
    assert quick["curve_iterations"] == [0, 10, 20]
    ours, plain = (quick["ways"][way] for way in WAYS)
    for way in (ours, plain):
        assert list(way["test_loss"]) == ["1", "5", "10"]
        assert len(way["curve"]) == 3
        assert all(seconds > 0 for seconds in way["seconds"]["of_seeds"])
        assert way["curve"][-1]["mean"] == pytest.approx(way["test_loss"]["1"]["mean"])
        assert way["curve"][-1]["mean"] < way["curve"][0]["mean"]
    for steps, difference in quick["difference"].items():
        pairs = zip(ours["test_loss"][steps]["of_seeds"], plain["test_loss"][steps]["of_seeds"], strict=True)
        assert difference["of_seeds"] == pytest.approx([a - b for a, b in pairs])
    assert quick["first_iterations"]["iterations"] == 20
    assert quick["first_iterations"]["float32"] < 1e-4
    assert quick["first_iterations"]["float64"] < 1e-12
    assert len(quick["targets"]) == 4


def test_the_two_ways_train_the_same_model() -> None:
    """Within twenty iterations rounding does not grow."""
    ours, plain = (train(way, 3, QUICK, lambda _: None) for way in WAYS)
    assert ours.losses == pytest.approx(plain.losses, rel=1e-5)
    assert ours.exact_losses == pytest.approx(plain.exact_losses, rel=1e-12)
    assert ours.losses == pytest.approx(ours.exact_losses, rel=1e-4)
    assert ours.curve == pytest.approx(plain.curve, rel=1e-5)
    for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    other = train("metakern", 4, QUICK, lambda _: None)
    assert other.losses != ours.losses


def test_training_through_metakern_is_fused(caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise both ways would be plain PyTorch."""
    with caplog.at_level("DEBUG", "metakern"):
        run = train("metakern", 0, replace(QUICK, iterations=1, every=1), lambda _: None)
        at_test("metakern", run.model, train_sinusoid.FULL.held_out).query_losses(*QUICK.held_out.batch(0))
    assert len(caplog.records) == 5
    assert all("fused inner loop, Sequential" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("steps", [1, 10])
def test_the_two_ways_predict_the_same(steps: int) -> None:
    case = replace(QUICK.held_out, steps=steps)
    support, (x, y) = case.batch(0)
    models = {way: at_test(way, case.model(), case) for way in WAYS}
    ours, plain = (model.predictions(support, x) for model in models.values())
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    losses = models["metakern"].query_losses(support, (x, y))
    torch.testing.assert_close((ours - y).square().mean((1, 2)), losses)


def test_a_task_is_one_sinusoid_in_both_sets() -> None:
    """y = a sin x + b cos x: five samples determine a and b, which then fit all others."""
    (x, y), (query_x, query_y) = replace(sinusoid(), support=5, query=50).batch(7)

    def basis(points: torch.Tensor) -> torch.Tensor:
        return torch.cat([points.sin(), points.cos()], 2).double()

    weights = torch.linalg.lstsq(basis(x), y.double()).solution
    torch.testing.assert_close(basis(query_x) @ weights, query_y.double(), rtol=0, atol=1e-3)
    amplitude = weights.square().sum((1, 2)).sqrt()
    assert amplitude.max() < 5.01
    assert len(amplitude.unique()) == 32


def test_no_tasks_are_seen_twice() -> None:
    full = train_sinusoid.FULL
    seeds = {training_seed(seed, iteration) for seed in range(full.seeds) for iteration in range(full.iterations)}
    assert len(seeds) == full.seeds * full.iterations
    assert len({seed % 2**32 for seed in (*seeds, HELD_OUT_SEED)}) == len(seeds) + 1  # a generator uses 32 bits


def test_the_interval_is_students() -> None:
    """t of 4 degrees of freedom is 2.776; the standard deviation of 1 to 5 is √2.5."""
    found = summary([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["mean"] == 3
    assert found["high"] - 3 == pytest.approx(2.7764 * (2.5 / 5) ** 0.5, rel=1e-4)
    assert found["low"] + found["high"] == pytest.approx(6)


def test_targets_are_judged_as_met_or_missed() -> None:
    differences = {"1": {"mean": 0.1, "low": -0.1, "high": 0.3}, "5": {"mean": -0.3, "low": -0.5, "high": -0.1}}
    first = {"iterations": 100, "float32": 1e-3, "float64": 2e-12}
    targets = judge_sinusoid({"difference": differences, "first_iterations": first})
    assert [(t["measured"], t["met"]) for t in targets] == [
        (2e-12, False),
        (pytest.approx(0.5), True),
        (pytest.approx(1.5), False),
    ]


def test_the_figure_and_the_table(quick: dict[str, Any], tmp_path: Path) -> None:
    train_sinusoid.plot(quick, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    lines = report.render_sinusoid(quick, "file.json").splitlines()
    assert lines[:2] == ["| steps at test | metakern | plain PyTorch | difference |", "|--:|--:|--:|--:|"]
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["1", "5", "10"]
    text = "\n".join(lines)
    for said in ("of 10 held-out tasks, 10 each", "of 2 seeds", "20 meta-iterations of 25 tasks", "`file.json`"):
        assert said in text
