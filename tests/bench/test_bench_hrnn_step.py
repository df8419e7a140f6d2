"""The benchmark of hrnn_step compares equal work. No test here depends on timings."""

from __future__ import annotations

from typing import Any

import pytest

from bench.hrnn_step import compare, targets
from bench.hrnn_step.work import KEPT_BYTES, Speeds, bytes_per_coordinate, flops_per_coordinate
from metakern.core import backend as _backend

pytestmark = pytest.mark.skipif(not _backend.is_compiled(), reason="the compiled kernels are what is measured")

SPEEDS = Speeds(gflops=100.0, exp_ns=0.2, gigabytes_per_second=20.0)


@pytest.mark.parametrize("op", compare.OPS)
def test_a_cell_holds_times_ratios_and_the_share_of_the_floor(op: str) -> None:
    cell = compare.Cell("3 and 40", (3, 40), tasks=2)
    plan = compare.Plan((cell,), 0.01, 1, 64)
    found = compare.measure_cell(cell, op, plan, False, SPEEDS, lambda share: None)
    assert found["n"] == 86
    assert found["max_relative_difference"] < 1e-4
    ours = found["contenders"]["metakern"]
    assert found["speedup"] == {"eager": found["contenders"]["eager"]["median_s"] / ours["median_s"]}
    assert found["share_of_floor"] == pytest.approx(found["floor_ns"] / ours["ns_per_coordinate"])


def test_the_floor_is_arithmetic_or_traffic() -> None:
    assert SPEEDS.floor_ns() == pytest.approx(flops_per_coordinate() / 100 + 45 * 0.2)
    slow = Speeds(gflops=1e6, exp_ns=0.0, gigabytes_per_second=1.0)
    assert slow.floor_ns() == bytes_per_coordinate() == 180
    assert compare.kept_bytes(10_000) == pytest.approx(KEPT_BYTES, abs=0.5)


def test_targets_are_judged_where_they_were_measured() -> None:
    cells: list[dict[str, Any]] = [{"tensors": "4 x 25,000", "op": "forward", "speedup": {"eager": 7.0}}]
    judged = targets.judge({"cells": cells, "kept_bytes": 92.0})
    assert [(target["kind"], target["met"]) for target in judged] == [("must", True), ("aim", False), ("must", True)]
