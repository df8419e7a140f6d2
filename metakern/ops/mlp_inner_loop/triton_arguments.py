"""The network table that the Triton kernels of mlp_inner_loop read, and the sets in their layout.

Axis legend: T tasks, P parameters of a task.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metakern.core.memo import constant, memoized
from metakern.ops.core.checks import check_value
from metakern.ops.core.triton_launch import split
from metakern.ops.mlp_inner_loop import arguments as _arguments
from metakern.ops.mlp_inner_loop.arguments import Arguments
from metakern.ops.mlp_inner_loop.triton_functions import MIXED

#: Private results are padded to a multiple of this many tasks. Keep in step with csrc/mlp_inner_loop/problem.h.
TASK_LANES = 16

#: Maximum outputs: the loss processes all outputs of a sample at once.
MAX_OUTPUTS = 4096


class Samples(NamedTuple):
    """The support or query set of all tasks, contiguous."""

    x: Tensor  # [T, samples, inputs]
    y: Tensor  # [T, samples, outputs], or int64 labels [T, samples]
    mask: Tensor | None  # uint8 [T, samples]


class Network(_arguments.Network):
    """Sizes of the tasks' MLPs, within the kernels' limits."""

    def __init__(self, arguments: Arguments, x: Tensor) -> None:
        """Check params and rates, and read their sizes; ``x`` are the support samples."""
        super().__init__(arguments, x)
        fits = self.outputs <= MAX_OUTPUTS
        check_value(fits, "the last layer must have at most ", MAX_OUTPUTS, " units, got ", self.outputs)

    @property
    def activation(self) -> int:
        """The kind of all activations, or MIXED if they differ."""
        kinds = {kind for kind, _ in self.activations}
        return min(kinds, default=0) if len(kinds) < 2 else MIXED.value

    def samples(self, name: str, loss: int, x: Tensor, y: Tensor, mask: Tensor | None, like: Tensor) -> Samples:
        """The set ``name``, "support" or "query", checked and contiguous."""
        self.check_samples(name, loss, x, y, mask, like)
        return Samples(x.contiguous(), y.contiguous(), None if mask is None else mask.contiguous().view(torch.uint8))


# ------------------------------------------------------------------------------------------- constants on the device


def on_device(x: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A constant that may be on the CPU, moved to ``device`` and cast."""
    if x.device == device:
        return x.contiguous().to(dtype)
    return constant(tuple(x.tolist()), dtype, device)


def table(network: Network, arguments: Arguments, device: torch.device) -> Tensor:
    """The network's table for the kernels, int32 [2 L, 12]; the columns are named in triton_pass.py."""
    rates = tuple(rate.numel() for rate in arguments.lr)
    steps = arguments.steps if arguments.per_step else 0
    bits = arguments.adapted & ((1 << len(network.sizes)) - 1)
    rows = _rows(network.widths, network.sizes, bits, rates, steps, network.activations)
    return constant(rows, torch.int32, device)


@memoized
def _rows(
    widths: tuple[int, ...],
    sizes: tuple[int, ...],
    adapted: int,
    rates: tuple[int, ...],
    steps: int,
    activations: tuple[tuple[int, float], ...],
) -> tuple[tuple[int, ...], ...]:
    rows = []
    kinds = [(kind, *split(slope)) for kind, slope in activations] + [(0, 0, 0)]  # the last layer has none
    offsets, slots = (list(itertools.accumulate(counts, initial=0)) for counts in (sizes, rates))
    for tensor, size in enumerate(sizes):
        layer, owner = tensor // 2, tensor if len(rates) > 1 else 0
        of_step = rates[owner] // max(steps, 1) if rates else 0
        row = [offsets[tensor], size, widths[layer], widths[layer + 1], sum(widths[1 : layer + 1])]
        rates_of = slots[owner], int(of_step > 1), of_step if steps else 0
        rows.append([*row, adapted >> tensor & 1, *rates_of, *kinds[layer]])
    return tuple(map(tuple, rows))


def starts(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Start offsets of consecutive pieces of these sizes, and the end of the last, int32."""
    return constant(tuple(itertools.accumulate(sizes, initial=0)), torch.int32, device)
