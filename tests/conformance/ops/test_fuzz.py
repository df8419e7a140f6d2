"""Fuzzing the raw operators: malformed calls raise or compute; none crashes or returns uninitialised memory.

Each call is a valid one with one to three changes: shapes, dtypes, devices, strides, shared memory, empty tensors,
numbers out of range, lists of other lengths. A call that computes is made twice and must give the same bits, as results
from uninitialised memory would differ. tests/sanitizers/run.sh runs the same under AddressSanitizer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance.ops.raw_calls import COMPILED, arguments, operator, places, replaced, tensor_at

CALLS = 60  # per test

# Under the sanitizers a test takes twenty times as long.
SEEDS = [pytest.param(seed, marks=pytest.mark.sanitize if seed < 3 else ()) for seed in range(8)]

REFUSALS = (RuntimeError, TypeError, ValueError, IndexError, OverflowError)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64)

INTEGERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 5, 2**20, 2**31, 2**63 - 1)
FLOATS = (0.0, -1.0, 1e300, 5e-324, math.inf, -math.inf, math.nan)


# ------------------------------------------------------------------------------------------- changes of a tensor


def cut(rng: random.Random, x: Tensor) -> Tensor:
    if not x.dim():
        return x.reshape(1)
    axis = rng.randrange(x.dim())
    return x.narrow(axis, 0, rng.choice((0, max(0, x.shape[axis] - 1), min(1, x.shape[axis]))))


def grown(rng: random.Random, x: Tensor) -> Tensor:
    if not x.dim():
        return x.repeat(3)
    axis = rng.randrange(x.dim())
    return torch.cat([x, x], axis)


def other_rank(rng: random.Random, x: Tensor) -> Tensor:
    if not x.numel():
        return x[None]
    return rng.choice((x.flatten(), x[None], x[..., None], x.squeeze(), x.reshape(-1)[0]))


def other_strides(rng: random.Random, x: Tensor) -> Tensor:
    """The same numbers, in memory with gaps, transposed, or at an offset."""
    kind = rng.randrange(4)
    if kind == 0 and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 1 and x.dim():
        wide = torch.stack([x, x], -1)
        return wide[..., 0]
    if kind == 2:
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) if x.numel() else x
    return x[:1].expand(x.shape) if x.dim() and x.shape[0] else x


def other_dtype(rng: random.Random, x: Tensor) -> Tensor:
    return x.to(rng.choice(DTYPES))


def other_values(rng: random.Random, x: Tensor) -> Tensor:
    x = x.clone()
    if not x.numel():
        return x
    if x.dtype == torch.bool:
        return torch.full(x.shape, rng.choice((0, 2, 255)), dtype=torch.uint8).view(torch.bool)
    if x.dtype.is_floating_point:
        x.view(-1)[rng.randrange(x.numel())] = torch.tensor(rng.choice(FLOATS), dtype=torch.float64).to(x.dtype)
    else:
        x.view(-1)[rng.randrange(x.numel())] = rng.choice((-1, 3, 2**62, -(2**62)))
    return x


def kinds(rng: random.Random, x: Tensor) -> Tensor:
    kind = rng.randrange(5)
    if kind == 0:
        return x.to("meta")
    if kind == 1:
        return x.to_sparse() if x.dtype.is_floating_point else x
    if kind == 2:
        return x.detach().requires_grad_(x.dtype.is_floating_point)
    if kind == 3:
        return x.new_empty((0,))
    return torch._efficientzerotensor(x.shape, dtype=x.dtype) if x.dtype.is_floating_point else x


CHANGES: tuple[Callable[[random.Random, Tensor], Tensor], ...] = (
    cut,
    grown,
    other_rank,
    other_strides,
    other_dtype,
    other_values,
    kinds,
)


# --------------------------------------------------------------------------------------------- changes of a call


def change_tensor(rng: random.Random, args: list[Any]) -> list[Any]:
    place = rng.choice(list(places(args)))
    try:
        return replaced(args, place, rng.choice(CHANGES)(rng, tensor_at(args, place)))
    except RuntimeError:  # from torch: an earlier change made this one impossible
        return args


def share_memory(rng: random.Random, args: list[Any]) -> list[Any]:
    """Replace one tensor by another one or a view of it."""
    place, source = rng.choice(list(places(args))), rng.choice(list(places(args)))
    x, other = tensor_at(args, place), tensor_at(args, source)
    if x.dtype == other.dtype and 0 < x.numel() < other.numel() and other.is_contiguous() and not other.is_sparse:
        start = rng.randrange(other.numel() - x.numel() + 1)
        return replaced(args, place, other.view(-1)[start : start + x.numel()].view(x.shape))
    return replaced(args, place, other)


def change_list(rng: random.Random, args: list[Any]) -> list[Any]:
    lists = [index for index, value in enumerate(args) if isinstance(value, list)]
    if not lists:
        return change_tensor(rng, args)
    index = rng.choice(lists)
    values = args[index]
    new = [[], values[:-1], values[1:], [*values, *values[:1]], values * 9, values[::-1]]
    return [*args[:index], rng.choice(new), *args[index + 1 :]]


def change_number(rng: random.Random, args: list[Any]) -> list[Any]:
    numbers = [i for i, value in enumerate(args) if value is None or isinstance(value, (int, float))]
    if not numbers:
        return change_tensor(rng, args)
    index = rng.choice(numbers)
    value = args[index]
    if isinstance(value, bool):
        new: Any = not value
    elif value is None:
        new = rng.choice((1.0, -1.0, math.nan, torch.ones(3, dtype=torch.bool)))
    else:
        new = rng.choice(INTEGERS if isinstance(value, int) else FLOATS)
    return [*args[:index], new, *args[index + 1 :]]


STEPS = (change_tensor, change_tensor, change_tensor, share_memory, change_list, change_number)


def malformed(rng: random.Random, name: str) -> list[Any]:
    args = arguments(name, rng.randrange(20), tasks=rng.choice((1, 3, 17)), loss=rng.randrange(3))
    for _ in range(rng.choice((1, 1, 2, 3))):
        args = rng.choice(STEPS)(rng, args)
    return args


def flat(value: Any) -> list[Tensor]:
    """Every tensor of a result or of arguments."""
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in flat(part)] if isinstance(value, (list, tuple)) else []


def is_plain(x: Tensor) -> bool:
    return x.layout == torch.strided and x.device.type == "cpu" and not x._is_zerotensor()


def bits(tensors: list[Tensor]) -> list[Tensor]:
    """Copies as bytes; tensors off the CPU as they are."""
    copies = [
        torch.empty(x.numel(), dtype=x.dtype).copy_(x.detach().reshape(-1)) if is_plain(x) else x for x in tensors
    ]
    return [copy.view(torch.uint8) if is_plain(copy) else copy for copy in copies]


def outcome(name: str, args: list[Any]) -> list[Tensor] | str:
    try:
        return flat(operator(name)(*args)) + (flat(args[:4]) if name.endswith("_") else [])
    except REFUSALS as error:
        return str(error)


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", COMPILED)
def test_malformed_calls_raise_or_compute(name: str, seed: int) -> None:
    computed = 0
    for call in range(CALLS):
        args, again = (malformed(random.Random(f"{name} {seed} {call}"), name) for _ in range(2))
        before = bits(flat(args))
        first, second = outcome(name, args), outcome(name, again)
        if not name.endswith("_") or isinstance(first, str):
            for x, kept in zip(bits(flat(args)), before, strict=True):
                assert not is_plain(x) or torch.equal(x, kept), "an argument was written to"
        if isinstance(first, str) or isinstance(second, str):
            assert first == second
            assert first, "an error without a message"
            continue
        computed += 1
        for x, y in zip(first, second, strict=True):
            assert x.shape == y.shape
            assert not is_plain(x) or torch.equal(*bits([x, y])), "results of the same call differ"
    assert 0 < computed < CALLS, "nothing was refused, or everything"
