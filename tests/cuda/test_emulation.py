"""The emulated device itself: correct kernels run as on a GPU, wrong ones are detected."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.cuda.device import ORDERS, ROOT, Device, build

BARRIER_ERROR = 719  # cudaErrorLaunchFailure


@cache
def library() -> ctypes.CDLL:
    path = build("self_test", ("self_test.cpp", "runtime.cpp"), [ROOT / "csrc" / "core" / "intrinsics.cuh"])
    loaded = ctypes.CDLL(str(path))
    loaded.emulation_report.restype = ctypes.c_char_p
    return loaded


def run(
    kernel: str, data: Tensor, outputs: int, *, blocks: int = 1, threads: int = 64, device: Device | None = None
) -> tuple[int, str, Tensor]:
    """Error, report and the kernel's output."""
    out = torch.full((outputs,), -1.0)
    structure = (device or Device()).structure()
    library().emulation_configure(ctypes.byref(structure))
    shared_bytes = max(threads * 4, len(data) * 4)
    pointers = ctypes.c_void_p(data.data_ptr()), ctypes.c_void_p(out.data_ptr())
    error = library().run_kernel(kernel.encode(), blocks, threads, shared_bytes, *pointers)
    assert error != -1, kernel
    return error, library().emulation_report().decode(), out


EVERY_ORDER = [Device(order=order, seed=3) for order in ORDERS]


@pytest.mark.parametrize("device", EVERY_ORDER, ids=ORDERS)
def test_barriers_let_every_thread_see_what_the_others_wrote(device: Device) -> None:
    data = torch.rand(192)
    error, report, out = run("reverse", data, 192, blocks=3, device=device)
    assert (error, report) == (0, "")
    assert torch.equal(out, data.view(3, 64).flip(1).flatten())
    assert torch.equal(run("reverse warps", data[:64], 64, device=device)[2], data[:64].view(2, 32).flip(1).flatten())
    rounds = torch.stack([data[:64], data[:64] + 1]).roll(-40, 1).flatten()
    assert torch.equal(run("reuse", data[:64], 128, device=device)[2], rounds)


@pytest.mark.parametrize("kernel", ["reverse", "reverse warps", "reuse"])
def test_a_missing_barrier_shows(kernel: str) -> None:
    data = torch.rand(64)
    _, _, expected = run(kernel, data, 128)
    outcomes = [run(f"{kernel} without a barrier", data, 128, device=device)[2] for device in EVERY_ORDER]
    assert not all(torch.equal(out, expected) for out in outcomes)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("different barriers", "divergent __syncthreads() in block 0, thread 32"),
        ("some at no barrier", "a thread ended while others wait at __syncthreads() in block 0, thread 0"),
        ("half a warp", "a thread ended while others wait at a warp-wide operation in block 0, thread 0"),
        ("warp and block barrier", "threads wait at different kinds of barriers in block 0, thread 0"),
        ("behind the end", "a write outside shared memory in block 0, thread 0"),
        ("before the start", "a write outside shared memory in block 0, thread 0"),
        ("misaligned copy", "an access to an address that is no multiple of 16 in block 0, thread 63"),
    ],
)
def test_what_no_kernel_may_do_is_reported(kernel: str, message: str) -> None:
    error, report, _ = run(kernel, torch.rand(64), 64)
    assert (error, report) == (BARRIER_ERROR, message)


def test_shared_memory_holds_nan_until_it_is_written() -> None:
    assert run("read before written", torch.rand(64), 64)[2].isnan().all()


@pytest.mark.parametrize("device", EVERY_ORDER, ids=ORDERS)
def test_lanes_exchange_values(device: Device) -> None:
    data = torch.randint(-99, 99, (64,)).float()
    error, report, out = run("warp sums", data, 64, device=device)
    assert (error, report) == (0, "")
    assert torch.equal(out, data.view(2, 32).sum(1, keepdim=True).expand(2, 32).flatten())


@pytest.mark.parametrize("eager", [False, True])
def test_asynchronous_copies_land_at_once_or_when_they_are_waited_for(eager: bool) -> None:
    device = Device(eager_copies=eager)
    data = torch.rand(128)
    assert torch.equal(run("copy", data, 128, threads=32, device=device)[2], data)
    unfinished = run("copy without a wait", data, 128, threads=32, device=device)[2]
    assert unfinished.isnan().all() != eager
    data = torch.rand(256)
    assert torch.equal(run("copy too early", data, 128, threads=32, device=device)[2], data[128 * eager :][:128])


def test_limits_of_a_launch() -> None:
    data = torch.rand(64)
    assert run("reverse", data, 64, device=Device(shared_kilobytes=0))[0] == 1  # cudaErrorInvalidValue
    assert run("reverse", data, 64, threads=1025)[0] == 9  # cudaErrorInvalidConfiguration
    failing = replace(Device(), fail_call=1, failure=209)
    assert run("reverse", data, 64, device=failing)[0] == 209


@pytest.mark.parametrize(("kernel", "depth", "unit"), [("TF32", 8, 2**-11), ("bfloat16", 16, 2**-8)])
def test_products_of_tensor_cores(kernel: str, depth: int, unit: float) -> None:
    # Integers are exact in either format and reveal misplaced operands; random numbers are rounded.
    for numbers in (torch.randint(-8, 9, (24 * depth,)).float(), torch.rand(24 * depth)):
        error, report, out = run(f"product in {kernel}", numbers, 128, threads=32)
        assert (error, report) == (0, "")
        a, b = numbers[: 16 * depth].view(16, depth).double(), numbers[16 * depth :].view(depth, 8).double()
        exact = numbers[0] == numbers[0].round()
        bound = 0.0 if exact else (2 * unit + 2**-20) * (a.abs() @ b.abs())
        difference = (out.view(16, 8).double() - a @ b).abs()
        assert bool((difference <= bound).all())
        assert exact or difference.max() > unit / 16


def test_approximations_are_as_bad_as_they_may_be_and_no_worse() -> None:
    x = torch.cat([torch.linspace(-30, 30, 63), torch.tensor([float("nan")])])
    exp2, reciprocal, smaller = run("approximations", x, 192)[2].view(3, 64).double()
    for got, want, bound in ((exp2, x.double().exp2(), 2**-22), (reciprocal, 1 / x.double(), 2**-23)):
        finite = want.isfinite()
        error = ((got - want) / want)[finite].abs()
        assert bound / 4 < float(error.max()) <= bound
        assert bool(got[63].isnan())
    assert bool(smaller[63].isnan())
    assert torch.equal(smaller[:63], x[:63].double().clamp(max=1))
