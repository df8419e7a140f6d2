"""Fixtures for devices, backends and instruction sets, and the single table of tolerances."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():  # Triton's kernels then run on the CPU; it reads this when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from metakern.core import backend as _backend
from tests.interpreter import interpreter_like_a_gpu, quick_interpreter

__all__ = ["interpreter_like_a_gpu", "quick_interpreter"]  # fixtures

#: Backends for CPU tensors; with a GPU, Triton's kernels are compiled for it (marked gpu).
BACKENDS = ("cpp", "reference") if torch.cuda.is_available() else ("cpp", "triton", "reference")

#: Instruction sets that the CPU kernels are compiled for, slowest first.
CAPABILITIES = tuple(_backend._C.compiled_cpu_capabilities()) if _backend.is_compiled() else ("baseline",)

#: Largest error relative to the largest magnitude of the expected tensor, by storage dtype. For bfloat16 and float16
#: params the arithmetic is float32; their tensors add the unit roundoff of the storage.
FORWARD_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 2**-11 + 2e-6,
    torch.bfloat16: 2**-8 + 2e-6,
}
GRADIENT_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 2**-11 + 1e-5,
    torch.bfloat16: 2**-8 + 1e-5,
}


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Fail unless ``actual`` is ``expected`` up to ``tolerance`` times the largest magnitude of ``expected``.

    Non-finite elements must be the same in both tensors.
    """
    assert actual.shape == expected.shape, f"{name} has shape {list(actual.shape)}, expected {list(expected.shape)}"
    got, want = actual.detach().to(torch.float64), expected.detach().to(torch.float64)
    finite = want.isfinite()
    special = torch.equal(got[~finite].nan_to_num(7, 8, 9), want[~finite].nan_to_num(7, 8, 9))
    assert special, f"{name} is not finite elsewhere than expected"
    assert bool(got[finite].isfinite().all()), f"{name} holds {int((~got[finite].isfinite()).sum())} values not finite"
    if not finite.any():
        return
    scale = float(want[finite].abs().max())
    error = (got - want).abs().masked_fill(~finite, 0)
    worst = int(error.argmax())
    ratio = float(error.max()) / scale if scale else (0.0 if error.max() == 0 else float("inf"))
    assert ratio <= tolerance, (
        f"{name} is off by {ratio:.3g} of its largest magnitude {scale:.3g}, allowed {tolerance:.3g}: element {worst} "
        f"of {actual.numel()} is {float(got.flatten()[worst])!r}, expected {float(want.flatten()[worst])!r}"
    )


def assert_same_bits(name: str, actual: Tensor, expected: Tensor) -> None:
    """Fail unless both tensors hold the same bits; NaN equals NaN of the same payload, -0 is not 0."""
    assert actual.dtype == expected.dtype, f"{name} is {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name} has shape {list(actual.shape)}, expected {list(expected.shape)}"
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    bits = [x.detach().contiguous().view(-1).view(integer) for x in (actual, expected)]
    different = int((bits[0] != bits[1]).sum())
    assert different == 0, f"{name} differs in the bits of {different} of {actual.numel()} elements"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sanitize: run under AddressSanitizer and UBSan by tests/sanitizers/run.sh")
    config.addinivalue_line("markers", "gpu: needs a GPU; what bench.gpu_check runs first")


@pytest.fixture
def device() -> torch.device:
    """The device of Triton's kernels: a GPU, or the CPU with the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend."""
    return str(request.param)


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every supported instruction set, active during the test."""
    if not _backend.is_compiled():
        pytest.fail("the compiled kernels are missing; the tests need them: pip install -e .")
    available = _backend._C.available_cpu_capabilities()
    if request.param not in available:
        pytest.skip(f"this processor or build has no {request.param} (available: {', '.join(available)})")
    before = _backend._C.cpu_capability()
    _backend._C.set_cpu_capability(request.param)
    yield request.param
    _backend._C.set_cpu_capability(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Lets a test set the number of threads, and restores it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread, for tests with tensors too small to gain from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
