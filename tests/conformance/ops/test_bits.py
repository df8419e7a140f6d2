"""Bitwise reproducibility: across thread counts, runs, schedules and views, and next to non-finite units."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.conformance.ops.implementations import (
    ALL,
    CPP,
    CUDA,
    EMULATED,
    KERNELS,
    PUBLIC,
    Implementation,
    assert_all_same_bits,
    bits,
    expected,
    rows,
    seeds,
    total,
    with_gradients,
)
from tests.conformance.ops.operators import Example, Operator
from tests.conftest import assert_same_bits
from tests.cuda.device import Device

F32 = torch.float32

# ------------------------------------------------------------------------------------------ threads and schedules


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float64], ids=str)
@rows([CPP], sanitize=True)
def test_threads_and_runs_change_no_bit(op: Operator, by: Implementation, dtype: torch.dtype, threads: None) -> None:
    if not op.serves(by.kind, dtype):
        pytest.skip(f"{by} does not serve {dtype}")
    example, outcomes = op.make(dtype, **op.spread), []
    for count in (1, 2, 3, 8, 8):
        torch.set_num_threads(count)
        outcomes.append(bits(op, example, by))
    for other in outcomes[1:]:
        assert_all_same_bits(other, outcomes[0], "by other threads")


@rows([by for by in PUBLIC if by.kind not in ("cpp", "reference")])
def test_two_runs_give_the_same_bits(op: Operator, by: Implementation) -> None:
    example = op.make(F32, **(op.spread if by.device == "cuda" else op.small)).to(by.device)
    assert_all_same_bits(bits(op, example, by), bits(op, example, by), "of the second run")


@pytest.mark.parametrize(
    "device",
    [
        Device(multiprocessors=132),
        Device(multiprocessors=1, order="reverse", eager_copies=True),
        Device(multiprocessors=2, order="shuffled", seed=1),
        Device(order="shuffled", seed=2, eager_copies=True),
    ],
    ids=lambda device: f"{device.order}-{device.seed}-{device.multiprocessors}",
)
@rows([EMULATED])
def test_schedules_change_no_bit(op: Operator, by: Implementation, device: Device) -> None:
    # Detects a missing barrier: a thread then reads before another has written, or after it has overwritten.
    example = op.make(F32, **op.scheduled)
    assert_all_same_bits(bits(op, example, by, device), bits(op, example, by), f"on {device}")


# ---------------------------------------------------------------------------------------------------------- views


def shifted(x: Tensor) -> Tensor:
    """The same numbers one element behind the start of an allocation: contiguous, not aligned to 16 bytes."""
    memory = torch.cat([x.new_zeros(1), x.reshape(-1)])
    return memory[1:].view(x.shape)


def strided(x: Tensor) -> Tensor:
    """The same numbers with gaps between them."""
    return torch.stack([x, x.flip(0) if x.dim() else x + 1], -1)[..., 0]


def turned(x: Tensor) -> Tensor:
    """The same numbers with reversed axis order in memory."""
    axes = tuple(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


@pytest.mark.parametrize("change", [shifted, strided, turned], ids=lambda change: change.__name__)
@rows(KERNELS, sanitize=True)  # not the reference: PyTorch's matrix products depend on the layout
def test_views_give_the_same_bits(op: Operator, by: Implementation, change: Callable[[Tensor], Tensor]) -> None:
    if by.kind == "interpreted" and change is not strided:
        pytest.skip("Triton's kernels get contiguous copies; the interpreter takes its time")
    example = op.make(F32, **op.viewed).to(by.device)
    names = op.leaves(example)

    def outcome(moved: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        def start(results: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: moved(x) for name, x in seeds(results).items()}

        view = example.map(lambda _, x: moved(x))
        results, gradients = with_gradients(op, view, lambda leaves: op.call(leaves, by.backend), start, names)
        return results | {f"gradient of {n}": op.visible(n, x, example) for n, x in gradients.items()}

    plain = outcome(lambda x: x)
    assert_all_same_bits(outcome(change), plain, f"of {change.__name__} tensors")


# ----------------------------------------------------------------------------------------- what is not finite stays


def others(x: Tensor, axis: int, unit: int) -> Tensor:
    return x.index_select(axis, torch.tensor([i for i in range(x.shape[axis]) if i != unit], device=x.device))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@rows(ALL)
def test_what_is_not_finite_stays_with_its_unit(op: Operator, by: Implementation, value: float) -> None:
    slow = by.kind == "interpreted"
    if slow and math.isinf(value):
        pytest.skip("the interpreter takes its time")
    for sizes, units in op.isolated[:1] if slow else op.isolated:
        if by.kind in ("interpreted", "emulated"):
            sizes, units = op.fewer(sizes, units)
        example = op.make(F32, **sizes).to(by.device)
        clean = bits(op, example, by)
        spoilable = [n for n, x in example.tensors.items() if x.is_floating_point() and x.numel()]
        for name in (n for n in spoilable if op.unit_axis(n, example) is not None):
            for unit in units:
                spoiled = op.spoil(name, example.tensors[name], unit, value, example)
                dirty = bits(op, Example(example.tensors | {name: spoiled}, example.options), by)
                shown = assert_contained(op, example, clean, dirty, unit, f"{name}[{unit}] = {value}")
                assert shown or (math.isinf(value) and name in op.hides_infinity), f"no result shows {value} of {name}"


def assert_contained(
    op: Operator, example: Example, clean: dict[str, Tensor], dirty: dict[str, Tensor], unit: int, what: str
) -> bool:
    """Fail if other units' bits differ; returns whether the spoiled unit's result is not finite."""
    seen = False
    for name, x in dirty.items():
        axis = op.unit_axis(name.removeprefix("gradient of "), example)
        if axis is None:
            continue
        pair = (others(y, axis, unit) for y in (x, clean[name]))
        assert_same_bits(f"{name} of the others where {what}", *pair)
        if not name.startswith("gradient"):
            seen |= not bool(x.select(axis, unit).isfinite().all())
    return seen


# ---------------------------------------------------------------------------------------------- the caller's memory


@rows(PUBLIC, sanitize=True)
def test_the_callers_tensors_are_untouched_and_results_have_memory_of_their_own(
    op: Operator, by: Implementation
) -> None:
    example = op.make(F32, **op.viewed).to(by.device)
    leaves = example.map(lambda name, x: x.clone().requires_grad_(name in op.leaves(example)))
    before = {name: (x.detach().clone(), x._version) for name, x in leaves.tensors.items()}
    results = op.call(leaves, by.backend)
    total(results).backward()
    for x in results.values():
        x.detach().fill_(7)
    for name, x in leaves.tensors.items():
        old, version = before[name]
        if x.is_floating_point():
            assert_same_bits(name, x, old)
        else:
            assert torch.equal(x, old), name
        assert x._version == version, f"{name} has another version"


@rows([CPP, CUDA])
def test_without_a_graph_the_results_have_the_same_bits(op: Operator, by: Implementation) -> None:
    example = op.make(F32, **op.viewed).to(by.device)
    with torch.no_grad():
        plain = op.call(example, by.backend)
    recorded = op.call(example.map(lambda name, x: x.clone().requires_grad_(name in op.leaves(example))), by.backend)
    for name, x in plain.items():
        assert not x.requires_grad
        assert_same_bits(name, recorded[name], x)
    assert all(torch.isfinite(x).all() for x in expected(op, example, plain)[0].values())
