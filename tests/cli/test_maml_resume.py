"""train maml interrupted, resumed, restarted by torchrun, or about to overwrite a run."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.cli.commands import ENVIRONMENT, SINUSOID, SMALL, invoke, metrics, succeed


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_with_a_line_and_it_resumes_to_the_same_numbers(signum, code, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "metakern", *f"{SINUSOID} --iterations 100000 --output {folder}".split()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").is_file() or len(metrics(folder)) < 6:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no iteration within two minutes"
        time.sleep(0.01)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"{signal.Signals(signum).name}: stopped after iteration" in errors
    assert f"to go on: metakern train maml --resume --output {folder}" in errors
    assert "Traceback" not in errors
    assert (folder / "figures" / "learning.png").is_file()

    done = metrics(folder)[-1]["iteration"]
    succeed(f"train maml --resume --iterations {done + 5} --output {folder}")
    succeed(f"{SINUSOID} --iterations {done + 5} --output {tmp_path}/whole")
    resumed, whole = metrics(folder), metrics(tmp_path / "whole")
    assert [line["iteration"] for line in resumed if "loss" in line] == list(range(1, done + 6))
    assert [line for line in resumed if "loss" in line] == [line for line in whole if "loss" in line]
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "whole"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_there_must_be_a_run_to_resume(tmp_path):
    result = invoke(f"train maml --resume --output {tmp_path}/nowhere")
    assert result.exit_code == 1
    assert "nowhere holds no run to resume: it has no config.yaml" in result.stderr


def test_a_finished_run_resumes_to_its_end(tmp_path):
    succeed(f"{SINUSOID} --iterations 2 --output {tmp_path}/run")
    before = metrics(tmp_path / "run")
    succeed(f"train maml --resume --output {tmp_path}/run")
    assert metrics(tmp_path / "run") == before


@pytest.mark.parametrize("job", ["digits-7", "none"])
def test_a_process_that_torchrun_starts_anew_goes_on(job, tmp_path, monkeypatch):
    """After a process died or a machine was replaced: the command is the same, and the run belongs to this launch."""
    command = f"{SINUSOID} --iterations 4 --output {tmp_path}/run"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    succeed(command)  # it died before it wrote anything
    whole = metrics(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "00000004.pt").unlink()  # it died after iteration 3
    assert "goes on after iteration 3" in succeed(command)
    assert metrics(tmp_path / "run") == whole


def test_torchrun_does_not_go_on_with_a_run_that_it_did_not_begin(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    for job in (None, "first"):
        if job is not None:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        succeed(f"{SINUSOID} --iterations 2 --output {folder} --overwrite --quiet")
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
        result = invoke(f"{SINUSOID} --iterations 4 --output {folder}")
        assert result.exit_code == 1
        assert "holds a run already" in result.stderr
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


KILLED_ONCE = """
import os, signal, sys
from pathlib import Path
from metakern.cli import app
from metakern.runs import RunRecord

def on_iteration(self, trainer, record, usual=RunRecord.on_iteration):
    usual(self, trainer, record)
    if record.iteration == 4 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

RunRecord.on_iteration = on_iteration
app(sys.argv[1:])
"""


def test_torchrun_starts_a_killed_run_anew_and_it_comes_to_the_same_end(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED_ONCE)
    run = f"{SINUSOID} --iterations 6 --output"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "killed.py"]
    result = subprocess.run(
        [*command, *run.split(), "two"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "goes on after iteration 3" in result.stdout
    assert len([line for line in metrics(tmp_path / "two") if "loss" in line]) == 6
    again = subprocess.run(
        [*command, *run.split(), "two", "--outer-lr", "9"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        check=False, env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert again.returncode != 0
    assert "holds a run already" in again.stderr
    assert yaml.safe_load((tmp_path / "two" / "config.yaml").read_text())["outer_lr"] == 0.001


@pytest.mark.parametrize("wrong", ["--mixed-precision fp8", "--ema 1", "--batch-parts 40"])
def test_a_run_is_not_replaced_by_one_that_cannot_begin(wrong, tmp_path):
    folder = tmp_path / "run"
    succeed(f"{SINUSOID} --iterations 2 --output {folder} --quiet")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert invoke(f"{SINUSOID} --output {folder} --overwrite {wrong}").exit_code == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ("--hidden 99", "hidden from 8 to 99"),
        ("--outer-lr 0.1", "outer_lr from 0.001 to 0.1"),
        ("--seed 5 --ema 0.5", "ema from 0.0 to 0.5; seed from 0 to 5"),
    ],
)
def test_a_run_goes_on_with_its_own_settings_alone(options, change, tmp_path):
    folder = tmp_path / "run"
    succeed(f"{SINUSOID} --iterations 2 --output {folder} --quiet")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = invoke(f"train maml --resume --iterations 4 {options} --output {folder}")
    assert result.exit_code == 1
    assert f"goes on as it began, not with {change}: --output starts another" in result.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    succeed(f"train maml --resume --iterations 4 --output {folder} --quiet")
    assert metrics(folder)[-1]["iteration"] == 4


def test_a_checkpoint_that_is_not_taken_leaves_the_configuration(tmp_path):
    folder = tmp_path / "run"
    succeed(f"{SINUSOID} --iterations 2 --output {folder} --quiet")
    for path in (folder / "checkpoints").glob("*.pt"):
        path.write_bytes(b"damaged")
    before = [(folder / name).read_bytes() for name in ("config.yaml", "environment.json")]
    assert invoke(f"train maml --resume --iterations 4 --output {folder}").exit_code == 1
    assert [(folder / name).read_bytes() for name in ("config.yaml", "environment.json")] == before


def test_too_many_steps_that_are_not_finite_end_a_run_that_can_go_on(tmp_path):
    options = "--iterations 9 --outer-lr 1e30 --optimizer sgd --max-skipped 2 --checkpoint-every 1"
    result = invoke(f"train maml {SMALL} {options} --output {tmp_path}/run")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "2 outer steps in a row" in line
    done = max(int(path.stem) for path in (tmp_path / "run" / "checkpoints").glob("*.pt"))
    assert f"goes on after iteration {done}" in invoke(f"train maml --resume --output {tmp_path}/run").stdout


def test_a_full_disk_ends_a_run_with_its_reason_and_destroys_nothing(tmp_path):
    """A file-size limit simulates the disk; figures fail too, without hiding the checkpoint's error."""
    folder = tmp_path / "run"
    succeed(f"{SINUSOID} --iterations 2 --output {folder} --quiet")
    kept = [*(folder / "checkpoints").iterdir(), *(folder / "figures").iterdir(), folder / "model.safetensors"]
    before = {path: path.read_bytes() for path in kept}
    go_on = f"{sys.executable} -m metakern train maml --resume --iterations 6 --output {folder}"
    result = subprocess.run(
        ["bash", "-c", f"ulimit -f 4; exec {go_on}"], capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | ENVIRONMENT,
    )  # fmt: skip
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert re.match(r"error: .*checkpoint 00000003\.pt .* was not written, the disk.* is full", line)
    assert "LearningCurves.on_end failed" in result.stderr
    assert {path: path.read_bytes() for path in kept} == before
    succeed(f"train maml --resume --iterations 6 --output {folder} --quiet")
