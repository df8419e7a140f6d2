"""inner_update on a GPU: against the float64 reference, bits, launches, graphs, streams, devices, 64-bit addressing.

Without a GPU test_cuda.py runs the same CUDA kernels, test_triton.py the same Triton kernels.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu_device import CudaDevice
from tests.conftest import FORWARD_TOLERANCE, assert_close, assert_same_bits
from tests.gpu.common import BACKENDS, assert_all_same_bits, captured, needs_cuda
from tests.update_problems import RATES, Update, make_update

pytestmark = needs_cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def on_device(*args: Any, **options: Any) -> Update:
    return make_update(*args, device="cuda", **options)


def assert_matches_reference(problem: Update, backend: str) -> None:
    expected = problem.expected(torch.float64)
    for index, (new, want, p) in enumerate(zip(problem.run(backend), expected, problem.params, strict=True)):
        assert (new.dtype, new.device) == (p.dtype, p.device)
        assert_close(f"tensor {index}", new, want, FORWARD_TOLERANCE[p.dtype])


# ------------------------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rates", RATES)
def test_bits_are_pytorchs_where_nothing_is_clipped(rates: str, dtype: torch.dtype) -> None:
    problem = on_device(2, rates, dtype)
    for new, want in zip(problem.run("cuda"), problem.expected(), strict=True):
        assert_same_bits("new params", new, want.to(dtype))


# ------------------------------------------------------------------------------------------- memory and determinism


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tasks_that_rest_keep_their_bits(dtype: torch.dtype, backend: str) -> None:
    problem = on_device(3, dtype=dtype, clip_norm=1.0, resting=(0, 2))
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for p in problem.params:
        p[0] = -0.0
        p[2] = torch.tensor(-1, dtype=integer).view(dtype)
    for new, p in zip(problem.run(backend), problem.params, strict=True):
        assert_same_bits("resting tasks", new[[0, 2]], p[[0, 2]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_two_to_the_31_elements(backend: str) -> None:
    # A product of two 32-bit sizes would wrap: the first and the last elements of both tasks are compared.
    n = 2**30 + 37
    needed, free = 16 * 2**30, torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory, {free >> 30} GiB are free")
    ends = torch.cat([torch.arange(64), torch.arange(n - 101, n)]).cuda()
    few = on_device(2, "per parameter", torch.float16, shapes=[(len(ends),)])
    params, grads = (torch.full((2, n), 0.5, dtype=torch.float16, device="cuda") for _ in range(2))
    rates = torch.full((n,), 0.5, dtype=torch.float16, device="cuda")
    params[:, ends], grads[:, ends], rates[ends] = few.params[0], few.grads[0], few.lr[0]
    assert params.numel() > 2**31
    new = replace(few, params=[params], grads=[grads], lr=[rates]).run(backend)[0]
    assert_same_bits("both ends", new[:, ends], few.run(backend)[0])
    middle = new[:, 64 : n - 101]
    assert bool((middle == 0.25).all()), "elements with equal inputs came out different"


# ------------------------------------------------------------------------------------------- launches, graphs, streams


@pytest.mark.parametrize(("clip_norm", "launches"), [(None, 1), (2.0, 2)])
def test_one_launch_for_the_whole_list_or_two_with_clipping(clip_norm: float | None, launches: int) -> None:
    problem = on_device(3, "per parameter", clip_norm=clip_norm, resting=(1,))
    assert CudaDevice().launches(lambda: problem.run("cuda")) == launches


def copy_(kept: Update, other: Update) -> None:
    """Take the numbers of another problem of the same sizes."""
    for xs, ys in ((kept.params, other.params), (kept.grads, other.grads), (kept.lr, other.lr)):
        for x, y in zip(xs, ys, strict=True):
            x.copy_(y)
    if kept.active is not None and other.active is not None:
        kept.active.copy_(other.active)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_replayed_graph_equals_the_call_on_changed_inputs(backend: str) -> None:
    def made(seed: int) -> Update:
        return on_device(3, "per parameter", clip_norm=2.0, resting=(seed % 3,), seed=seed)

    kept = made(0)
    graph, results = captured(lambda: kept.run(backend))
    for seed in (1, 2, 1):
        copy_(kept, made(seed))
        graph.replay()
        torch.cuda.synchronize()
        assert_all_same_bits(results, made(seed).run(backend), "a replayed graph")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_current_stream_is_the_one_that_is_used(backend: str) -> None:
    # On that stream the inputs arrive late: a launch on another one would read the old numbers.
    kept, new = (on_device(2, "per parameter", clip_norm=2.0, seed=seed) for seed in (1, 2))
    expected = [x.clone() for x in new.run(backend)]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        copy_(kept, new)
        results = kept.run(backend)
    torch.cuda.synchronize()
    assert_all_same_bits(results, expected, "another stream")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_device_that_is_not_the_current_one(backend: str) -> None:
    problem = make_update(2, "per parameter", clip_norm=2.0)
    first, second = (problem.to(f"cuda:{index}").run(backend) for index in (0, 1))
    assert torch.cuda.current_device() == 0
    assert {x.device for x in second} == {torch.device("cuda:1")}
    assert_all_same_bits([x.to("cuda:0") for x in second], first, "the second device")


# ----------------------------------------------------------------------------------------------------- bad input


def last_of_two_tasks(tensors: list[Tensor]) -> list[Tensor]:
    return [*tensors[:-1], tensors[-1][:2]]


BAD: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "grads must hold as many tensors as params, 8, got 7": (ValueError, {"grads": lambda xs: xs[1:]}),
    "lr[0] must be on the device of params[0], cuda:0, got cpu": (
        RuntimeError,
        {"lr": lambda xs: [x.cpu() for x in xs]},
    ),
    "grads[0] must have the dtype of its params, torch.float32, got torch.float64": (
        TypeError,
        {"grads": lambda xs: [x.double() for x in xs]},
    ),
    "params must have a leading axis of the 3 tasks": (
        ValueError,
        {"params": last_of_two_tasks, "grads": last_of_two_tasks},
    ),
    "params must have a leading axis of the 2 tasks": (ValueError, {"active": lambda x: x[:2]}),
    "clip_norm must be positive and finite, got -1": (ValueError, {"clip_norm": lambda _: -1.0}),
}


@pytest.mark.parametrize("message", BAD)
def test_a_direct_call_with_arguments_that_do_not_fit_raises(message: str) -> None:
    problem = on_device(3, "per parameter", clip_norm=1.0, resting=(1,))
    error, changes = BAD[message]
    bad = replace(problem, **{name: change(getattr(problem, name)) for name, change in changes.items()})
    with pytest.raises(error, match=re.escape(message)):
        bad.run("cuda")
