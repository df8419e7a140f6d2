"""GPU benchmark of all operators against their peers, in one process; results go to bench/results/<device>.json.

python -m bench.gpu [--seconds 200]     minutes; `make gpu-check` calls it last, on an idle device
python -m bench.gpu --dry --output F    the same logic on the CPU, with tiny sizes: its figures mean nothing

The cells of all operators come first, with a share of the time (bench.gpu_budget); their peers are listed in the gpu
modules of the operators' folders. lstm_step follows in more detail. Only the standard library, torch and metakern are
needed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import gpu_budget, machine
from bench.gpu_budget import CellPlan
from bench.gpu_device import CpuStandIn, CudaDevice, Device
from bench.lstm_step import gpu as lstm_step
from bench.lstm_step.targets import judge_gpu
from bench.lstm_step.work import HIDDEN, LAYERS
from bench.mlp_inner_loop.targets import judge_gpu_inner_loop

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Plan:
    """Cases and budget of a run."""

    lstm_step: lstm_step.Plan
    loops: CellPlan  # of all operators
    seconds: float  # budget of the run


FULL = Plan(lstm_step.FULL, gpu_budget.FULL, 300.0)
DRY = Plan(lstm_step.DRY, gpu_budget.DRY, 120.0)


def measure(device: Device, plan: Plan, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure what fits the budget; ``write`` gets the results after every cell, so that none is lost."""
    start = time.monotonic()
    torch.backends.cudnn.allow_tf32 = False  # true float32; one peer enables TF32 for its own calls
    found: dict[str, Any] = {
        "benchmark": "gpu",
        "machine": machine.describe_gpu(device.name),
        "complete": False,
        "state_before": machine.gpu_state(),
        "hidden_size": HIDDEN,
        "num_layers": LAYERS,
        "subject": f"{device.backends[0]} highest",
        "backends": list(device.backends),
        "cache_bytes": device.cache_bytes,
        "memory_floor": "bytes that a step must move over the rate of a large device-to-device copy, of this run",
        "fastest_peer": "of eager, nn.LSTM in float32 and in TF32, and the compiled step; calls and captured graphs",
    }
    ceilings = lstm_step.Ceilings(device.copy_rate(), device.flop_rate())
    device.release()
    found |= {
        "copy_gigabytes_per_second": ceilings.bytes_per_second / 1e9,
        "sgemm_teraflops": ceilings.flops_per_second / 1e12,
        "host": lstm_step.measure_host(device, plan.lstm_step),
        "skipped": {},
        "cells": [],
    }

    def write_loops(loops: dict[str, Any]) -> None:
        write(found | {"loops": loops})

    found["loops"] = gpu_budget.measure(device, plan.loops, plan.loops.share * plan.seconds, write_loops)
    left = plan.seconds - (time.monotonic() - start)
    lstm_step.measure(device, plan.lstm_step, ceilings, found, left, write)
    found |= {
        "state_after": machine.gpu_state(),
        "targets": judge_gpu(found) + judge_gpu_inner_loop(found),
        "complete": True,
    }
    write(found)
    return found


def verdicts(found: dict[str, Any]) -> str:
    """Lines for ceilings, host times and targets."""
    host = found["host"]["microseconds"]
    lines = [
        f"copy {found['copy_gigabytes_per_second']:.0f} GB/s, float32 product {found['sgemm_teraflops']:.1f} TFLOP/s",
        f"host, N = {found['host']['n']:,}: " + ", ".join(f"{name} {us:.0f} us" for name, us in host.items()),
    ]
    for target in found["targets"]:
        measured = "not measured" if target["measured"] is None else f"{target['measured']:.2f}"
        verdict = "met" if target["met"] else "MISSED"
        required = f"{target['relation']} {target['required']:g} {target['unit']}".rstrip()
        lines.append(f"{verdict:7} {target['kind']:4} {target['name']}: {required}, measured {measured}")
    lines += [f"not measured: {name}: {reason}" for name, reason in found["skipped"].items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print a table; returns 1 if one of our own contenders fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--seconds", type=float, default=None, help=f"budget, by default {FULL.seconds:.0f}")
    parser.add_argument("--output", type=Path, default=None, help="JSON to write; default bench/results/<device>.json")
    options = parser.parse_args(arguments)
    device: Device = CpuStandIn() if options.dry else CudaDevice()
    plan = DRY if options.dry else FULL
    if options.seconds is not None:
        plan = replace(plan, seconds=options.seconds)
    output = options.output or RESULTS / f"{machine.slug(device.name)}.json"
    command = shlex.join(["python", "-m", "bench.gpu", *(sys.argv[1:] if arguments is None else arguments)])

    def write(found: dict[str, Any]) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"command": command, **found}, indent=2, ensure_ascii=False) + "\n")

    torch.manual_seed(0)
    if options.dry:
        torch.set_num_threads(1)  # other stages run at the same time
    found = measure(device, plan, write)
    failed = [f"{cell['op']}, N = {cell['n']:,}: {name}" for cell in found["cells"] for name in cell["failed"]]
    failed += gpu_budget.failures(found["loops"])
    print(f"\n{gpu_budget.table(found['loops'])}\n\n{lstm_step.table(found)}\n\n{verdicts(found)}\n{output}")
    for name in failed:
        print(f"FAILED: {name}")
    return 1 if failed or not found["cells"] else 0


if __name__ == "__main__":
    sys.exit(main())
