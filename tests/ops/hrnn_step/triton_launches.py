"""A call of hrnn_step whose Triton kernels are launched, and compiled, without a GPU."""

from __future__ import annotations

import torch

from tests.conformance.ops.hrnn_step import HrnnStep
from tests.conformance.ops.implementations import with_gradients


def hrnn_step() -> None:
    row = HrnnStep()
    example = row.make(torch.float32, tasks=2, shapes=((70,),), attention=True)
    with_gradients(row, example, lambda leaves: row.call(leaves, "triton"))


LAUNCHES = dict.fromkeys((80, 90, 100), (hrnn_step,))
