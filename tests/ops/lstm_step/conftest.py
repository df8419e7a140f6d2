"""The CUDA kernels on the emulated device."""

from __future__ import annotations

import pytest

from tests.ops.lstm_step.emulator import Emulator, kernels


@pytest.fixture
def emulator() -> Emulator:
    """csrc/lstm_step/cuda_kernels.cu, compiled for the CPU."""
    return kernels()
