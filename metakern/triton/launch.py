"""Launching kernels: their cut, the device's guard, numbers of the host."""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton

from metakern.triton.arithmetic import to_arithmetic


class Config(NamedTuple):
    """How a kernel is cut: coordinates of a block (a multiple of 32) and warps of a program."""

    block: int
    num_warps: int


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU."""
    return not isinstance(to_arithmetic, triton.runtime.JITFunction)


def launch(kernel: Any, grid: int, config: Config, *args: Any, **constants: Any) -> None:
    """Run a kernel over ``grid`` programs on the current stream of its tensors' device."""
    options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": 1}
    guard: AbstractContextManager[Any] = nullcontext()
    if isinstance(kernel, triton.runtime.JITFunction):  # not what wrap_triton makes of one while a graph is traced
        options["enable_fp_fusion"] = True  # Triton 3.10 turns the default over
        if args[0].is_cuda:
            guard = torch.cuda.device(args[0].device)
    with guard:
        kernel[(grid,)](*args, **constants, **options)


def split(*numbers: float) -> list[float]:
    """Each number as the float32 nearest to it and the rest, so that float64 arithmetic gets 48 bits of it."""
    pairs = []
    for number in numbers:
        high = struct.unpack("f", struct.pack("f", number))[0]
        pairs += [high, number - high]
    return pairs
