"""Compile the kernels for GPUs that need not be present; prints one JSON object per kernel, with facts of the cubin.

Run as ``python -m tests.triton.compile_ahead ARCH ...`` with 80, 90 or 100: a process of its own, because the tests'
process may interpret the kernels.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from metakern.ops.core.triton_launch import Config
from metakern.ops.inner_update import triton_kernels as inner_update_kernels
from metakern.ops.inner_update.triton import MAX_BLOCK, NUM_WARPS
from metakern.ops.lstm_step import triton_kernels as kernels
from metakern.ops.lstm_step.triton import CONFIGS, FEATURES_CONFIG, FLOAT64_CONFIG, SUM_CHUNKS, SUM_WEIGHTS

#: The modules whose kernels are compiled here, each with the constants of its launches.
MODULES = (kernels.__name__, inner_update_kernels.__name__)

IN_PARAMS_DTYPE = ("old_params", "grads", "new_params", "grad_new_params", "grad_grads", "rates", "updated")
IN_STATE_DTYPE = ("state", "new_state", "grad_state", "grad_new_state")
IN_FLOAT64 = ("sums", "coefficients")
INTEGERS = ("n", "blocks", "blocks_per_chunk", "row_length", "chunks", "row", "task_size", "rate_period")
NUMBERS = ("p", "rate", "rate_low", "first_program")


def compile_kernel(
    kernel: Any, arch: int, config: Config, params: str, state: str, constants: dict[str, Any]
) -> dict[str, Any]:
    """:func:`cubin_facts` of one kernel; pointers are aligned as those of tensors are."""
    work = "fp64" if state == "fp64" else "fp32"
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in IN_PARAMS_DTYPE:
            signature[name] = f"*{params}"
        elif name in IN_STATE_DTYPE:
            signature[name] = f"*{state}"
        elif name in INTEGERS:
            signature[name] = "i32"
        elif name in IN_FLOAT64:
            signature[name] = "*fp64"
        elif name == "active":
            signature[name] = "*u8"
        elif name in NUMBERS or name.startswith(("p_", "exp_", "output_", "clip_")):
            signature[name] = "i32"
        else:
            signature[name] = f"*{work}"
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": config.num_warps, "num_stages": 1, "enable_fp_fusion": True}
    return cubin_facts(triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm)


def cubin_facts(compiled: Any) -> dict[str, int]:
    """Registers, stack bytes a thread, cubin size and roundings to TF32 of one compiled kernel."""
    cubin, roundings = compiled["cubin"], len(re.findall(r"and\.b32 .*, -8192;", compiled["ptx"]))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", report.stdout + report.stderr)[0]
    return {"registers": int(registers), "stack": int(stack), "bytes": len(cubin), "roundings": roundings}


def cases(arch: int) -> list[tuple[str, Any, Config, str, str, dict[str, Any]]]:
    """Name, kernel, cut, dtypes and constants of what is compiled for a GPU."""
    rows = []

    def add(
        name: str, key: str, hidden: int, layers: int, params: str = "fp32", state: str = "fp32", **more: Any
    ) -> None:
        padded = max(16, 1 << (hidden - 1).bit_length())
        config = FLOAT64_CONFIG if state == "fp64" else CONFIGS[key, padded, arch >= 90]
        layer = more.get("LAYER", 0)
        constants = {
            **{"PREPROCESS": 1, "H": hidden, "L": layers, "HP": padded, "BLOCK": config.block, "F": 2},
            **{"PRECISION": 0, "IN_PLACE": False, "DEPTH": layers, "K": hidden if layer else 2},
            **{"X_TILE": (2 * layers * hidden if layer else 2) * 32, "LAYER": layer},
            **more,
        }
        rows.append((name, getattr(kernels, f"{key}_kernel"), config, params, state, constants))

    for hidden in (20, 32):
        add(f"forward ({hidden}, 2)", "forward", hidden, 2)
    for layer in (0, 1):
        add(f"backward (20, 2) layer {layer}", "backward", 20, 2, LAYER=layer)
        add(f"weights (20, 2) layer {layer}", "weights", 20, 2, LAYER=layer)
    if arch != 90:
        return rows + inner_update_cases()
    add("forward (20, 2) in place", "forward", 20, 2, IN_PLACE=True)
    for precision in (1, 2):
        add(f"forward (20, 2) precision {precision}", "forward", 20, 2, PRECISION=precision)
    add("forward (20, 2) bfloat16", "forward", 20, 2, "bf16", "bf16")
    add("forward (20, 2) float16 params", "forward", 20, 2, "fp16")
    add("forward (20, 2) float64", "forward", 20, 2, "fp64", "fp64")
    add("forward (7, 1)", "forward", 7, 1)
    add("weights (20, 2) float64", "weights", 20, 2, "fp64", "fp64", LAYER=1)
    flat = {"PREPROCESS": 1, "F": 2, "H": 20, "L": 2, "BLOCK": FEATURES_CONFIG.block}
    flat |= {"WEIGHTS": SUM_WEIGHTS, "CHUNKS": SUM_CHUNKS}
    for key, config in (("features", FEATURES_CONFIG), ("features_backward", FEATURES_CONFIG), ("sum", Config(0, 4))):
        rows.append((key, getattr(kernels, f"{key}_kernel"), config, "fp32", "fp32", flat))
    return rows + inner_update_cases()


def inner_update_cases() -> list[tuple[str, Any, Config, str, str, dict[str, Any]]]:
    """The same of inner_update: every layout of α, every dtype, with and without what tells tasks apart."""
    config = Config(MAX_BLOCK, NUM_WARPS)
    block = {"BLOCK": MAX_BLOCK}
    rows = []
    for rate, dtype, by_task in ((0, "fp32", False), (1, "bf16", True), (2, "fp32", True), (2, "fp64", True)):
        constants = {"RATE": rate, "CLIP": by_task, "ACTIVE": by_task, **block}
        name = f"update, rate {rate}, {dtype}"
        rows.append((name, inner_update_kernels.update_kernel, config, dtype, "fp32", constants))
    rows += [
        (f"squares {dtype}", inner_update_kernels.squares_kernel, config, dtype, "fp32", block)
        for dtype in ("fp32", "fp16", "fp64")
    ]
    rows.append(("coefficients", inner_update_kernels.coefficients_kernel, config, "fp32", "fp32", block))
    return rows


def main() -> None:
    for arch in map(int, sys.argv[1:]):
        for name, kernel, config, params, state, constants in cases(arch):
            facts = compile_kernel(kernel, arch, config, params, state, constants)
            print(json.dumps({"name": name, "arch": arch, **facts}), flush=True)


if __name__ == "__main__":
    main()
