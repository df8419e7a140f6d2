"""Launching Triton kernels: launch configuration, device guard, host scalars."""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton

from metakern.ops.core.triton_arithmetic import to_arithmetic

#: CUDA's maximum number of programs (blocks) per launch.
MAX_GRID = 2**31 - 1


class Config(NamedTuple):
    """Launch configuration: coordinates per block (a multiple of 32) and warps per program."""

    block: int
    num_warps: int


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU."""
    return not isinstance(to_arithmetic, triton.runtime.JITFunction)


def launch(kernel: Any, grid: int, config: Config, *args: Any, **constants: Any) -> None:
    """Run a kernel over ``grid`` programs on the current stream of its tensors' device.

    Raises:
        RuntimeError: for more programs than a GPU takes in one launch
    """
    if grid > MAX_GRID:
        raise RuntimeError(f"the tensors are too large: they take {grid} programs, and one launch at most {MAX_GRID}")
    options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": 1}
    guard: AbstractContextManager[Any] = nullcontext()
    if isinstance(kernel, triton.runtime.JITFunction):  # but not the wrapper of wrap_triton under tracing
        options["enable_fp_fusion"] = True  # Triton 3.10 changes the default
        if args[0].is_cuda:
            guard = torch.cuda.device(args[0].device)
    with guard:
        kernel[(grid,)](*args, **constants, **options)


def launch_in_parts(kernel: Any, grid: int, config: Config, *args: Any, **constants: Any) -> None:
    """:func:`launch` in as many parts as needed, for a kernel whose last argument is the index of its first program."""
    first = 0
    while grid - first > MAX_GRID:
        launch(kernel, MAX_GRID, config, *args, first, **constants)
        first += MAX_GRID
    launch(kernel, grid - first, config, *args, first, **constants)  # also for a symbolic grid


def split(*numbers: float) -> list[int]:
    """The upper and lower half of each number's float64 bits, for ``triton_arithmetic.scalar``.

    Passing 32-bit integers keeps all bits; float arguments would become float32.
    """
    return [half for number in numbers for half in struct.unpack(">ii", struct.pack(">d", number))]
