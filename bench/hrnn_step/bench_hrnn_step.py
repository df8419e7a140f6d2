"""pytest-benchmark of hrnn_step: forward and forward + backward, against the definition in PyTorch.

pytest bench/hrnn_step/bench_hrnn_step.py --benchmark-only --benchmark-group-by=group
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.hrnn_step.contenders import Problem, contenders

THREADS = 2
CELLS = {"10 x 1,000": (1000,) * 10, "4 x 25,000": (25_000,) * 4}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("provider", ["metakern", "eager"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("op", ["forward", "forward_backward"])
def test_hrnn_step(benchmark: BenchmarkFixture, op: str, cell: str, provider: str) -> None:
    benchmark.group = f"{op.replace('_', ' + ')}, {cell} coordinates"
    problem, contender = Problem.make(CELLS[cell], 1, 0), contenders(compiled=False)[provider]
    benchmark.pedantic(getattr(problem, op), (contender,), rounds=20, warmup_rounds=2)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["ns_per_coordinate"] = benchmark.stats.stats.median / sum(CELLS[cell]) * 1e9
