"""bench.evolution: a quick run has every figure."""

import json

from tests.bench.bench_runs import run_quick


def test_a_quick_run_has_costs_and_variances(tmp_path):
    results = json.loads(run_quick("evolution", tmp_path, "pairs over two forward unrolls").read_text())
    assert [cell["rule"] for cell in results["costs"]] == ["coordinatewise-lstm", "adam"]
    for cell in results["costs"]:
        times = cell["contenders"]
        assert cell["over_two_forward"] == times["pes"]["min_s"] / (2 * times["forward"]["min_s"])
    assert {row["estimator"] for row in results["variances"]} == {"es", "pes", "noise-reuse"}
    assert all(row["variance"] > 0 for row in results["variances"])
