"""Launch the operators' kernels on a GPU that need not be there, up to the point where the compiled kernel would start.

What Triton does with a launch is run: it binds the arguments, takes their types and values, and compiles. Run as
``TRITON_INTERPRET=0 python -m tests.triton.launch_ahead ARCH`` with 90 or 100; prints one JSON object for each kind of
launch: its name, and what the cubin holds where it is compiled.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

from metakern.core import backend as _backend
from metakern.ops.hrnn_step import triton_kernels as hrnn_step_kernels
from metakern.ops.lstm_step import prepare
from metakern.ops.mlp_inner_loop import triton_kernels as mlp_inner_loop_kernels
from tests.conformance.ops.hrnn_step import HrnnStep
from tests.conformance.ops.implementations import with_gradients
from tests.mlp_problems import Case
from tests.ops.lstm_step.triton_evaluation import backward, forward
from tests.problems import make_problem
from tests.triton.compile_ahead import cubin_facts
from tests.update_problems import make_update


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


def lstm_step() -> None:
    problem = make_problem(40, 20, 2)
    forward(problem)
    backward(problem)


def hrnn_step() -> None:
    row = HrnnStep()
    example = row.make(torch.float32, tasks=2, shapes=((70,),), attention=True)
    with_gradients(row, example, lambda leaves: row.call(leaves, "triton"))


def inner_update() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        make_update(2, "per parameter", dtype, clip_norm=1.0, resting=(1,)).run("triton")


def mlp_regression() -> None:
    """The sinusoids of Finn et al. 2017."""
    Case([1, 40, 40, 1], 3, 10, 10).meta("triton", torch.float32, steps=5)


def mlp_classification() -> None:
    """Everything that is optional, in one of the 16-bit dtypes."""
    case = Case([16, 16, 5], 300, 5, 15, "cross_entropy", own=True)
    case.params[1] = case.params[1][0]
    lr = [torch.full((2, *(p.shape if i == 1 else p.shape[1:])), 0.1) for i, p in enumerate(case.params)]
    masks = {f"{name}_mask": torch.ones(300, n, dtype=torch.bool) for name, n in (("support", 5), ("query", 15))}
    case.meta("triton", torch.bfloat16, lr=lr, steps=2, per_step=True, activation="gelu", **masks)


def mlp_adaptation() -> None:
    """By clipped gradients, with layers of several activations."""
    case = Case([3, 20, 9, 2], 2, loss="binary_cross_entropy_with_logits")
    case.adapt("triton", steps=3, activation=["sigmoid", "leaky_relu:0.1"], clip_norm=1.0)


#: By the architecture that they are launched for; those of mlp_inner_loop are compiled as well.
LAUNCHES: dict[int, tuple[Callable[[], None], ...]] = {
    80: (hrnn_step,),
    90: (lstm_step, hrnn_step, inner_update, mlp_regression, mlp_classification, mlp_adaptation),
    100: (hrnn_step, mlp_regression),
}


def main() -> None:
    _backend.missing = lambda *_: ""  # type: ignore[assignment]
    prepare("triton")
    importlib.import_module("metakern.ops.inner_update.triton")
    run, compile_kernel = JITFunction.run, JITFunction._do_compile

    def bound(kernel: Any, key: Any, *args: Any, **options: Any) -> None:
        if key in seen:
            return
        seen.add(key)
        row: dict[str, Any] = {"name": f"{launch.__name__}: {kernel.__name__}"}
        if kernel.__module__ in (mlp_inner_loop_kernels.__name__, hrnn_step_kernels.__name__):
            row |= cubin_facts(compile_kernel(kernel, key, *args, **options).asm)
        print(json.dumps(row), flush=True)

    def warm_up(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        run(kernel, *args, grid=grid, warmup=True, **options)

    JITFunction.run, JITFunction._do_compile = warm_up, bound  # type: ignore[method-assign]
    arch, seen = int(sys.argv[1]), set()
    triton.runtime.driver.set_active(Driver(arch))
    for launch in LAUNCHES[arch]:
        launch()


if __name__ == "__main__":
    main()
