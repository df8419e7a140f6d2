"""Kernels launched on and compiled for absent GPUs: compilation gives a cubin that keeps its values in registers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch

from tests.conformance.ops.rows import ROWS

#: Most bytes of stack a thread, where values do not fit registers; 0 for every kernel that is not named. Those are
#: backward's of a lower layer; the numbers are what Triton 3.9 leaves and some room.
STACK = {
    ("backward (20, 2) layer 0", 80): 256,
    ("backward (20, 2) layer 1", 80): 64,
    ("backward (20, 2) layer 0", 90): 320,
}


def run_ahead(module: str, arch: int) -> list[dict[str, Any]]:
    """Output of a module of tests.triton for an architecture, in a process without interpreted kernels."""
    command = [sys.executable, "-m", f"tests.triton.{module}", str(arch)]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    for row in rows:
        print(row)  # pytest -s shows the table
    return rows


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_compiles_without_a_gpu(arch: int) -> None:
    rows = run_ahead("compile_ahead", arch)
    assert len(rows) >= 6
    spilled = {row["name"]: row["stack"] for row in rows if row["stack"] > STACK.get((row["name"], arch), 0)}
    assert not spilled, f"bytes of stack a thread on sm_{arch}: {spilled}"
    # float32 products are sums of TF32 products of operands that were split: the compiler must not fuse that away.
    products = {row["name"] for row in rows if row["name"].startswith(("forward", "backward", "weights"))}
    others = {name for name in products if "float64" in name or name.endswith("precision 2")}
    assert {row["name"] for row in rows if row["roundings"]} == products - others


#: Kernels that the operators of tests/ops/*/triton_launches.py launch, by architecture; others follow from the suite.
LAUNCHED = {
    80: {"hrnn_step": 5, "mlp_update_step": 12, "task_conv2d": 3, "task_norm_act_pool": 3},
    90: {
        **{"lstm_step": 6, "hrnn_step": 5, "inner_update": 3, "mlp_inner_loop": 8, "mlp_update_step": 11},
        **{"task_conv2d": 6, "task_norm_act_pool": 9},
    },
    100: {"hrnn_step": 5, "mlp_inner_loop": 2, "mlp_update_step": 6, "task_conv2d": 3, "task_norm_act_pool": 3},
}


@pytest.mark.parametrize("arch", LAUNCHED)
def test_every_operator_launches_without_a_gpu(arch: int) -> None:
    # Triton takes a kernel's arguments by code that it writes around their names: "params" is none that they may have.
    rows = run_ahead("launch_ahead", arch)
    names = {row["name"] for row in rows}
    found = Counter(re.match(r"\w+", name)[0] for name in names)
    assert {op: found[op] for op in LAUNCHED[arch]} == LAUNCHED[arch], names
    with_triton = {op.folder or op.name for op in ROWS if op.serves("interpreted", torch.float32)}
    assert arch != 90 or found.keys() == with_triton
    compiled = [row for row in rows if "stack" in row]
    assert compiled
    spilled = {row["name"]: row["stack"] for row in compiled if row["stack"] > row["limit"]}
    assert not spilled, f"bytes of stack a thread on sm_{arch}: {spilled}"
