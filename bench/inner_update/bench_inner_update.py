"""pytest-benchmark of inner_update: forward and forward + backward, against a loop, torch._foreach and torch.compile.

pytest bench/inner_update/bench_inner_update.py --benchmark-only --benchmark-group-by=group
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.inner_update.contenders import Update, foreach, fused, loop, make_tensors
from bench.peers import compile_peer

THREADS = 2
#: T tasks, hidden units and layers of the adapted MLP: two tensors per layer.
PROBLEMS = ((1, 40, 2), (1, 40, 5), (25, 40, 3), (32, 256, 4))

PROVIDERS: dict[str, Update] = {
    "metakern": fused("cpp"),
    "loop": loop,
    "foreach": foreach,
    "compiled": compile_peer(loop),
}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch._dynamo.reset()  # else other lists count against torch.compile's recompilation limit
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("clip_norm", [None, 1.0], ids=["plain", "clipped"])
@pytest.mark.parametrize(("tasks", "hidden", "layers"), PROBLEMS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
def test_inner_update(
    benchmark: BenchmarkFixture,
    backward: bool,
    tasks: int,
    hidden: int,
    layers: int,
    clip_norm: float | None,
    provider: str,
) -> None:
    what = "forward + backward" if backward else "forward"
    benchmark.group = f"{what}, {'clipped, ' if clip_norm else ''}T = {tasks}, {layers} layers of {hidden}"
    params, grads, cotangents = (make_tensors(tasks, hidden, layers, seed) for seed in range(3))
    leaves = [x.requires_grad_(backward) for x in (*params, *grads)]
    update = PROVIDERS[provider]

    def call() -> None:
        updated = update(params, grads, clip_norm)
        if backward:
            torch.autograd.grad(updated, leaves, cotangents)

    elements = sum(p.numel() for p in params)
    iterations = max(1, min(50, 10**5 // elements))
    benchmark.pedantic(call, rounds=max(5, min(40, 10**7 // elements)), iterations=iterations, warmup_rounds=2)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["elements"] = elements
