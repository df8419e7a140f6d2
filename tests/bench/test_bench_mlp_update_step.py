"""bench.mlp_update_step: small cases end to end, and the floors."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bench.mlp_update_step import compare
from bench.mlp_update_step.targets import judge
from bench.mlp_update_step.work import bytes_per_coordinate, flops_per_coordinate


def test_floors() -> None:
    assert flops_per_coordinate(32, 2) == 2 * (39 * 32 + 32 * 32 + 2 * 32)
    assert flops_per_coordinate(4, 2) == 2 * (39 * 4 + 4 * 4 + 2 * 4)
    assert bytes_per_coordinate() == 4 * (6 + 5)


def test_small_cases_agree_and_are_shown() -> None:
    console = Console(file=io.StringIO(), width=200)
    results = compare.measure(compare.QUICK, True, 0.05, console)
    assert [cell["backward"] for cell in results["cells"]] == [False, True]
    assert all(cell["max_relative_difference_float64"] < 1e-8 for cell in results["cells"])
    assert results["targets"] == []  # they hold for the wide network only
    compare.show(results, console)


def test_targets_of_the_wide_network() -> None:
    cell = {"title": "t", "backward": False, "width": 32, "speedup": {"eager": 13.0, "compiled": 2.0}}
    found = judge([cell | {"share_of_sgemm": 0.5}])
    assert [(x["kind"], x["met"]) for x in found] == [("must", True), ("aim", True), ("must", False), ("must", True)]
    assert found[-1]["measured"] == pytest.approx(2.0)
