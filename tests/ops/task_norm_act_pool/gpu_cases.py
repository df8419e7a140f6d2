"""Calls of task_norm_act_pool up to its second derivative, for compute-sanitizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tests.conformance.ops.task_norm_act_pool import TaskNormActPool

F32, F64 = torch.float32, torch.float64


@dataclass(frozen=True)
class BlockCase:
    """A block by its sizes and options, and the passes through it, which are an operator each."""

    dtype: torch.dtype
    sizes: Mapping[str, Any]

    def run(self, backend: str, device: str) -> None:
        """Raise if y, or a first or second derivative, is NaN."""
        row = TaskNormActPool()
        example = row.make(self.dtype, **self.sizes).to(device)
        leaves = example.map(lambda name, x: x.requires_grad_(name in row.differentiable))
        wanted = [x for x in leaves.tensors.values() if x.requires_grad]
        y = row.call(leaves, backend)["y"]
        first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), wanted)
        for name, found in {"y": [y], "first derivative": first, "second derivative": second}.items():
            if any(bool(x.cpu().isnan().any()) for x in found):
                raise ArithmeticError(f"{name} holds NaN")


TRITON_CASES = [
    BlockCase(F32, {"size": (5, 10), "channels": 3}),
    BlockCase(F64, {"size": (4, 3), "activation": "leaky_relu", "pool": False, "statistics": "given"}),
]

CASES: Mapping[str, list[BlockCase]] = {"cuda": [], "triton": TRITON_CASES, "reference": TRITON_CASES[:1]}
