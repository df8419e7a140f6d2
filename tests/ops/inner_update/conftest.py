"""The CUDA kernels on the emulated device."""

from __future__ import annotations

import pytest

from tests.ops.inner_update.emulator import InnerUpdateEmulator, kernels


@pytest.fixture
def inner_update() -> InnerUpdateEmulator:
    """csrc/inner_update/cuda_kernels.cu, compiled for the CPU."""
    return kernels()
