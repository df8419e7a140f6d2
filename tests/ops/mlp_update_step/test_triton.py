"""mlp_update_step's Triton kernels where a segment has many blocks, and more coordinates than 32 bits count."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs the package triton")

import torch

from metakern.ops.mlp_update_step import triton as triton_step
from tests.conformance.ops.implementations import INTERPRETED, TRITON, assert_conforms, bits
from tests.conformance.ops.mlp_update_step import MlpUpdateStep
from tests.conftest import assert_same_bits

pytestmark = pytest.mark.usefixtures("interpreter_like_a_gpu", "quick_interpreter")

BY = TRITON if torch.cuda.is_available() else INTERPRETED
ROW = MlpUpdateStep()


def test_a_program_takes_several_blocks_of_a_chunk_and_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_step, "MAX_CHUNKS", 2)
    monkeypatch.setattr(triton_step, "MAX_PROGRAMS", 2)
    example = ROW.make(torch.float64, shapes=((5, 27),), tasks=2, width=4, layers=2).to(BY.device)
    assert_conforms(ROW, example, BY)


def test_places_by_64_bits_are_those_by_32(monkeypatch: pytest.MonkeyPatch) -> None:
    example = ROW.make(torch.float32, shapes=((2, 4, 3),), tasks=1, width=4, layers=1).to(BY.device)
    expected = bits(ROW, example, BY)
    monkeypatch.setattr(triton_step.Geometry, "wide", True)
    for name, x in bits(ROW, example, BY).items():
        assert_same_bits(name, x, expected[name])
