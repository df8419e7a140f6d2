"""Logic of `make gpu-check` without a GPU: its stages, their limits, and the benchmark's bookkeeping."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, gpu_check
from bench.gpu_device import CpuStandIn, time_limit
from bench.lstm_step import gpu as lstm_step
from bench.lstm_step.contenders import make_rule
from bench.lstm_step.gpu_contenders import CudnnPeer, Inputs, Variant, make_contenders, results
from bench.lstm_step.targets import judge_gpu
from bench.lstm_step.work import backward_bytes_per_coordinate, bytes_per_coordinate
from bench.peers import largest_difference
from metakern.core import backend as _backend
from tests.conformance.ops.rows import ROWS
from tests.gpu import cases
from tests.ops.lstm_step.gpu_cases import Case

ROOT = Path(__file__).parents[2]
needs_kernels = pytest.mark.skipif(not _backend.is_compiled(), reason="the compiled kernels stand in for those of CUDA")


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Output of a dry run, and its log folder."""
    logs = tmp_path_factory.mktemp("gpu-check")
    command = [sys.executable, "-m", "bench.gpu_check", "--dry", "--logs", str(logs)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout, logs


@needs_kernels
def test_dry_run_goes_through_every_stage(dry: tuple[str, Path]) -> None:
    printed, logs = dry
    rows = re.findall(r"^(\w+) +(passed|skipped) ", printed.split("\nstage ")[1], re.MULTILINE)
    assert dict(rows) == {
        "build": "skipped",
        "tests": "passed",
        "suite": "skipped",
        "memcheck": "passed",
        "racecheck": "skipped",
        "paper": "passed",
        "benchmarks": "passed",
    }
    assert "METAKERN_CUDA=1" in printed
    for tool in ("memcheck", "racecheck"):
        assert re.search(rf"compute-sanitizer --tool {tool} --error-exitcode=9 .* -m tests\.gpu\.cases$", printed, re.M)
    count = len(cases.cases("reference"))
    printed = (logs / "memcheck.log").read_text()
    assert f"{count} of {count} cases ran" in printed
    for op in ROWS:
        assert op.name in printed or (ROOT / "tests" / "ops" / (op.folder or op.name) / "gpu_cases.py").exists()
    assert "test_a_replayed_graph_equals_the_call_on_changed_inputs" in (logs / "tests.log").read_text()


@needs_kernels
def test_dry_run_writes_results(dry: tuple[str, Path]) -> None:
    found = json.loads((dry[1] / "dry.json").read_text())
    assert found["complete"]
    assert found["command"].startswith("python -m bench.gpu --dry")
    assert set(found) >= {"state_before", "state_after", "copy_gigabytes_per_second", "sgemm_teraflops", "host"}
    assert set(found["machine"]["versions"]) >= {"torch", "triton", "driver", "nvcc", "metakern"}
    assert found["benchmark"] == "gpu"
    for name, cases_of in gpu.DRY.loops.cases.items():
        assert [cell["title"] for cell in found["loops"][name]] == [case.title for case in cases_of]
    assert set(found["loops"]["mlp_inner_loop"][0]["contenders"]) == {"vmap", "cpp", "reference", "compiled"}
    assert sum("sinusoid" in target["name"] for target in found["targets"]) == 8
    assert [(cell["op"], cell["n"]) for cell in found["cells"]] == list(gpu.DRY.lstm_step.cells)
    for cell in found["cells"]:
        assert set(cell["contenders"]) >= {
            "eager",
            "cudnn",
            "cudnn tf32",
            "compiled",
            "cpp highest",
            "reference medium",
        }
        assert set(cell["graphs"]) == set(cell["contenders"]) - {"compiled"}
        assert cell["unavailable"] == {}
        assert cell["difference_from_eager"]["cpp highest"] < 1e-4
        times = {name: entry["median_s"] for name, entry in cell["contenders"].items()}
        times |= {f"{name} graph": entry["median_s"] for name, entry in cell["graphs"].items()}
        peers = {name: t for name, t in times.items() if name.split()[0] in ("eager", "cudnn", "compiled")}
        ours = cell["contenders"]["cpp highest"]
        assert ours["speedup_over_fastest_peer"] == pytest.approx(min(peers.values()) / ours["median_s"])
        assert ours["speedup_over_eager"] == pytest.approx(times["eager"] / ours["median_s"])
        floor = ours["bytes_per_coordinate"] * cell["n"] / found["copy_gigabytes_per_second"] / 1e9
        assert ours["multiple_of_memory_floor"] == pytest.approx(ours["median_s"] / floor)
        assert ours["bytes_per_coordinate"] == (652 if cell["op"] == "forward" else 652 + 972)


# ----------------------------------------------------------------------------------------------------- the stages


def stage(name: str, code: str, seconds: float = 30.0, group: int = 0, **options: Any) -> gpu_check.Stage:
    return gpu_check.Stage(name, group, seconds, [sys.executable, "-c", code], **options)


def test_a_failed_stage_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [
        stage("good", "print('all is well')"),
        stage("bad", "import sys; print('it broke here'); sys.exit(3)"),
        stage("slow", "import time; print('began', flush=True); time.sleep(60)", seconds=1.0),
        stage("absent", "", missing="the tool is not there"),
        stage("later", "print('still came')", group=1),
        stage("refused", "import sys; sys.exit('Error: Device not supported')", unsupported=gpu_check.UNSUPPORTED),
    ]
    start = time.monotonic()
    outcomes = gpu_check.run_all(stages, tmp_path)
    assert time.monotonic() - start < 20
    assert {o.stage.name: o.status for o in outcomes} == {
        "good": "passed",
        "bad": "failed",
        "slow": "timed out",
        "absent": "skipped",
        "later": "passed",
        "refused": "skipped",
    }
    assert [o.stage.name for o in outcomes] == [s.name for s in stages]
    assert [o.failed for o in outcomes] == [False, True, True, False, False, False]
    assert outcomes[1].note == "status 3: it broke here"
    assert outcomes[5].note == "the tool says: Device not supported"
    printed = gpu_check.report(outcomes)
    assert "it broke here" in printed
    assert "all is well" not in printed.split("\nstage ")[0]  # logs are shown only for failed stages
    assert re.search(r"^absent +skipped +0\.0 +30  the tool is not there$", printed, re.MULTILINE)


def test_a_stage_that_is_stopped_leaves_no_child_behind(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    (outcome,) = gpu_check.run_group([stage("parent", code, seconds=2.0)], tmp_path)
    assert outcome.status == "timed out"
    child = int(outcome.log.read_text().split()[-1])
    for _ in range(100):  # signals take time
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX":
            return
        time.sleep(0.05)
    pytest.fail(f"process {child} still runs")


def test_the_benchmarks_get_what_the_other_stages_left(tmp_path: Path) -> None:
    times = iter((0.0, 60.0))
    last = stage("benchmarks", "import sys; print(sys.argv[1:])", seconds=150.0, group=1)
    outcomes = gpu_check.run_all([stage("first", ""), last], tmp_path, clock=lambda: next(times))
    assert last.seconds == gpu_check.TOTAL - 60
    assert outcomes[-1].log.read_text().splitlines()[-1] == f"['--seconds', '{last.seconds - gpu_check.GRACE:.0f}']"


def test_the_budget_is_under_eight_minutes() -> None:
    groups = {group: max(s for _, g, s in gpu_check.BUDGET if g == group) for _, group, _ in gpu_check.BUDGET}
    assert sum(groups.values()) <= gpu_check.TOTAL < 8 * 60
    stages = gpu_check.make_stages(Path("logs"))
    assert [(s.name, s.group, s.seconds) for s in stages] == list(gpu_check.BUDGET)


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "build,tset"])
    assert (
        "--only takes build, tests, suite, memcheck, racecheck, paper, benchmarks, got tset" in capsys.readouterr().err
    )


def test_the_build_is_for_the_device_that_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 9.0\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert gpu_check.build_environment()["TORCH_CUDA_ARCH_LIST"] == "9.0"
    tool.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    assert "TORCH_CUDA_ARCH_LIST" not in gpu_check.build_environment()


# ------------------------------------------------------------------------------------------------ the measurement


class Broken(Variant):
    """A kernel with a wrong result."""

    def step(self, params: torch.Tensor, grads: torch.Tensor, state: Any) -> Any:
        new, state = super().step(params, grads, state)
        return new * 1.01, state


@needs_kernels
def test_a_contender_that_fails_is_left_out_and_ours_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def contenders(rule: Any, device: Any, *, compiled: bool) -> list[Any]:
        first, cudnn, *_, good = make_contenders(rule, device, compiled=False)
        monkeypatch.setattr(cudnn, "step", lambda *_: 1 / 0)
        return [first, cudnn, Broken(rule, "cpp", "highest", torch.float32), good]

    monkeypatch.setattr(lstm_step, "make_contenders", contenders)
    cell = lstm_step.Cell("forward", 40, CpuStandIn(), lstm_step.DRY, compiled=False)
    assert set(cell.problems) == {"eager", "reference medium"}
    assert cell.unavailable["cudnn"] == "ZeroDivisionError: division by zero"
    assert cell.unavailable["cpp highest"].startswith("ArithmeticError: result 0 differs from eager by 1.0e-02")
    assert cell.failed == ["cpp highest"]


def test_a_first_call_that_takes_too_long_is_given_up() -> None:
    with pytest.raises(TimeoutError, match="the first call took more than 0 s"), time_limit(0.05, "the first call"):
        time.sleep(5)
    with time_limit(5, "nothing"):
        pass
    time.sleep(0.1)  # no alarm is pending


def test_nan_is_a_difference() -> None:
    one = torch.ones(3)
    with pytest.raises(ArithmeticError):
        largest_difference([one * float("nan")], [one], 1e-4)
    assert largest_difference([one * 1.5], [one], 1.0) == 0.5


@pytest.mark.parametrize("backward", [False, True])
def test_cudnn_peer_is_the_plain_step(backward: bool) -> None:
    device = CpuStandIn()
    rule = make_rule(20, 2)
    inputs = Inputs(rule, 50, 0, device.torch_device, backward=backward)
    eager, _, tf32, *_ = make_contenders(rule, device, compiled=False)
    assert isinstance(tf32, CudnnPeer)
    before = torch.backends.cudnn.allow_tf32
    got, expected = (results(inputs.problem(c), c, backward=backward) for c in (tf32, eager))
    assert len(got) == len(expected) == (13 if backward else 3)
    assert largest_difference(got, expected, 1e-4) < 1e-5
    torch.backends.cudnn.allow_tf32 = before


def test_bytes_of_a_step() -> None:
    assert (bytes_per_coordinate(), bytes_per_coordinate(2)) == (652, 332)
    assert (backward_bytes_per_coordinate(), backward_bytes_per_coordinate(2)) == (972, 492)
    assert lstm_step.bytes_of("forward_backward", 2) == 332 + 492


def test_targets_of_a_gpu() -> None:
    ours = {"speedup_over_fastest_peer": 4.0, "multiple_of_memory_floor": 1.5, "speedup_over_eager": 9.0}
    cells = [{"op": "forward", "n": n, "contenders": {"cuda highest": ours}} for n in (10**4, 10**6)]
    found = {"subject": "cuda highest", "cells": cells, "host": {"launches": {"cuda highest": 2}}}
    verdicts = {(t["kind"], t["name"]): (t["measured"], t["met"]) for t in judge_gpu(found)}
    assert verdicts["must", "forward against the fastest peer, N = 1,000,000"] == (4.0, True)
    assert verdicts["aim", "forward against the fastest peer, N = 1,000,000"] == (4.0, False)
    assert verdicts["must", "forward + backward against the fastest peer, N = 1,000,000"] == (None, False)
    assert verdicts["must", "forward against the floor of the memory, N = 1,000,000"] == (1.5, True)
    assert verdicts["aim", "forward against the floor of the memory, N = 1,000,000"] == (1.5, False)
    assert verdicts["must", "forward against eager, N = 10,000"] == (9.0, True)
    assert verdicts["must", "launches of forward, N = 10,000"] == (2, False)


def test_inputs_rotate_beyond_the_cache() -> None:
    device = CpuStandIn()
    device.cache_bytes = 60 * 2**20
    assert [lstm_step.count_sets(n, device) for n in (10**4, 10**5, 10**6)] == [4, 4, 2]


def test_a_case_that_fails_is_told_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = Case(hidden=65), Case(n=1, hidden=2)
    monkeypatch.setattr(cases, "cases", {"reference": [bad, good]}.get)
    assert cases.main(["--dry"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED: reference: Case(n=70, hidden=65" in printed
    assert printed.endswith("1 of 2 cases ran\n")
