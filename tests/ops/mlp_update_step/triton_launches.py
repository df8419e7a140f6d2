"""A call of mlp_update_step whose Triton kernels are launched and compiled without a GPU."""

from __future__ import annotations

import torch

from tests.conformance.ops.implementations import with_gradients
from tests.conformance.ops.mlp_update_step import MlpUpdateStep


def mlp_update_step() -> None:
    row = MlpUpdateStep()
    example = row.make(torch.float32, tasks=2, shapes=((70,), (5, 9, 3)), width=32)
    with_gradients(row, example, lambda leaves: row.call(leaves, "triton"))


LAUNCHES = dict.fromkeys((80, 90, 100), (mlp_update_step,))
