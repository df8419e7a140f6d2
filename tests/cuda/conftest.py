"""The emulated device that the CUDA kernels run on, built once a session."""

from __future__ import annotations

import pytest

from tests.cuda.emulator import Emulator


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    """csrc/cuda/lstm_step.cu, compiled for the CPU."""
    return Emulator()
