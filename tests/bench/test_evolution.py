"""bench.evolution: a quick run has every figure."""

import json

from bench import report
from bench.evolution import CELLS, RULES
from metakern.rules.registry import names
from tests.bench.bench_runs import run_quick


def test_a_quick_run_has_costs_and_variances(tmp_path):
    results = json.loads(run_quick("evolution", tmp_path, "pairs over two forward unrolls").read_text())
    assert [cell["rule"] for cell in results["costs"]] == ["coordinatewise-lstm", "adam"]
    for cell in results["costs"]:
        times = cell["contenders"]
        assert cell["over_two_forward"] == times["pes"]["median_s"] / (2 * times["forward"]["median_s"])
    assert {row["estimator"] for row in results["variances"]} == {"es", "pes", "noise-reuse"}
    assert all(row["variance"] > 0 for row in results["variances"])
    lines = report.TABLES["evolution"](results, "file.json").splitlines()
    assert lines[2].startswith("| coordinatewise-lstm | 2 digits | ")
    assert lines[2].endswith(f"| {results['costs'][0]['over_two_forward']:.2f} |")
    assert sum("Targets missed" in line for line in lines) == any(not target["met"] for target in results["targets"])


def test_every_rule_is_measured():
    assert set(RULES) <= set(names())
    assert {rule for rule, _, _ in CELLS} == set(RULES)
