"""A meta-iteration of the batched inner loop on a GPU: all query losses and the backward of their mean.

Peers: torch.func under torch.vmap, launch by launch, and the same under torch.compile(mode="reduce-overhead"), which
replays CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from bench.gpu_cells import Cell, Cells, Limits
from bench.gpu_device import Device
from bench.mlp_inner_loop.cases import Case, Set, sinusoid
from bench.mlp_inner_loop.contenders import Compiled, Contender, Fused, Vmap, iterate, results
from bench.timing import Calls

FULL = (sinusoid(32), sinusoid(1024))
DRY = (sinusoid(2, 2),)

#: Number of meta-batches that a case rotates through.
BATCHES = 3


def on_device(batch: tuple[Set, Set], device: torch.device) -> tuple[Set, Set]:
    """Support and query sets on the device."""
    (x, y), (query_x, query_y) = batch
    return (x.to(device), y.to(device)), (query_x.to(device), query_y.to(device))


def make_loop(contender: Callable[[], Contender], batches: Sequence[tuple[Set, Set]]) -> tuple[Calls, Any]:
    """Meta-iterations of one contender, its model on the device of the data."""
    made = contender()
    made.model.to(batches[0][0][0].device)
    return [partial(iterate, made, batch) for batch in batches], lambda: results(made, batches[0])


def loop_cell(case: Case, device: Device, limits: Limits, *, compiled: bool) -> Cell:
    """The cell of a meta-iteration with its contenders; the first is the reference."""
    cell = Cell(case.title, device, limits)
    batches = [on_device(case.batch(seed), device.torch_device) for seed in range(BATCHES)]
    cell.admit("vmap", partial(make_loop, partial(Vmap, case), batches), ours=False)
    for backend in device.backends:
        cell.admit(backend, partial(make_loop, partial(Fused, case, backend=backend), batches), ours=True)
    if compiled:
        peer = partial(Compiled, case, **device.graph_options)
        cell.admit("compiled", partial(make_loop, peer, batches), ours=False)
    return cell


CELLS = Cells(FULL, DRY, loop_cell)
