"""pytest-benchmark of lstm_step: forward and forward + backward, against plain and compiled PyTorch.

pytest bench/lstm_step/bench_lstm_step.py --benchmark-only --benchmark-group-by=group
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.lstm_step.contenders import Compiled, Contender, Eager, Fused, make_problem, make_rule

THREADS = 2
SIZES = (10**3, 10**4, 10**5, 10**6)
PROVIDERS: dict[str, Callable[..., Contender]] = {"metakern": Fused, "eager": Eager, "compiled": Compiled}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch._dynamo.reset()  # else other sizes count against torch.compile's recompilation limit
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
def test_lstm_step(benchmark: BenchmarkFixture, backward: bool, n: int, provider: str) -> None:
    benchmark.group = f"{'forward + backward' if backward else 'forward'}, N = {n}"
    rule = make_rule()
    contender = PROVIDERS[provider](rule)
    inputs = max(1, min(8, 10**6 // n))
    problems = [make_problem(contender, rule, n, seed, backward=backward) for seed in range(inputs)]
    calls = cycle([problem.forward_backward if backward else problem.forward for problem in problems])
    rounds = max(5, min(200, 2 * 10**6 // n))
    benchmark.pedantic(lambda: next(calls)(), rounds=rounds, warmup_rounds=inputs)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["ns_per_coordinate"] = benchmark.stats.stats.median / n * 1e9
