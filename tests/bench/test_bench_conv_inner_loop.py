"""The benchmark of the convolutional inner loop compares equal work. No test here depends on timings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from bench import report
from bench.conv_inner_loop import compare
from bench.conv_inner_loop.cases import conv4_28, conv4_84, resnet12_84
from bench.conv_inner_loop.targets import judge
from bench.mlp_inner_loop.contenders import AGREEMENT, results
from bench.peers import LIBRARIES
from metakern.core import backend as _backend
from metakern.models import RESNET12_WIDTHS
from tests.bench.bench_runs import run_quick

pytestmark = pytest.mark.skipif(not _backend.is_compiled(), reason="the compiled kernels are what is measured")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of ``python -m bench.conv_inner_loop.compare --quick``."""
    folder: Path = tmp_path_factory.mktemp("bench")
    found: dict[str, Any] = json.loads(run_quick("conv_inner_loop.compare", folder, "one meta-iteration").read_text())
    return found


def test_a_run_holds_times_and_ratios_of_equal_work(quick: dict[str, Any]) -> None:
    assert quick["benchmark"] == "conv_inner_loop"
    assert {*LIBRARIES, "compiled"} == set(quick["libraries"])
    assert [cell["title"] for cell in quick["cells"]] == [case.title for case in compare.QUICK.cases]
    for cell in quick["cells"]:
        seconds = {name: time["median_s"] for name, time in cell["contenders"].items()}
        assert {*compare.OURS, "loop"} <= set(seconds)
        assert cell["speedup"]["loop"] == pytest.approx(seconds["loop"] / seconds["metakern"])
        assert cell["fastest_peer"] not in compare.OURS
        assert seconds[cell["fastest_peer"]] == min(s for name, s in seconds.items() if name not in compare.OURS)
        assert cell["share_of_sgemm"] == pytest.approx(
            cell["flops"] / seconds["metakern"] / quick["sgemm_gflops"] / 1e9
        )
        errors = cell["relative_difference_float64"]
        assert all(errors[name] < AGREEMENT for name in errors if name not in cell["wrong"])
        assert cell["norm_error_float32"].keys() == cell["contenders"].keys()
        assert max(cell["norm_error_float32"].values()) < compare.NORM_ERROR


def test_a_peer_by_vmap_is_measured_where_it_is_right_and_named_elsewhere(quick: dict[str, Any]) -> None:
    for cell in quick["cells"]:
        assert ("vmap" in cell["contenders"]) == (cell["relative_difference_float64"]["vmap"] < AGREEMENT)
        assert ("vmap" in cell["contenders"]) == (cell["wrong"] == [])
        assert "compiled" in cell["absent"]


def test_any_other_disagreement_ends_the_run() -> None:
    small = replace(compare.SMALL, tasks=1, steps=1)
    ours, wrong = compare.make("metakern", small, {}), compare.make("loop", replace(small, lr=0.2), {})
    assert ours is not None
    assert wrong is not None
    with pytest.raises(AssertionError, match=r"loop and metakern differ by .* in result 0"):
        compare.errors_of({"metakern": ours, "loop": wrong}, small.batch(0))
    for contender in (ours, wrong):
        contender.model.float()
    truth = compare.true_results(small, small.batch(0))
    with pytest.raises(ArithmeticError, match=r"loop differs by .* of the norm, allowed 1e-02"):
        compare.first_results({"metakern": ours, "loop": wrong}, small.batch(0), truth)


def test_the_cases_are_those_of_few_shot_learning() -> None:
    titles = [case.title for case in (*compare.FULL.cases, *compare.LARGE)]
    assert len(set(titles)) == len(titles)
    for shots in (1, 5):
        for tasks in (4, 32):
            for steps in (1, 5):
                case = conv4_28(shots, tasks, steps)
                assert case.title in titles
                assert (case.support, case.query) == (5 * shots, 75)
    assert {conv4_84(tasks, steps).title for tasks in (2, 4) for steps in (1, 5)} <= set(titles)
    assert {resnet12_84(tasks).title for tasks in (1, 2)} <= set(titles)
    assert sum(case.first_order for case in compare.FULL.cases) == 3


def test_resnet12_is_compared_on_small_images_and_meta_trains() -> None:
    case = replace(resnet12_84(2).compared(), widths=(2, 3, 4, 5, 5), shape=(3, 16, 16))
    assert resnet12_84(2).compared().shape == (3, 36, 36)
    assert resnet12_84(1).model()[-1].in_features == RESNET12_WIDTHS[-1]  # type: ignore[index]
    contender = compare.make("metakern", case, {})
    assert contender is not None
    losses, *gradients = results(contender, case.batch(0))
    assert losses.shape == (2,)
    assert len(gradients) == len(list(contender.model.parameters()))
    assert all(torch.isfinite(x).all() for x in gradients)


def test_targets_are_judged_against_the_fastest_peer() -> None:
    cells = [
        {"title": "conv4 28", "fastest_peer": "loop", "speedup": {"loop": 3.0, "vmap": 9.0}, "share_of_sgemm": 0.5},
        {"title": "ResNet-12", "fastest_peer": "loop", "speedup": {"loop": 1.2}, "share_of_sgemm": 0.1},
    ]
    verdicts = [(target["kind"], target["required"], target["met"]) for target in judge(cells)]
    conv4 = [("must", 2.0, True), ("aim", 4.0, False), ("must", 0.6, False)]
    assert verdicts == [*conv4, ("must", 1.3, False), ("aim", 2.5, False)]


def test_a_part_of_the_cases_needs_a_file_of_its_own() -> None:
    with pytest.raises(typer.BadParameter, match="--case needs --output"):
        compare.main(case="84x84")
    with pytest.raises(typer.BadParameter, match="must be part of a title, got 'K = 7'; there are: conv4"):
        compare.main(case="K = 7", output=Path("unused.json"))


def test_the_table_says_which_peers_are_wrong_and_which_are_missing(quick: dict[str, Any]) -> None:
    text = report.TABLES["conv_inner_loop"](quick, "file.json")
    second, first = text.splitlines()[2:4]
    assert second.startswith(f"| {compare.QUICK.cases[0].title} | ")
    assert ("wrong" in second) == bool(quick["cells"][0]["wrong"])
    assert ("wrong" in first) == bool(quick["cells"][1]["wrong"])
    assert "compiled (not measured: needs --compile)" in text
    assert "all figures in `file.json`" in text
