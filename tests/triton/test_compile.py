"""The kernels compiled for GPUs that are not there: a cubin comes out, and it keeps its values in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

#: Most bytes of stack a thread, where values do not fit registers; 0 for every kernel that is not named. Those are
#: backward's of a lower layer; the numbers are what Triton 3.9 leaves and some room.
STACK = {
    ("backward (20, 2) layer 0", 80): 256,
    ("backward (20, 2) layer 1", 80): 64,
    ("backward (20, 2) layer 0", 90): 320,
}


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_compiles_without_a_gpu(arch: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton.compile_ahead", str(arch)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) >= 6
    for row in rows:
        print(row)  # pytest -s shows the table
    spilled = {row["name"]: row["stack"] for row in rows if row["stack"] > STACK.get((row["name"], arch), 0)}
    assert not spilled, f"bytes of stack a thread on sm_{arch}: {spilled}"
    # float32 products are sums of TF32 products of operands that were split: the compiler must not fuse that away.
    products = {row["name"] for row in rows if row["name"].startswith(("forward", "backward", "weights"))}
    others = {name for name in products if "float64" in name or name.endswith("precision 2")}
    assert {row["name"] for row in rows if row["roundings"]} == products - others
