"""csrc/inner_update/cuda_kernels.cu itself, run on the CPU thread by thread, held to the reference.

Axis legend: T tasks, K inner steps, ``*shape`` the shape of one parameter tensor of the model.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.conftest import FORWARD_TOLERANCE, assert_close, assert_same_bits
from tests.cuda.device import DTYPES, Device, EmulationError
from tests.ops.inner_update.emulator import InnerUpdateEmulator
from tests.update_problems import RATES, Update, make_update

#: Numbers of multiprocessors and orders of threads and warps.
DEVICES = [
    Device(multiprocessors=132),
    Device(multiprocessors=1, order="reverse"),
    Device(multiprocessors=2, order="shuffled", seed=1),
]


def update(
    emulator: InnerUpdateEmulator, problem: Update, device: Device | None = None, margin: int = 256
) -> list[Tensor]:
    return emulator(*problem.arguments(), device=device or Device(), margin=margin)


def assert_matches_reference(got: list[Tensor], problem: Update) -> None:
    """By the float64 reference and the table in tests/conftest.py; shapes and dtypes are those of the params."""
    for index, (new, want, p) in enumerate(zip(got, problem.expected(torch.float64), problem.params, strict=True)):
        assert new.dtype == p.dtype
        assert_close(f"tensor {index}", new, want, FORWARD_TOLERANCE[p.dtype])


# ------------------------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rates", RATES)
def test_bits_are_pytorchs_where_nothing_is_clipped(
    rates: str, dtype: torch.dtype, inner_update: InnerUpdateEmulator
) -> None:
    problem = make_update(2, rates, dtype)
    for new, want in zip(update(inner_update, problem), problem.expected(), strict=True):
        assert_same_bits("new params", new, want.to(dtype))


def test_every_tensor_may_have_a_dtype_of_its_own_and_so_may_its_rate(inner_update: InnerUpdateEmulator) -> None:
    parts = [make_update(2, "per parameter", dtype, shapes=[(130,)], seed=i) for i, dtype in enumerate(DTYPES)]
    turned = [*DTYPES[1:], DTYPES[0]]
    problem = Update(
        [part.params[0] for part in parts],
        [part.grads[0] for part in parts],
        [part.lr[0].to(dtype) for part, dtype in zip(parts, turned, strict=True)],
        clip_norm=1.0,
    )
    assert_matches_reference(update(inner_update, problem), problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rates", ["number", "per parameter"])
def test_tensors_that_are_not_aligned_give_the_same_bits(
    rates: str, dtype: torch.dtype, inner_update: InnerUpdateEmulator
) -> None:
    for clip_norm in (None, 2.0):
        problem = make_update(2, rates, dtype, clip_norm=clip_norm)
        shifted = update(inner_update, problem, margin=256 + dtype.itemsize)
        for new, want in zip(shifted, update(inner_update, problem), strict=True):
            assert_same_bits("new params", new, want)


# -------------------------------------------------------------------------------------------------------- clipping


def test_many_units_are_shared_by_all_segments_of_a_task(inner_update: InnerUpdateEmulator) -> None:
    # More than 64 blocks of 8 warps with 512 elements each, in two tensors; the last segment is not full.
    problem = make_update(1, shapes=[(200_000,), (120_001,)], clip_norm=3.0)
    assert_matches_reference(update(inner_update, problem), problem)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_squares_that_float32_cannot_hold(scale: float, inner_update: InnerUpdateEmulator) -> None:
    problem = make_update(2, shapes=[(40,)])
    grads = [g * scale for g in problem.grads]
    problem = replace(problem, grads=grads, clip_norm=scale)
    assert_matches_reference(update(inner_update, problem), problem)


def test_a_gradient_of_zero_or_as_long_as_allowed_is_left_alone(inner_update: InnerUpdateEmulator) -> None:
    grads = [torch.tensor([[0.0, 0.0], [3.0, 4.0]])]
    problem = Update([torch.ones(2, 2)], grads, rate=0.5, clip_norm=5.0)
    assert_same_bits("new params", update(inner_update, problem)[0], torch.tensor([[1.0, 1.0], [-0.5, -1.0]]))


# ------------------------------------------------------------------------------------------- tasks keep to themselves


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tasks_that_rest_keep_their_bits(dtype: torch.dtype, inner_update: InnerUpdateEmulator) -> None:
    problem = make_update(3, "per parameter", dtype, clip_norm=1.0, resting=(0, 2))
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for p in problem.params:
        p[0] = -0.0
        p[2] = torch.tensor(-1, dtype=integer).view(dtype)  # a NaN whose payload arithmetic does not keep
    for new, p in zip(update(inner_update, problem), problem.params, strict=True):
        assert_same_bits("resting tasks", new[[0, 2]], p[[0, 2]])


# -------------------------------------------------------------------------------------------------- determinism


def test_a_failed_call_is_named(inner_update: InnerUpdateEmulator) -> None:
    problem = make_update(2, clip_norm=1.0)
    calls = {
        1: "cudaGetDevice",
        2: "cudaDeviceGetAttribute(MultiProcessorCount)",
        4: "launch of inner_update's norm kernel",
        5: "launch of inner_update's kernel",
    }
    for call, name in calls.items():
        with pytest.raises(EmulationError) as caught:
            update(inner_update, problem, Device(fail_call=call, failure=209))
        assert (caught.value.error, caught.value.call) == (209, name)
    update(inner_update, problem, Device(fail_call=6, failure=209))  # there is no other call
