"""The benchmarks run, compare equal work and report their measurements. No test here depends on timings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import machine, report
from bench.lstm_step import compare, work
from bench.lstm_step.contenders import Compiled, Eager, Fused, check_agreement, make_contenders, make_problem, make_rule
from bench.lstm_step.targets import judge
from bench.lstm_step.unroll import in_subprocess
from bench.timing import alternate
from metakern import build_info
from metakern.core import backend as _backend
from metakern.ops import LSTMState
from tests.bench.bench_runs import run_quick

needs_kernels = pytest.mark.skipif(not _backend.is_compiled(), reason="the compiled kernels are what is measured")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of ``python -m bench.lstm_step.compare --quick``."""
    return run_quick("lstm_step.compare", tmp_path_factory.mktemp("bench"), "ns per coordinate")


@needs_kernels
def test_quick_comparison_writes_everything(quick: Path) -> None:
    results = json.loads(quick.read_text())
    assert results["command"].startswith("python -m bench.lstm_step.compare --quick --threads 1")
    assert results["machine"]["threads"] == 1
    assert set(results["machine"]) >= {"cpu", "cpu_capability", "versions", "date"}
    assert [(cell["op"], cell["n"]) for cell in results["cells"]] == [
        (op, n) for n in compare.QUICK.sizes for op in ("forward", "forward_backward")
    ]
    for cell in results["cells"]:
        assert set(cell["contenders"]) == {"metakern", "eager"}
        for time in cell["contenders"].values():
            assert 0 < time["q20_s"] <= time["median_s"] <= time["q80_s"]
        ratio = cell["contenders"]["eager"]["median_s"] / cell["contenders"]["metakern"]["median_s"]
        assert cell["speedup"]["eager"] == pytest.approx(ratio)
        assert cell["max_relative_difference"] < 1e-4
    assert results["unroll"]["metakern"]["loss"] == pytest.approx(results["unroll"]["eager"]["loss"], rel=1e-4)
    assert results["unroll"]["eager"]["peak_bytes"] > 0
    assert results["overhead"]["n"] == 32
    assert results["optimizer"]["coordinates"] == 1510
    assert all(set(target) >= {"kind", "name", "required", "measured", "met"} for target in results["targets"])


@needs_kernels
def test_report_renders_the_results_into_a_page(quick: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    inner_loop = tmp_path / "inner-loop.json"
    inner_loop.write_text(json.dumps(INNER_LOOP))
    measured = {*report.sources([quick, inner_loop]), "gpu"}  # other tables stay unchanged
    places = "".join(
        f"<!-- bench:{name} -->\nold figures\n{report.END}\n" for name in report.TABLES if name in measured
    )
    readme.write_text(f"# title\n\n{places}\nend\n")
    report.main([quick, inner_loop], readme)
    text = readme.read_text()
    assert "old figures" not in text
    assert text.startswith("# title\n")
    assert text.endswith("\nend\n")
    assert "| forward | 2,000 |" in text
    assert "| Learned LSTM |" in text
    assert "| sinusoid |" in text
    assert "`python -m bench.lstm_step.compare --quick" in text
    assert "all figures in `results.json`" in text
    report.main([quick, inner_loop], readme)
    assert readme.read_text() == text


INNER_LOOP: dict[str, Any] = {
    "benchmark": "mlp_inner_loop",
    "command": "python -m bench.mlp_inner_loop.compare",
    "machine": {"cpu": "c", "threads": 2, "cpu_capability": "avx2", "versions": {"torch": "2"}, "date": "2026-01-02"},
    "libraries": {"higher": "0.2.1", "learn2learn": "not importable: not installed"},
    "sgemm_gflops": 190.6,
    "cells": [
        {
            "title": "sinusoid",
            "contenders": {"metakern": {"median_s": 0.0015}, "compiled": {"median_s": 0.003}},
            "speedup": {"compiled": 2.0, "loop": 65.04},
            "share_of_sgemm": 0.251,
            "first_result_s": {"metakern": 0.0123, "compiled": 50.4},
        },
        {
            "title": "conv4",
            "contenders": {"metakern": {"median_s": 0.1}},
            "speedup": {"loop": 1.26},
            "share_of_sgemm": 0.3,
            "first_result_s": {"metakern": 0.1},
        },
    ],
    "adapt": {
        "title": "one task",
        "contenders": {"metakern.MAML": {"median_s": 0.0004}, "loop": {"median_s": 0.0005}},
    },
    "memory": [
        {"title": "many steps", "contenders": {"metakern": {"peak_bytes": 2**20}, "loop": {"peak_bytes": 2**21}}},
    ],
    "targets": [{"name": "t", "kind": "aim", "relation": "≥", "required": 4.0, "measured": 2.0, "met": False}],
}


def test_the_table_of_the_inner_loop() -> None:
    """Missing peers leave empty cells; missed and unmeasured targets are listed."""
    assert report.render_inner_loop(INNER_LOOP, "file.json").splitlines() == [
        "| case | metakern | compiled | loop | of sgemm |",
        "|---|--:|--:|--:|--:|",
        "| sinusoid | 1.50 ms | 2.0x | 65.0x | 25.1% |",
        "| conv4 | 100.00 ms |  | 1.3x | 30.0% |",
        "",
        "Median time of a meta-iteration, all query losses and the backward of their mean: by "
        "`metakern.meta_backward`, and by autograd from `metakern.meta_loss`; the compiled peer's is one call, too. "
        "The other columns say how many times as long the peers take, the last one the share of the FLOPs in a "
        "second of a large float32 matrix product, 191 GFLOP/s in the same run.",
        "The first result takes 50 to 50 s with torch.compile, 0.012 to 0.012 s with metakern.",
        "One task by `MAML.adapt`, forward and backward (one task): 400 µs; loop 500 µs.",
        "Peak memory, many steps: metakern 1 MiB; loop 2 MiB.",
        "",
        "`python -m bench.mlp_inner_loop.compare` on c, 2 threads, avx2, torch 2, 2026-01-02; "
        "all figures in `file.json`.",
        "",
        "Not measured: learn2learn (not importable: not installed).",
        "",
        "Targets missed in this run: t: aim ≥ 4, measured 2.0.",
    ]


BEGIN = "<!-- bench:lstm_step -->"


@pytest.mark.parametrize("text", ["", BEGIN, f"{report.END} {BEGIN}", f"{BEGIN}{report.END}" * 2])
def test_report_refuses_a_file_without_its_markers(text: str) -> None:
    with pytest.raises(ValueError, match=r"must hold <!-- bench:lstm_step --> and, behind it, <!-- /bench -->, once"):
        report.insert(text, "lstm_step", "table")


def test_newest_results(tmp_path: Path) -> None:
    assert report.newest_results(tmp_path) == {}
    written = {
        "a": "cpu 2025-01-02 avx512",
        "b": "cpu 2024-01-02 avx512",
        "c": "gpu 2026-01-02 ",
        "d": "cpu 2023-01-02 avx2",
    }
    for name, text in written.items():
        device, date, capability = text.split(" ")
        described = {device: "its name", "date": date, "cpu_capability": capability}
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": described}))
    (tmp_path / "ptxas.json").write_text(json.dumps({"kernels": []}))
    (tmp_path / "e.json").write_text(json.dumps(INNER_LOOP))
    later = INNER_LOOP["machine"] | {"date": "2027-01-02"}
    partial = {**INNER_LOOP, "machine": later, "command": "python -m bench.mlp_inner_loop.compare --cases T"}
    (tmp_path / "f.json").write_text(json.dumps(partial))
    assert report.newest_results(tmp_path) == {"avx512": tmp_path / "a.json", "avx2": tmp_path / "d.json"}
    assert report.newest_results(tmp_path, "mlp_inner_loop") == {"avx2": tmp_path / "e.json"}


def test_every_instruction_set_has_a_table_that_names_it(tmp_path: Path) -> None:
    files = []
    for capability, seconds in (("avx2", 4.0), ("avx512", 2.0)):
        measured_on = INNER_LOOP["machine"] | {"cpu_capability": capability}
        cell = INNER_LOOP["cells"][0]
        ours = {"metakern": cell["contenders"]["metakern"] | {"median_s": seconds}}
        cells = [{**cell, "contenders": cell["contenders"] | ours}]
        files.append(tmp_path / f"{capability}.json")
        files[-1].write_text(json.dumps({**INNER_LOOP, "machine": measured_on, "cells": cells}))
    ordered = report.sources(files)["mlp_inner_loop"]
    assert [path.stem for path in ordered] == ["avx512", "avx2"]
    first, second = report.tables("mlp_inner_loop", ordered).split("**AVX2**")
    assert first.startswith("**AVX-512**\n\n| case |")
    assert "2000.00 ms" in first
    assert ", avx512, torch" in first
    assert "4000.00 ms" in second
    assert ", avx2, torch" in second
    assert report.tables("mlp_inner_loop", ordered[:1]).startswith("| case |")  # a single table has no heading


def test_files_of_results_are_named_by_processor_threads_and_instruction_set() -> None:
    name = machine.device_name()
    assert name == machine.slug(name)
    assert name.endswith(f"-threads-{build_info()['cpu_capability']}")


def test_report_refuses_results_that_have_no_table(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"benchmark": "another"}))
    with pytest.raises(ValueError, match=f"must be results of {', '.join(report.TABLES)}, got another"):
        report.sources([tmp_path / "a.json"])


def test_work_of_one_coordinate() -> None:
    """10.1 kFLOP and 652 bytes, counted from actual tensors."""
    rule = make_rule()
    products = sum(w.numel() for w in rule.parameters() if w.dim() == 2)
    bias = sum(w.numel() for name, w in rule.named_parameters() if name.startswith("lstm.bias_ih"))
    assert work.flops_per_coordinate() == 2 * products + bias == 10_120
    assert work.bytes_per_coordinate() == 2 * LSTMState.zeros(32).data.numel() // 32 * 4 + 12 == 652


def test_contenders_alternate() -> None:
    order: list[str] = []

    def call(name: str) -> Callable[[], None]:
        return lambda: order.append(name)

    times = alternate({"a": [call("a1"), call("a2")], "b": [call("b")]}, seconds=0, min_rounds=3, max_rounds=3)
    assert {name: time["samples"] for name, time in times.items()} == {"a": 3, "b": 3}
    calls = [name for name in order if name[0] == "a"]
    assert calls == [("a1", "a2")[i % 2] for i in range(len(calls))]  # consecutive calls take consecutive inputs
    blocks = [name[0] for i, name in enumerate(order) if i == 0 or order[i - 1][0] != name[0]]
    assert blocks == ["a", "b"] * 4  # warm-up, then three rounds


@needs_kernels
@pytest.mark.parametrize("backward", [False, True])
def test_all_contenders_agree(backward: bool) -> None:
    rule = make_rule(hidden_size=4)
    torch._dynamo.reset()
    problems = [make_problem(c, rule, 50, seed=1, backward=backward) for c in make_contenders(rule)]
    assert [type(p.contender) for p in problems] == [Fused, Eager, Compiled]
    assert check_agreement(problems, backward=backward) < 1e-5


@needs_kernels
def test_disagreement_is_noticed() -> None:
    class Wrong(Eager):
        name = "wrong"

        def step(self, params: Tensor, grads: Tensor, state: Any) -> tuple[Tensor, Any]:
            new, state = super().step(params, grads, state)
            return new * 1.001, state

    rule = make_rule(hidden_size=4)
    problems = [make_problem(contender, rule, 50, seed=1) for contender in (Fused(rule), Wrong(rule))]
    with pytest.raises(AssertionError, match=r"wrong and metakern differ by .* in result 0"):
        check_agreement(problems)


def test_targets_are_judged_as_met_or_missed() -> None:
    cells = [
        {"op": "forward", "n": 10**5, "speedup": {"eager": 8.0, "compiled": 3.9}, "share_of_fma_floor": 0.4},
        {"op": "forward_backward", "n": 10**5, "speedup": {"eager": 7.9}, "share_of_fma_floor": 0.4},
    ]
    unroll = {"n": 10**5, "steps": 20, "memory_ratio": 0.51}
    overhead = {"python_us": 14.9, "python_with_graph_us": 15.0}
    verdicts = {t["name"]: t["met"] for t in judge({"cells": cells, "unroll": unroll, "overhead": overhead})}
    assert verdicts == {
        "forward against compiled, N = 100,000": False,
        "forward against eager, N = 100,000": True,
        "forward + backward against eager, N = 100,000": False,  # the aim, 8x; the required 4x comes before it
        "forward against the FMA floor, N = 100,000": False,
        "peak memory of a 20-step unroll against eager, N = 100,000": False,
        "Python around the operator, no graph": True,
        "Python around the operator, with a graph": False,
    }
    musts = [t["name"] for t in judge({"cells": cells, "unroll": unroll, "overhead": overhead}) if t["met"]]
    assert "forward + backward against eager, N = 100,000" in musts


@needs_kernels
def test_a_twenty_step_unroll_takes_at_most_half_the_memory_of_eager() -> None:
    """Memory, unlike time, can be tested: each peak is measured in a separate process."""
    ours, eager = (in_subprocess(kind, 20_000, 20, 1)["peak_bytes"] for kind in ("metakern", "eager"))
    assert ours <= eager / 2


def test_the_headline_ratios_are_those_of_the_results() -> None:
    readme = (report.ROOT / "README.md").read_text()
    assert readme == report.insert(readme, "headline", report.headline(report.sources([])))


def test_the_tables_of_the_documentation_are_those_of_the_results() -> None:
    text = (report.ROOT / "docs" / "benchmarks.md").read_text()
    for name in ("lstm_step", "digits_lstm", "sinusoid"):
        table = text.split(f"<!-- bench:{name} -->")[1].split(report.END)[0]
        assert "| --" in table or "--:|" in table, f"no table of {name} in the documentation"
    for source in re.findall(r"all figures in `(.*?)`", text):
        assert (report.ROOT / source).is_file(), source


def test_tables_of_the_operators_that_step_rules() -> None:
    """Cells as their benchmarks write them, with a peer left out."""
    machine = {"threads": 2, "cpu": "a CPU", "cpu_capability": "avx2", "versions": {"torch": "2"}, "date": "today"}
    head = {"command": "python -m bench", "machine": machine, "targets": []}
    times = {"metakern": {"median_s": 1e-3}, "eager": {"median_s": 4e-3}}
    cell = {"contenders": times, "speedup": {"eager": 4.0}}
    hrnn = cell | {"tensors": "2 x 100", "op": "forward_backward", "n": 1000, "share_of_floor": 0.25}
    results = head | {"cells": [hrnn], "floor": "the products", "kept_bytes": 92.0}
    table = report.TABLES["hrnn_step"](results, "file.json")
    assert "| 2 x 100 | forward + backward | 1000 ns | 4000 ns |  | 4.0x |  | 25% |" in table
    mlp = cell | {"title": "forward", "coordinates": 1000, "share_of_sgemm": 0.5, "share_of_copy": None}
    table = report.TABLES["mlp_update_step"](head | {"cells": [mlp]}, "file.json")
    assert "| forward | 1000 ns | 4000 ns |  | 4.0x |  | 50% |  |" in table
    ops = {"forward": {"multiple_of_lstm_step": 1.234}}
    rule = {"rule": "RNNProp", "n": 1000, "ops": ops, "kept_bytes_per_coordinate": {"rule": 344.0}}
    table = report.TABLES["lstm_step_rules"](head | {"cells": [rule]}, "file.json")
    assert "| RNNProp | forward | 1,000 | 1.23 | 344 |" in table
    assert "all figures in `file.json`" in table
