"""pytest-benchmark of a meta-iteration of MAML with an MLP, against plain and compiled PyTorch.

pytest bench/mlp_inner_loop/bench_mlp_inner_loop.py --benchmark-only --benchmark-group-by=group
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import cycle

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.mlp_inner_loop.cases import Case, embedding, sinusoid
from bench.mlp_inner_loop.contenders import iterate, make_contender

THREADS = 2
BATCHES = 3
CASES = (sinusoid(), sinusoid(first_order=True), embedding())


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch._dynamo.reset()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("provider", ["metakern", "vmap", "compiled", "loop"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_mlp_inner_loop(benchmark: BenchmarkFixture, case: Case, provider: str) -> None:
    benchmark.group = case.title
    contender = make_contender(provider, case, {})
    assert contender is not None
    calls = cycle([partial(iterate, contender, case.batch(seed)) for seed in range(BATCHES)])
    benchmark.pedantic(lambda: next(calls)(), rounds=20, warmup_rounds=BATCHES)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["gflops_per_second"] = case.flops() / benchmark.stats.stats.median / 1e9
