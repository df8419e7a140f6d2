"""GPU check in one command: build, tests, compute-sanitizer, benchmarks. Exits with status 1 if a stage fails.

make gpu-check                       offline, by the machine's own python3, under 8 minutes on 16 cores and one H200
make gpu-check ARGS="--only build,tests"
make gpu-check ARGS=--dry            no GPU, no build: tests each stage's logic on the CPU, and shows its command

Nothing is installed. Requires torch with CUDA, Triton, nvcc, setuptools, pybind11 and metakern's dependencies; for the
tests also pytest (with pytest-xdist they run in parallel; torch's opcheck needs expecttest). Missing pure-Python
packages can be added from a folder of wheels, made on any machine:

    pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels expecttest==0.3.0
    python3 -m pip install --no-index --no-deps --target /tmp/site wheels/*.whl
    make gpu-check SITE=/tmp/site

SITE goes to the front of PYTHONPATH. Stages of one group run in parallel; the benchmarks have the device for
themselves. Each stage's output goes to build/gpu-check/<stage>.log; its end is shown if the stage fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOGS = ROOT / "build" / "gpu-check"

#: Time budget: stage, group, limit in seconds. Groups run one after another.
BUDGET = (
    ("build", 0, 150),
    ("tests", 1, 170),  # those marked gpu
    ("suite", 1, 170),  # all other tests
    ("memcheck", 1, 170),
    ("racecheck", 1, 170),
    ("paper", 2, 25),
    ("benchmarks", 3, 128),  # at least; plus time left over by earlier stages
)

#: Total seconds: all groups, and a few for starting and stopping.
TOTAL = 475

#: Factor of the limits in a dry run, whose stages share the processors with one another and with other tests.
DRY_LIMITS = 6

#: Seconds before their limit at which the benchmarks begin no new cells.
GRACE = 20

#: API errors are not reported, as libraries probe the driver for missing functions; the operators check their own
#: launches. No launch timeout, as the stage's limit bounds the time until Python's first CUDA call.
SANITIZER = ("--error-exitcode=9", "--report-api-errors=no", "--launch-timeout=0")

#: Message of compute-sanitizer on an unsupported machine.
UNSUPPORTED = re.compile(r"Device not supported|not supported on this|Unable to find injection library", re.IGNORECASE)

#: Log lines shown of a failed stage, and of successful benchmarks.
SHOWN_FAILED, SHOWN_BENCHMARKS = 25, 60


@dataclass
class Stage:
    """One command with its time limit, and its replacement in a dry run."""

    name: str
    group: int
    seconds: float
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""  # why it cannot run; then it is skipped
    dry: list[str] | None = None  # None: the command is only shown
    unsupported: re.Pattern[str] | None = None  # a failed stage whose log matches is skipped


@dataclass
class Outcome:
    """Result of a stage."""

    stage: Stage
    status: str  # passed, failed, timed out, skipped
    seconds: float
    note: str
    log: Path

    @property
    def failed(self) -> bool:
        """Whether it fails the check."""
        return self.status in ("failed", "timed out")


# ------------------------------------------------------------------------------------------------------- stages


def has(module: str) -> bool:
    """Whether a Python package is installed."""
    return importlib.util.find_spec(module) is not None


def compute_capability() -> str:
    """Compute capability of the first GPU, like "9.0"; empty if nvidia-smi does not report it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, "--id=0", "--query-gpu=compute_cap", "--format=csv,noheader"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    match = re.search(r"^\d+\.\d+$", run.stdout, re.MULTILINE)
    return match[0] if match else ""


def cuda_homes() -> list[Path]:
    """Candidate folders of a CUDA toolkit: CUDA_HOME, that of nvcc on PATH, the usual one."""
    homes = [Path(home) for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    if nvcc := shutil.which("nvcc"):
        homes.append(Path(nvcc).resolve().parent.parent)
    return [*homes, Path("/usr/local/cuda")]


def find_sanitizer() -> str:
    """compute-sanitizer, on PATH or in a toolkit; empty where it is missing."""
    places = [f"{home}/{part}" for home in cuda_homes() for part in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places)) or ""


def build_environment() -> dict[str, str]:
    """Environment that requires CUDA kernels, for this device's architecture alone."""
    environment = {"METAKERN_CUDA": "1"}
    if capability := compute_capability():
        environment["TORCH_CUDA_ARCH_LIST"] = capability
    if shutil.which("nvcc") is None and not os.environ.get("CUDA_HOME"):
        home = next((home for home in cuda_homes() if (home / "bin" / "nvcc").exists()), None)
        environment |= {"CUDA_HOME": str(home)} if home else {}
    return environment


def sanitizer_stage(tool: str, group: int, seconds: float, dry: list[str] | None) -> Stage:
    """One tool of compute-sanitizer over a small case of every kernel."""
    program = find_sanitizer()
    return Stage(
        tool,
        group,
        seconds,
        [program or "compute-sanitizer", "--tool", tool, *SANITIZER, *python("-m", "tests.gpu.cases")],
        # Without torch's cache every tensor is a separate allocation, so out-of-bounds accesses are found.
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        missing="" if program else "compute-sanitizer is not there",
        dry=dry,
        unsupported=UNSUPPORTED,
    )


def python(*arguments: str) -> list[str]:
    """Command line of this Python interpreter."""
    return [sys.executable, *arguments]


def make_stages(logs: Path) -> list[Stage]:
    """All stages, by :data:`BUDGET`."""
    limits = {name: (group, float(seconds)) for name, group, seconds in BUDGET}
    pytest = python("-m", "pytest", "-q", "--tb=short", "-rfEs", "-p", "no:cacheprovider", "--durations=5")
    # Of 16 cores: the tests on the GPU wait for it and for Triton's compiler, the sanitizers take one core each.
    side_by_side = ["-n", "8", "--dist", "worksteal"] if has("xdist") else []
    no_pytest = "" if has("pytest") else "pytest is not there"
    on_a_gpu = ["tests/gpu", "tests/ops", "tests/conformance/ops"]
    results = ["--output", str(logs / "dry.json")]
    return [
        Stage("build", *limits["build"], python("setup.py", "build_ext", "--inplace"), build_environment()),
        Stage(
            "tests",
            *limits["tests"],
            [*pytest, *side_by_side, "-m", "gpu", *on_a_gpu],
            missing=no_pytest,
            dry=[*pytest, "--collect-only", "-m", "gpu", *on_a_gpu],
        ),
        Stage(
            "suite",
            *limits["suite"],
            [*pytest, *side_by_side, "-m", "not gpu", "tests"],
            {"OMP_NUM_THREADS": "1"},
            missing=no_pytest,
        ),
        sanitizer_stage("memcheck", *limits["memcheck"], python("-m", "tests.gpu.cases", "--dry")),
        sanitizer_stage("racecheck", *limits["racecheck"], None),
        Stage(
            "paper",
            *limits["paper"],
            python("-m", "bench.paper.timing", "--device", "cuda", "--output", str(logs / "paper.json")),
            missing="" if all(map(has, ("typer", "rich", "sklearn"))) else "typer, rich or scikit-learn is not there",
            dry=python("-m", "bench.paper.timing", "--quick", "--threads", "1"),
        ),
        Stage(
            "benchmarks",
            *limits["benchmarks"],
            python("-m", "bench.gpu"),
            dry=python("-m", "bench.gpu", "--dry", *results),
        ),
    ]


# ------------------------------------------------------------------------------------------------------ running


class Run:
    """A running stage: its process, in a separate process group, and its log."""

    def __init__(self, stage: Stage, logs: Path) -> None:
        self.stage, self.log, self.start = stage, logs / f"{stage.name}.log", time.monotonic()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("METAKERN_")}
        environment |= {"PYTHONUNBUFFERED": "1", **stage.environment}
        with self.log.open("w") as log:
            log.write(f"$ {shown(stage)}\n")
            log.flush()
            self.process = subprocess.Popen(
                stage.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def stop(self) -> None:
        """End the process and its children: SIGTERM first, then SIGKILL."""
        for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(patience)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def poll(self) -> Outcome | None:
        """The outcome, once there is one."""
        seconds = time.monotonic() - self.start
        code = self.process.poll()
        if code is None and seconds < self.stage.seconds:
            return None
        if code is None:
            self.stop()
            return Outcome(self.stage, "timed out", seconds, f"stopped after {self.stage.seconds:.0f} s", self.log)
        text = self.log.read_text(errors="replace")
        if code and self.stage.unsupported and (match := self.stage.unsupported.search(text)):
            return Outcome(self.stage, "skipped", seconds, f"the tool says: {match[0]}", self.log)
        last = text.rstrip().splitlines()[-1].strip(" =")
        return Outcome(self.stage, "failed" if code else "passed", seconds, f"status {code}: {last}", self.log)


def shown(stage: Stage) -> str:
    """The command as typed in a shell."""
    return " ".join([*(f"{name}={value}" for name, value in stage.environment.items()), *stage.command])


def run_group(stages: Sequence[Stage], logs: Path) -> list[Outcome]:
    """Run stages in parallel until each has ended or timed out."""
    done, running = [], []
    for stage in stages:
        if stage.missing:
            done.append(Outcome(stage, "skipped", 0, stage.missing, logs / f"{stage.name}.log"))
        else:
            print(f"{stage.name}: {shown(stage)}", flush=True)
            running.append(Run(stage, logs))
    try:
        while running:
            time.sleep(0.05)
            for run in list(running):
                if outcome := run.poll():
                    running.remove(run)
                    done.append(outcome)
                    print(f"{outcome.stage.name}: {outcome.status} in {outcome.seconds:.0f} s", flush=True)
    finally:
        for run in running:
            run.stop()
    return done


def dry_run(stages: Iterable[Stage]) -> list[Stage]:
    """Run the stages' dry replacements and show their real commands."""
    replaced = []
    for stage in stages:
        print(f"{stage.name} would run{f' ({stage.missing})' if stage.missing else ''}: {shown(stage)}")
        if stage.dry is None:
            replaced.append(Stage(stage.name, stage.group, stage.seconds, [], missing="dry run: shown above"))
        else:
            replaced.append(Stage(stage.name, 0, DRY_LIMITS * stage.seconds, stage.dry))
    return replaced


def run_all(stages: Sequence[Stage], logs: Path, clock: Callable[[], float] = time.monotonic) -> list[Outcome]:
    """Run the groups in order; the last gets the rest of :data:`TOTAL`."""
    start, outcomes = clock(), []
    groups = sorted({stage.group for stage in stages})
    for group in groups:
        members = [stage for stage in stages if stage.group == group]
        for stage in members:
            if stage.name == "benchmarks" and group == groups[-1] and "--dry" not in stage.command:
                stage.seconds = max(stage.seconds, TOTAL - (clock() - start))
                stage.command = [*stage.command, "--seconds", f"{stage.seconds - GRACE:.0f}"]
        outcomes += run_group(members, logs)
    order = [stage.name for stage in stages]
    return sorted(outcomes, key=lambda outcome: order.index(outcome.stage.name))


# ---------------------------------------------------------------------------------------------------- reporting


def tail(log: Path, lines: int) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(errors="replace").rstrip().splitlines()[-lines:]) if log.exists() else ""


def report(outcomes: Sequence[Outcome]) -> str:
    """Print the ends of relevant logs, then one line per stage."""
    parts = []
    for outcome in outcomes:
        lines = SHOWN_FAILED if outcome.failed else 0
        if outcome.stage.name == "benchmarks" and outcome.status != "skipped":
            lines = SHOWN_BENCHMARKS
        if lines:
            parts.append(f"---- the end of {outcome.log}\n{tail(outcome.log, lines)}\n")
    parts.append(f"{'stage':11} {'status':10} {'seconds':>8} {'limit':>6}  note")
    rows = [f"{o.stage.name:11} {o.status:10} {o.seconds:8.1f} {o.stage.seconds:6.0f}  {o.note[:90]}" for o in outcomes]
    return "\n".join([*parts, *rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="no GPU, no build: exercise the logic")
    parser.add_argument("--only", default="", help="names of stages, with commas between")
    parser.add_argument("--logs", type=Path, default=LOGS, help="folder of the logs, by default build/gpu-check")
    options = parser.parse_args(arguments)
    names = [name for name, *_ in BUDGET]
    wanted = options.only.split(",") if options.only else names
    if unknown := set(wanted) - set(names):
        parser.error(f"--only takes {', '.join(names)}, got {', '.join(sorted(unknown))}")
    logs: Path = options.logs.resolve()
    logs.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    stages = [stage for stage in make_stages(logs) if stage.name in wanted]
    outcomes = run_all(dry_run(stages) if options.dry else stages, logs)
    print(f"\n{report(outcomes)}\n{time.monotonic() - start:.0f} s in all")
    return 1 if any(outcome.failed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
