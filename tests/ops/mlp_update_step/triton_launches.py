"""Calls of mlp_update_step whose Triton kernels are launched and compiled without a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.conformance.ops.implementations import with_gradients
from tests.conformance.ops.mlp_update_step import MlpUpdateStep


def _call(shapes: Sequence[Sequence[int]], **sizes: int) -> None:
    row = MlpUpdateStep()
    example = row.make(torch.float32, tasks=2, shapes=shapes, **sizes)
    with_gradients(row, example, lambda leaves: row.call(leaves, "triton"))


def factored() -> None:
    _call(((5, 9, 3),), width=32)


def one_axis() -> None:
    _call(((70,),), width=32)


def widest() -> None:
    _call(((5, 9),), width=64, layers=4)


# Larger blocks of the widest network take minutes to compile for sm_80.
LAUNCHES = {80: (factored, widest), 90: (factored, one_axis), 100: (factored,)}
