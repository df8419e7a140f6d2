"""The benchmark of task_conv2d compares equal work. No test here depends on timings."""

from __future__ import annotations

from typing import Any

import pytest

from bench.task_conv2d import compare, targets
from bench.task_conv2d.contenders import CONTENDERS, MAPS, Layer
from metakern.core import backend as _backend

pytestmark = pytest.mark.skipif(not _backend.is_compiled(), reason="the compiled kernels are what is measured")


@pytest.mark.parametrize("which", MAPS)
def test_a_cell_holds_rates_and_ratios_of_equal_work(which: str) -> None:
    layer = Layer("small", 2, 3, 2, 5, 4)
    found = compare.measure_cell(layer, which, compare.Plan((layer,), 0.01, 1, 64), 100.0, lambda share: None)
    assert found["max_relative_difference"] < 1e-4
    assert found["flops"] == 2 * 2 * 3 * 2 * 5 * 9 * 16
    times = found["contenders"]
    assert set(times) == set(CONTENDERS)
    assert found["speedup"]["loop"] == times["loop"]["median_s"] / times["metakern"]["median_s"]
    rate = found["flops"] / times["metakern"]["median_s"] / 1e9
    assert found["share_of_matrix_product"] == pytest.approx(rate / 100)


def test_targets_are_judged_for_every_cell() -> None:
    cells: list[dict[str, Any]] = [
        {"map": "y", "layer": "a", "share_of_matrix_product": 0.7, "speedup": {"loop": 1.5, "grouped": 3.0}}
    ]
    assert [target["met"] for target in targets.judge({"cells": cells})] == [True, False]
