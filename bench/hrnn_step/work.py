"""FLOPs, functions and bytes of one step of the hierarchical RNN, and the floor that this machine sets for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench import machine

HIDDEN, SCALES, FEATURES, ROWS = 10, 4, 12, 21

#: Exponentials, logarithms, roots, quotients and the like per coordinate: 32 gates and decays, 13 of the features.
FUNCTIONS = 45

#: FLOPs of backward in multiples of forward: recomputed forward, gradients of inputs, gradients of weights.
BACKWARD_FORWARDS = 3

#: Bytes that the graph keeps per coordinate and step in float32: state, gradient and step.
KEPT_BYTES = 4 * (ROWS + 2)


def flops_per_coordinate() -> int:
    """FLOPs of the products of one forward step: gates, candidate, four readouts, the normalised gradients' weights."""
    return 2 * (3 * HIDDEN * (FEATURES + HIDDEN) + 4 * HIDDEN + SCALES)


def bytes_per_coordinate() -> int:
    """Bytes of one forward step in float32: state read and written, param read and written, gradient read."""
    return 4 * (2 * ROWS + 3)


@dataclass(frozen=True)
class Speeds:
    """What this machine reached in this run, with the run's threads."""

    gflops: float  # of a large float32 matrix product
    exp_ns: float  # torch.exp per element, in the cache
    gigabytes_per_second: float  # of a copy far larger than the caches, read and written bytes counted

    @classmethod
    def measure(cls, size: int) -> Speeds:
        """Measure the three; ``size`` is that of the matrix product."""
        small = torch.randn(16 * 1024 * torch.get_num_threads())
        large = torch.randn(max(2 * machine.last_level_cache_bytes() // 4, size))
        exps, copied = torch.empty_like(small), torch.empty_like(large)
        exp = _best_seconds(lambda: torch.exp(small, out=exps), 200)
        copy = _best_seconds(lambda: copied.copy_(large), 10)
        return cls(machine.sgemm_gflops(size), exp / small.numel() * 1e9, 2 * large.nbytes / copy / 1e9)

    def floor_ns(self, *, backward: bool = False) -> float:
        """Floor per coordinate: products and functions, or the traffic if that takes longer.

        Backward recomputes the functions once, reads the state, its incoming gradient and the gradient, and writes the
        gradients of both.
        """
        flops = flops_per_coordinate() * (1 + BACKWARD_FORWARDS * backward)
        arithmetic = flops / self.gflops + FUNCTIONS * (1 + backward) * self.exp_ns
        traffic = bytes_per_coordinate() + backward * 4 * (3 * ROWS + 4)
        return max(arithmetic, traffic / self.gigabytes_per_second)

    def describe(self) -> dict[str, Any]:
        """The speeds by name."""
        return asdict(self)


def _best_seconds(work: Callable[[], Any], rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds + 2):  # two of them warm up
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
