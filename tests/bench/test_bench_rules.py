"""The benchmark of the rules on lstm_step's kernels compares equal work. No test here depends on timings."""

from __future__ import annotations

import pytest

from bench.lstm_step import rules
from metakern.core import backend as _backend

pytestmark = pytest.mark.skipif(not _backend.is_compiled(), reason="the compiled kernels are what is measured")

#: Bytes that backward needs for a coordinate: h and c of every layer, the stages' state, param, gradient; and gates,
#: five numbers for every unit, which calls of this size keep.
KEPT = {"RNNProp": (2 + 5) * 2 * 20 * 4 + 4 * 4 + 8, "Meta-LSTM": (2 + 5) * 20 * 4 + 2 * 4 + 8}


@pytest.mark.parametrize("name", rules.RULES)
def test_a_cell_holds_times_multiples_and_the_bytes_kept(name: str) -> None:
    cell = rules.measure_cell(name, 3200, rules.Plan((3200,), 0.01, 1), lambda share: None)
    assert cell["max_relative_difference"] < 1e-5
    for op in rules.OPS:
        found = cell["ops"][op]
        assert found["multiple_of_lstm_step"] == found["rule"]["median_s"] / found["lstm_step"]["median_s"]
        assert 0 < found["rule"]["min_s"] <= found["rule"]["median_s"]
    assert cell["kept_bytes_per_coordinate"]["rule"] == pytest.approx(KEPT[name], abs=0.01)
    assert cell["kept_bytes_per_coordinate"]["eager"] > KEPT[name]


def test_targets_are_judged_at_the_largest_size() -> None:
    ops = {op: {"multiple_of_lstm_step": multiple} for op, multiple in zip(rules.OPS, (1.2, 1.4), strict=True)}
    targets = rules.judge([{"rule": "RNNProp", "n": n, "ops": ops} for n in rules.FULL.sizes])
    assert [target["met"] for target in targets] == [True, False]
    assert targets[0]["name"] == "RNNProp, forward against lstm_step, N = 100,000"
