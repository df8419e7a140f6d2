"""Launch the operators' kernels on a GPU that need not be there, up to the point where the compiled kernel would start.

What Triton does with a launch is run: it binds the arguments, takes their types and values, and compiles. Run as
``TRITON_INTERPRET=0 python -m tests.triton.launch_ahead ARCH`` with 80, 90 or 100; prints one JSON object for each kind
of launch: its name, and what the cubin holds where it is compiled, with the most bytes of stack that it may hold.

Every operator of the conformance suite with Triton kernels takes part: by ``LAUNCHES`` in
tests/ops/<folder>/triton_launches.py, which map an architecture to calls, or else by an example of its row, forward
and backward, for architecture 90. ``STACK`` in that module maps kernels to bytes of stack, where they need more than
usual.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

from metakern.core import backend as _backend
from metakern.ops.core.registry import OPERATORS
from tests.conformance.ops.implementations import with_gradients
from tests.conformance.ops.operators import Operator
from tests.conformance.ops.rows import with_modules
from tests.triton.compile_ahead import MODULES, cubin_facts


class Driver:
    """GPU driver interface that a launch needs."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


#: Most bytes of stack a thread: room for addresses that a kernel of many phases reads once in each.
USUAL_STACK = 256


def call_row(op: Operator) -> None:
    """The row's example ``viewed`` by Triton, forward and backward."""
    with_gradients(op, op.make(torch.float32, **op.viewed), lambda leaves: op.call(leaves, "triton"))


def launches(arch: int) -> Iterator[tuple[str, Callable[[], None], dict[str, int]]]:
    """Name, which begins with that of the row, call and stack limits of every launch for an architecture."""
    for op, module in with_modules("triton_launches"):
        if module is not None:
            limits = getattr(module, "STACK", {})
            yield from ((f"{op.name}, {launch.__name__}", launch, limits) for launch in module.LAUNCHES.get(arch, ()))
        elif arch == 90 and op.serves("interpreted", torch.float32):
            yield op.name, partial(call_row, op), {}


def main() -> None:
    _backend.missing = lambda *_: ""  # type: ignore[assignment]
    for operator in OPERATORS.values():
        operator.prepare("triton")
    run, compile_kernel = JITFunction.run, JITFunction._do_compile
    name, limits = "", {}

    def bound(kernel: Any, key: Any, *args: Any, **options: Any) -> None:
        if key in seen:
            return
        seen.add(key)
        row: dict[str, Any] = {"name": f"{name}: {kernel.__name__}"}
        if kernel.__module__ not in MODULES:
            row |= cubin_facts(compile_kernel(kernel, key, *args, **options).asm)
            row["limit"] = limits.get(kernel.__name__, USUAL_STACK)
        print(json.dumps(row), flush=True)

    def warm_up(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        run(kernel, *args, grid=grid, warmup=True, **options)

    JITFunction.run, JITFunction._do_compile = warm_up, bound  # type: ignore[method-assign]
    arch, seen = int(sys.argv[1]), set()
    triton.runtime.driver.set_active(Driver(arch))
    for name, launch, limits in launches(arch):  # noqa: B007 read by `bound`
        launch()


if __name__ == "__main__":
    main()
