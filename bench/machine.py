"""Machine facts for results: processor, caches, versions, and the speed of a large matrix product."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import metakern
from metakern.core.machine import cpu_model


def slug(text: str) -> str:
    """Convert text to a file name: letters and digits in lower case, joined by dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def capability() -> str:
    """Instruction set of the kernels in use; METAKERN_CPU_CAPABILITY may override it."""
    return str(metakern.build_info().get("cpu_capability", "none"))


def device_name() -> str:
    """File name of this machine's results: processor, threads and instruction set."""
    return slug(f"{cpu_model()} {torch.get_num_threads()} threads {capability()}")


def last_level_cache_bytes() -> int:
    """Size of the first core's largest cache; 32 MiB if unknown."""
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    matches = [re.fullmatch(r"(\d+)([KM]?)\s*", path.read_text()) for path in files]
    sizes = [int(match[1]) * {"": 1, "K": 2**10, "M": 2**20}[match[2]] for match in matches if match]
    return max(sizes, default=32 * 2**20)


def describe() -> dict[str, Any]:
    """Machine, versions and date of a run."""
    build = metakern.build_info()
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "cpu_capability": capability(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {
            "metakern": metakern.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "compiler": build.get("compiler", "none"),
        },
        "platform": platform.platform(),
        "date": _now(),
    }


#: nvidia-smi queries before and after a measurement; clocks are in MHz.
_GPU_STATE = (
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "pstate",
    "temperature.gpu",
    "power.draw",
    "utilization.gpu",
)


def ask_gpu(*fields: str) -> dict[str, str]:
    """Query nvidia-smi about the first GPU; empty if it is missing or fails. Changes no setting."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    values = run.stdout.strip().split(", ")
    return dict(zip(fields, values, strict=True)) if run.returncode == 0 and len(values) == len(fields) else {}


def gpu_state() -> dict[str, str]:
    """Current clocks, temperature, power and load of the GPU."""
    return ask_gpu(*_GPU_STATE)


def describe_gpu(name: str) -> dict[str, Any]:
    """GPU, versions and date of a run on it."""
    build = metakern.build_info()
    return {
        "gpu": name,
        "host": {"model": cpu_model(), "cores": os.cpu_count()},
        "versions": {
            "metakern": metakern.__version__,
            "torch": torch.__version__,
            "triton": build.get("triton") or "none",
            "python": platform.python_version(),
            "driver": ask_gpu("driver_version").get("driver_version", "unknown"),
            "cuda": torch.version.cuda or "none",
            "cudnn": torch.backends.cudnn.version() or "none",
            "nvcc": build.get("nvcc") or "none",
        },
        "cuda_architectures": build.get("cuda_architectures", []),
        "platform": platform.platform(),
        "date": _now(),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def sgemm_gflops(size: int = 2048, rounds: int = 5) -> float:
    """FMA rate of this machine: best GFLOP/s of several float32 products of two random [size, size] matrices."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = a @ b
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9
