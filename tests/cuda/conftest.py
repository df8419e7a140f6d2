"""The CUDA kernels on the emulated device, built once a session."""

from __future__ import annotations

import pytest

from tests.cuda.emulator import Emulator
from tests.cuda.inner_update_emulator import InnerUpdateEmulator
from tests.cuda.mlp_inner_loop_emulator import MlpEmulator


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    """csrc/lstm_step/cuda_kernels.cu, compiled for the CPU."""
    return Emulator()


@pytest.fixture(scope="session")
def inner_update() -> InnerUpdateEmulator:
    """csrc/inner_update/cuda_kernels.cu, compiled for the CPU."""
    return InnerUpdateEmulator()


@pytest.fixture(scope="session")
def mlp() -> MlpEmulator:
    """csrc/mlp_inner_loop/cuda_kernels.cu, compiled for the CPU."""
    return MlpEmulator()
