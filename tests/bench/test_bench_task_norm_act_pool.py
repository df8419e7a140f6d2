"""The benchmark of task_norm_act_pool compares equal work. No test here depends on timings."""

from __future__ import annotations

from typing import Any

import pytest

from bench.task_norm_act_pool import compare, targets
from bench.task_norm_act_pool.contenders import CONTENDERS, PASSES, Block
from metakern.core import backend as _backend

pytestmark = pytest.mark.skipif(not _backend.is_compiled(), reason="the compiled kernels are what is measured")


@pytest.mark.parametrize("which", PASSES)
def test_a_cell_holds_times_and_ratios_of_equal_work(which: str) -> None:
    block = Block("small", 2, 3, 2, 5)
    found = compare.measure_cell(block, which, compare.Plan((block,), 0.01, 1), lambda share: None)
    assert found["max_relative_difference"] < 1e-4
    assert found["bytes_of_x"] == 4 * 2 * 3 * 2 * 25
    times = found["contenders"]
    assert set(times) == set(CONTENDERS)
    assert found["speedup"]["loop"] == times["loop"]["median_s"] / times["metakern"]["median_s"]
    assert found["times_a_copy"] == times["metakern"]["median_s"] / found["copy_of_x"]["median_s"]


def test_the_target_is_judged_for_every_cell_against_the_better_way() -> None:
    cells: list[dict[str, Any]] = [
        {"pass": "forward", "block": "a", "speedup": {"loop": 2.5, "channels": 1.5}},
        {"pass": "forward", "block": "b", "speedup": {"loop": 2.5, "channels": 3.0}},
    ]
    assert [target["met"] for target in targets.judge({"cells": cells})] == [False, True]
