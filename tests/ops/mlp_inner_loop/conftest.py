"""The CUDA kernels on the emulated device."""

from __future__ import annotations

import pytest

from tests.ops.mlp_inner_loop.emulator import MlpEmulator, kernels


@pytest.fixture
def mlp() -> MlpEmulator:
    """csrc/mlp_inner_loop/cuda_kernels.cu, compiled for the CPU."""
    return kernels()
