"""Concurrent calls from several Python threads give the bits of sequential calls."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance.ops.raw_calls import COMPILED, arguments, operator
from tests.conformance.ops.test_fuzz import flat
from tests.conftest import assert_same_bits

THREADS, ROUNDS = 6, 30


def call(name: str, seed: int) -> Callable[[], list[Tensor]]:
    """Call an operator; in-place ones get copies."""
    tasks = 3 + seed * 7  # some in vector lanes

    def run() -> list[Tensor]:
        args: list[Any] = arguments(name, seed, tasks=tasks)
        results = flat(operator(name)(*args))
        return results if results else flat(args[:3])

    return run


@pytest.mark.parametrize("name", COMPILED)
def test_threads_change_no_bit(name: str) -> None:
    calls = [call(name, seed) for seed in range(4)]
    alone = [run() for run in calls]
    with ThreadPoolExecutor(THREADS) as pool:
        at_once = list(pool.map(lambda index: calls[index % 4](), range(THREADS * ROUNDS)))
    for index, results in enumerate(at_once):
        for got, want in zip(results, alone[index % 4], strict=True):
            assert_same_bits(f"call {index}", got, want)


def test_threads_that_share_their_arguments_change_no_bit() -> None:
    torch.manual_seed(0)
    args = arguments("mlp_meta_loss", 1, tasks=40)
    want = flat(operator("mlp_meta_loss")(*args))
    with ThreadPoolExecutor(THREADS) as pool:
        for results in pool.map(lambda _: flat(operator("mlp_meta_loss")(*args)), range(200)):
            for got, expected in zip(results, want, strict=True):
                assert_same_bits("result", got, expected)
