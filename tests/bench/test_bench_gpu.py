"""Inner-loop and inner_update benchmarks of `make gpu-check`, with the CPU in place of a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import gpu, gpu_check, report
from bench.gpu_budget import CELLS, DRY, FULL, failures, measure, table
from bench.gpu_cells import Cell
from bench.gpu_device import CpuStandIn
from bench.inner_update.gpu import UpdateCase, update_cell
from bench.mlp_inner_loop.cases import sinusoid
from bench.mlp_inner_loop.gpu import loop_cell
from bench.mlp_inner_loop.targets import GPU_INNER_LOOP_PEERS, GPU_INNER_LOOP_TITLES, judge_gpu_inner_loop
from metakern.core import backend as _backend

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not _backend.is_compiled(), reason="the compiled kernels stand in for those of CUDA"),
]

SMALL = sinusoid(2, 2)
UPDATE = UpdateCase(3, 4, 2, clip_norm=1.0, backward=True)


def device(*backends: str) -> CpuStandIn:
    stand_in = CpuStandIn()
    stand_in.backends = backends
    return stand_in


@pytest.mark.parametrize(
    "cell",
    [
        lambda d: loop_cell(SMALL, d, DRY.limits, compiled=False),
        lambda d: update_cell(UPDATE, d, DRY.limits, compiled=False),
    ],
)
def test_a_backend_that_is_not_there_is_absent_with_its_reason_and_no_failure(cell: Any) -> None:
    made: Cell = cell(device("cpp", "cuda"))
    found = made.measure()
    assert "backend 'cuda' cannot run: " in found["unavailable"]["cuda"]
    assert found["failed"] == []
    peer, *ours = found["contenders"]
    assert peer in ("vmap", "foreach")
    assert ours == ["cpp"]
    ratio = found["contenders"][peer]["median_s"] / found["contenders"]["cpp"]["median_s"]
    assert found["contenders"]["cpp"]["speedup"] == {peer: pytest.approx(ratio)}
    assert found["contenders"]["cpp"]["speedup_over_fastest_peer"] == pytest.approx(ratio)
    assert found["fastest_peer"] == peer
    assert found["difference_from_the_first"]["cpp"] < 1e-4


def test_a_backend_that_breaks_or_errs_fails_the_run_and_a_peer_does_not() -> None:
    made = Cell("case", device("cpp"), DRY.limits)
    one = torch.ones(3)

    def returns(result: torch.Tensor) -> Any:
        return lambda: ([lambda: None], lambda: [result])

    made.admit("peer", returns(one), ours=False)
    made.admit("good", returns(one * 1.0001), ours=True)
    made.admit("wrong", returns(one * 1.1), ours=True)
    made.admit("nan", returns(one * float("nan")), ours=True)
    made.admit("broken", lambda: 1 / 0, ours=True)  # type: ignore[arg-type, return-value]
    made.admit("broken peer", lambda: 1 / 0, ours=False)  # type: ignore[arg-type, return-value]
    found = made.measure()
    assert list(found["contenders"]) == ["peer", "good"]
    assert found["failed"] == ["wrong", "nan", "broken"]
    assert found["unavailable"]["wrong"].startswith("ArithmeticError: result 0 differs from")
    assert found["unavailable"]["broken peer"] == "ZeroDivisionError: division by zero"
    wrong = [f"op, case: {name}" for name in ("wrong", "nan", "broken")]
    assert failures({"op": [found], "other": [], "skipped": {"op, title": "no time"}}) == wrong


def test_the_dry_run_measures_everything_and_says_what_it_skips() -> None:
    written: list[Any] = []
    found = measure(device("cpp"), DRY, 600.0, lambda state: written.append(sum(map(len, state.values()))))
    assert found["skipped"] == {}
    for name, cases in DRY.cases.items():
        assert [cell["title"] for cell in found[name]] == [case.title for case in cases]
        for cell in found[name]:
            assert {"cpp"} < cell["contenders"].keys(), cell
            assert cell["unavailable"] == {}
    count = len(DRY.jobs)
    assert written == list(range(1, count + 1))  # the results so far, after every case
    assert table(found).count("x the fastest peer") == count
    hurried = measure(device("cpp"), DRY, 0.0, lambda _: None)
    first, *others = DRY.cases
    assert len(hurried[first]) == 1  # the first case is always measured, without the compiled peer
    assert not any(hurried[name] for name in others)
    assert len(hurried["skipped"]) == count


def test_operators_are_found_by_their_folders_and_take_turns() -> None:
    assert CELLS.keys() == DRY.cases.keys() == FULL.cases.keys() >= {"inner_update", "lstm_step", "mlp_inner_loop"}
    turns = [name for name, _ in FULL.jobs]
    assert turns[: len(CELLS)] == list(CELLS)
    assert {name: turns.count(name) for name in CELLS} == {name: len(cases) for name, cases in FULL.cases.items()}


def test_every_target_has_its_case_and_one_that_is_not_measured_is_missed() -> None:
    assert {case.title for case in FULL.cases["mlp_inner_loop"]} == set(GPU_INNER_LOOP_TITLES)
    ours = {"cuda": {"speedup": {"vmap": 12.0, "compiled": 4.0}}}
    loops = {"mlp_inner_loop": [{"title": GPU_INNER_LOOP_TITLES[0], "contenders": ours}]}
    targets = judge_gpu_inner_loop({"backends": ["cuda", "triton"], "loops": loops})
    verdicts = {(t["kind"], t["name"]): (t["measured"], t["met"]) for t in targets}
    assert len(verdicts) == 2 * len(GPU_INNER_LOOP_TITLES) * len(GPU_INNER_LOOP_PEERS)
    small, large = GPU_INNER_LOOP_TITLES
    assert verdicts["aim", f"{small}, against vmap"] == (12.0, True)
    assert verdicts["must", f"{small}, against compiled"] == (4.0, True)
    assert verdicts["aim", f"{small}, against compiled"] == (4.0, False)
    assert verdicts["must", f"{large}, against vmap"] == (None, False)


def test_the_least_budget_holds_every_case_and_a_whole_one_the_compiled_peers() -> None:
    least = {name: limit for name, _, limit in gpu_check.BUDGET}["benchmarks"] - gpu_check.GRACE
    cells = 2 * FULL.limits.cell_seconds * len(FULL.jobs)
    assert cells <= FULL.share * least
    longest = len(FULL.cases["mlp_inner_loop"])  # the other peers compile in seconds
    assert cells + longest * FULL.limits.compile_seconds <= FULL.share * gpu.FULL.seconds


def test_the_table_says_what_was_not_measured() -> None:
    empty = report.render_gpu({}, "").splitlines()
    loops, updates = FULL.cases["mlp_inner_loop"], FULL.cases["inner_update"]
    assert len(empty) == 2 + len(loops) + len(updates)
    assert all(line.count(report.NOT_MEASURED) == 3 for line in empty[2:])
    title = loops[0].title
    cuda = {"median_s": 1.5e-4, "speedup_over_fastest_peer": 12.34}
    cell = {"title": title, "fastest_peer": "compiled", "contenders": {"vmap": {"median_s": 1.0}, "cuda": cuda}}
    machine = {"gpu": "H", "versions": {"cuda": "13", "torch": "2"}, "date": "today"}
    found = {"command": "python -m bench.gpu", "machine": machine, "loops": {"mlp_inner_loop": [cell]}}
    lines = report.render_gpu(found, "h.json").splitlines()
    assert lines[2] == f"| meta-iteration | {title} | 150 µs | {report.NOT_MEASURED} | 12.3x (compiled) |"
    assert lines[3:-2] == empty[3:]
    assert lines[-1] == "`python -m bench.gpu` on H, CUDA 13, torch 2, today; all figures in `h.json`."


def test_a_reduced_overhead_peer_takes_its_options_from_the_device() -> None:
    stand_in = device("cpp")
    stand_in.graph_options = {"backend": "no such compiler"}
    made = loop_cell(replace(SMALL, steps=1), stand_in, DRY.limits, compiled=True)
    assert list(made.calls) == ["vmap", "cpp"]
    assert "no such compiler" in made.unavailable["compiled"]
    assert made.failed == []
