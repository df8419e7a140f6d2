"""Without a GPU, Triton's interpreter runs the kernels on the CPU; with one, the same tests run there."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")

from metakern.ops.lstm_step import prepare

prepare("triton")


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def like_a_gpu(interpreter_like_a_gpu: None) -> None:
    """For all tests of this folder."""
