"""Launching kernels: their cut, the device's guard, numbers of the host."""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton

from metakern.ops.core.triton_arithmetic import to_arithmetic

#: Programs of one launch at most, by CUDA.
MAX_GRID = 2**31 - 1


class Config(NamedTuple):
    """How a kernel is cut: coordinates of a block (a multiple of 32) and warps of a program."""

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
    if isinstance(kernel, triton.runtime.JITFunction):  # not what wrap_triton makes of one while a graph is traced
        options["enable_fp_fusion"] = True  # Triton 3.10 turns the default over
        if args[0].is_cuda:
            guard = torch.cuda.device(args[0].device)
    with guard:
        kernel[(grid,)](*args, **constants, **options)


def launch_in_parts(kernel: Any, grid: int, config: Config, *args: Any, **constants: Any) -> None:
    """The same for a kernel whose last argument is the number of its first program: as many launches as it takes."""
    first = 0
    while grid - first > MAX_GRID:
        launch(kernel, MAX_GRID, config, *args, first, **constants)
        first += MAX_GRID
    launch(kernel, grid - first, config, *args, first, **constants)  # of a symbolic grid, too


def split(*numbers: float) -> list[int]:
    """The upper and the lower half of each number's bits as a float64, for ``triton_arithmetic.scalar``.

    As integers of 32 bits every number arrives as it is: float arguments become float32.
    """
    return [half for number in numbers for half in struct.unpack(">ii", struct.pack(">d", number))]
