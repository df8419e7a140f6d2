"""task_norm_act_pool by Triton kernels: both derivatives, held to the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the package triton")

from tests.conformance.ops.task_norm_act_pool import TaskNormActPool
from tests.conftest import assert_close

pytestmark = pytest.mark.usefixtures("interpreter_like_a_gpu", "quick_interpreter")

CASES: dict[str, dict[str, Any]] = {
    "conv4's block": {},
    "odd": {"size": (5, 7)},
    "not pooled": {"pool": False, "size": (3, 5)},
    "leaky": {"activation": "leaky_relu", "affine": False},
    "norm alone": {"activation": "identity", "pool": False},
    "given": {"statistics": "given"},
    "not normalised": {"statistics": "none", "activation": "leaky_relu"},
    "several blocks": {"size": (30, 50), "channels": 1, "tasks": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_second_derivatives_are_the_references(case: str, device: torch.device) -> None:
    row = TaskNormActPool()
    example = row.make(torch.float64, **CASES[case]).to(str(device))
    names = row.leaves(example)

    def outcome(call: Any) -> list[Tensor]:
        leaves = example.map(lambda name, x: x.clone().requires_grad_(name in names))
        y = call(leaves)["y"]
        seed = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view(y.shape).requires_grad_()
        wanted = [leaves.tensors[name] for name in names]
        first = torch.autograd.grad(y, wanted, seed, create_graph=True)
        slope = torch.stack([(x.tanh() * (x.detach() + 1)).sum() for x in first]).sum()
        return list(torch.autograd.grad(slope, [seed, *wanted], materialize_grads=True))

    got, want = outcome(lambda leaves: row.call(leaves, "triton")), outcome(row.reference)
    for name, a, b in zip(("seed", *names), got, want, strict=True):
        assert_close(f"gradient of {name}", a, b, 1e-10)
