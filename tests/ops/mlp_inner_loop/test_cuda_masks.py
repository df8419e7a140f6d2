"""Masks in csrc/mlp_inner_loop/cuda_kernels.cu, run on the CPU: tasks without samples, and bytes other than 0 and 1."""

from __future__ import annotations

import pytest
import torch

from metakern.ops.mlp_inner_loop.reference import LOSSES
from tests.conftest import GRADIENT_TOLERANCE
from tests.mlp_problems import F64, Case, assert_equal
from tests.ops.mlp_inner_loop.emulator import MlpEmulator
from tests.ops.mlp_inner_loop.test_cuda import assert_same, meta
from tests.ops.test_masks import EMPTY, masks, odd_bytes


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("empty", ["support_mask", "query_mask"])
def test_a_task_without_samples(empty: str, loss: str, mlp: MlpEmulator) -> None:
    case, own = Case([2, 6, 3], 3, loss=loss, own=True), masks(3)
    own[empty][EMPTY] = False
    found = meta(mlp, case, steps=2, **own)
    assert_equal(found, case.meta("reference", steps=2, **own), GRADIENT_TOLERANCE[F64])
    assert all(bool(x.isfinite().all()) for x in found)
    if empty == "query_mask":
        assert not any(bool(x[EMPTY].any()) for x in found)


def test_masks_are_true_for_every_byte_but_0(mlp: MlpEmulator) -> None:
    case, own = Case([2, 6, 3], 3, own=True), masks(3)
    odd = {name: odd_bytes(mask) for name, mask in own.items()}
    assert torch.equal(odd["query_mask"], own["query_mask"])
    assert_same(meta(mlp, case, steps=2, **odd), meta(mlp, case, steps=2, **own))
