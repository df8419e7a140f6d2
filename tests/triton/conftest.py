"""Without a GPU, Triton's interpreter runs the kernels on the CPU; with one, the same tests run there."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs the package triton")

from metakern.ops.lstm_step import prepare

prepare("triton")


@pytest.fixture(autouse=True)
def like_a_gpu(interpreter_like_a_gpu: None) -> None:
    """For all tests of this folder."""
