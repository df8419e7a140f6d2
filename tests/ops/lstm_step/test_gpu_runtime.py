"""lstm_step among torch's machinery for GPUs: streams, graphs, devices, compilation, transforms, bad input, memory."""

from __future__ import annotations

import gc
import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu_device import CudaDevice
from metakern.core import backend as _backend
from metakern.ops import LSTMState, lstm_step, lstm_step_, unpack_state
from tests.conftest import assert_close, assert_same_bits
from tests.gpu.common import BACKENDS, Arguments, assert_all_same_bits, captured, forward, needs_cuda
from tests.problems import evaluate, make_problem

pytestmark = needs_cuda

CALLS = ("forward", "in_place", "backward")
OPTIONS = (1, 10.0, 0.1, 0)  # log_sign, its scale, output scale, highest precision


def arguments(n: int, backend: str, call: str, seed: int = 0, hidden: int = 20) -> Arguments:
    problem = make_problem(n, hidden, 2, seed=seed, device="cuda")
    return Arguments(problem, backend, requires_grad=call == "backward")


# ------------------------------------------------------------------------------------------- launches and graphs


def test_auto_takes_the_kernels_in_cuda() -> None:
    assert _backend.resolve("auto", torch.device("cuda")) == "cuda"
    problem = make_problem(77, device="cuda")
    for name, x in forward(problem, "auto").items():
        assert_same_bits(name, x, forward(problem, "cuda")[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", ["forward", "in_place"])
def test_one_launch(call: str, backend: str) -> None:
    each = arguments(10_000, backend, call)
    assert CudaDevice().launches(getattr(each, call)) == 1


@pytest.mark.parametrize(("backend", "hidden"), [("cuda", 20), ("cuda", 7), ("triton", 20)])
@pytest.mark.parametrize("call", CALLS)
def test_a_replayed_graph_equals_the_call_on_changed_inputs(call: str, hidden: int, backend: str) -> None:
    n = 5003
    kept = arguments(n, backend, call, hidden=hidden)
    graph, results = captured(getattr(kept, call))
    for seed in (1, 2, 1):
        fresh = arguments(n, backend, call, seed, hidden)
        kept.copy_(fresh)
        expected = getattr(fresh, call)()
        graph.replay()
        torch.cuda.synchronize()
        assert_all_same_bits(results, expected, f"{call} replayed")


# ------------------------------------------------------------------------------------------- streams and devices


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_the_current_stream_is_the_one_that_is_used(call: str, backend: str) -> None:
    # On that stream the inputs arrive late: a launch on another one would read the old numbers.
    kept, new = (arguments(20_000, backend, call, seed) for seed in (1, 2))
    expected = [x.clone() for x in getattr(arguments(20_000, backend, call, 2), call)()]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        kept.copy_(new)
        results = getattr(kept, call)()
    torch.cuda.synchronize()
    assert_all_same_bits(results, expected, call)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_two_streams_at_once(call: str, backend: str) -> None:
    seeds = (1, 2)
    expected = [[x.clone() for x in getattr(arguments(60_000, backend, call, s), call)()] for s in seeds]
    for _ in range(5):
        each = [arguments(60_000, backend, call, s) for s in seeds]
        streams = [torch.cuda.Stream() for _ in seeds]
        torch.cuda.synchronize()
        results = []
        for one, stream in zip(each, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(getattr(one, call)())
        torch.cuda.synchronize()
        for got, want in zip(results, expected, strict=True):
            assert_all_same_bits(got, want, f"{call} beside another stream")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_device_that_is_not_the_current_one(backend: str) -> None:
    first, second = (evaluate(make_problem(1025, device=f"cuda:{index}"), backend) for index in (0, 1))
    assert torch.cuda.current_device() == 0
    for name, x in (first[0] | first[1]).items():
        got = (second[0] | second[1])[name]
        assert got.device == torch.device("cuda:1")
        assert_same_bits(name, got.to("cuda:0"), x)


DEVICES_MIXED = {
    "grads": "grads must be on the device of params, cuda:0, got cpu",
    "state": "state must be on the device of params, cuda:0, got cpu",
    "weights": "weights[9] (head.bias) must be on the device of params, cuda:0, got cpu",
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [lstm_step, lstm_step_])
@pytest.mark.parametrize("name", DEVICES_MIXED)
def test_tensors_on_different_devices_are_named(name: str, step: Callable[..., Any], backend: str) -> None:
    problem = make_problem(77, device="cuda")
    call: dict[str, Any] = {"grads": problem.grads, "state": problem.state, "weights": problem.weights}
    if name == "weights":
        call[name] = [*problem.weights[:9], problem.weights[9].cpu()]
    else:
        call[name] = call[name].to("cpu")
    params, before = problem.params.clone(), call["state"].data.clone()
    with pytest.raises(RuntimeError, match="^" + re.escape(DEVICES_MIXED[name])):
        step(params, **call, backend=backend)
    assert_same_bits("params", params, problem.params)
    assert_same_bits("state", call["state"].data, before)


def test_the_operator_itself_guards_against_another_device() -> None:
    problem = make_problem(77, device="cuda")
    data = problem.state.data
    for call, message in (
        (
            (problem.params.cpu(), problem.grads, data, problem.weights),
            "grads must be on the device of params, cpu, got",
        ),
        ((problem.params, problem.grads, data.cpu(), problem.weights), "state must be on the device of params, cuda:0"),
        (
            (problem.params, problem.grads, data, [w.cpu() for w in problem.weights]),
            r"weights\[0\] \(weight_ih_l0\) must be on the device of params, cuda:0, got cpu",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.metakern.lstm_step(*call, *OPTIONS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_on_the_cpu_are_refused(backend: str) -> None:
    with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run: .* serve tensors on cuda"):
        make_problem(77).run(backend=backend)


def test_a_device_that_the_kernels_were_not_compiled_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_ARCHITECTURES", [_backend.Architecture.parse("99.0")])
    number = ".".join(map(str, torch.cuda.get_device_capability()))
    message = f"cuda:0 has compute capability {number}, metakern was built for {_backend._C.cuda_architectures}"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        make_problem(77, device="cuda:0").run(backend="cuda")
    assert _backend.resolve("auto", torch.device("cuda:0")) == "triton"


# -------------------------------------------------------------------------------------------------- out of memory


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_of_memory_raises_and_leaves_the_arguments_alone(backend: str) -> None:
    gc.collect()  # what earlier tests left in the allocator would serve the call that must fail
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    n = 10**6
    problem = make_problem(n, device="cuda")
    leaves = [x.clone().requires_grad_() for x in (problem.params, problem.grads, problem.state.data)]
    before = [x.detach().clone() for x in leaves]
    state = LSTMState(leaves[2], n)
    new_params, new_state = lstm_step(*leaves[:2], state, problem.weights, backend=backend)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**26) / total)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):  # the new state takes 320 MB, 64 are left
            lstm_step(*leaves[:2], state, problem.weights, backend=backend)
        with pytest.raises(RuntimeError, match="out of memory"):
            torch.autograd.grad(new_params.sum() + new_state.data.sum(), leaves)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for index, (x, old) in enumerate(zip(leaves, before, strict=True)):
        assert_same_bits(f"argument {index}", x, old)
    again, again_state = lstm_step(*leaves[:2], state, problem.weights, backend=backend)
    assert_same_bits("new params afterwards", again, new_params)
    assert_same_bits("new state afterwards", again_state.data, new_state.data)


# ------------------------------------------------------------------------------------- compilation and transforms


def two_steps(
    params: Tensor, grads: Tensor, state: LSTMState, weights: list[Tensor], backend: str
) -> tuple[Tensor, LSTMState]:
    params, state = lstm_step(params, grads, state, weights, backend=backend)
    return lstm_step(params, grads * 0.5, state, weights, preprocess="log_and_clip", backend=backend)


def gradients_of(step: Callable[..., Any], n: int, backend: str) -> list[Tensor]:
    problem = make_problem(n, 5, 2, device="cuda")
    leaves = [x.clone().requires_grad_() for x in (problem.params, problem.grads, problem.state.data)]
    weights = [w.clone().requires_grad_() for w in problem.weights]
    params, state = step(leaves[0], leaves[1], LSTMState(leaves[2], n), weights, backend)
    h, c = unpack_state(state)
    loss = params.square().sum() + h.square().sum() + c.square().sum()
    gradients = torch.autograd.grad(loss, [*leaves, *weights])
    return [params, h, c, *gradients[:2], *unpack_state(LSTMState(gradients[2], n)), *gradients[3:]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_in_one_graph_equals_eager(mode: str, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(two_steps, fullgraph=True, mode=mode)
    for _ in range(3 if mode == "reduce-overhead" else 1):  # its third call replays a CUDA graph
        torch.compiler.cudagraph_mark_step_begin()
        got = [x.clone() for x in gradients_of(compiled, 33, backend)]
    for index, (x, want) in enumerate(zip(got, gradients_of(two_steps, 33, backend), strict=True)):
        assert_close(f"result {index}", x, want, 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_in_place_equals_eager(backend: str) -> None:
    torch._dynamo.reset()
    problem = make_problem(33, device="cuda")

    def run(params: Tensor, state: LSTMState) -> Tensor:
        lstm_step_(params, problem.grads, state, problem.weights, backend=backend)
        return params * 2

    expected, expected_state = problem.params.clone(), problem.state
    doubled = run(expected, expected_state)
    params, state = problem.params.clone(), problem.state
    got = torch.compile(run, fullgraph=True)(params, state)
    for name, a, b in (("result", got, doubled), ("params", params, expected)):
        assert_close(name, a, b, 2e-6)
    for name, a, b in zip("hc", unpack_state(state), unpack_state(expected_state), strict=True):
        assert_close(name, a, b, 2e-6)


OPERATORS = {"cuda": "lstm_step", "triton": "lstm_step_triton"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("suffix", ["", "_", "_backward"])
def test_opcheck(suffix: str, backend: str) -> None:
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs the package expecttest")
    if backend == "triton":
        importlib.import_module("metakern.ops.lstm_step.triton")
    operator = getattr(torch.ops.metakern, OPERATORS[backend] + suffix).default
    problem = make_problem(33, 5, 2, device="cuda")
    tensors = [x.clone() for x in (problem.params, problem.grads, problem.state.data)]
    weights = [w.clone() for w in problem.weights]
    if suffix == "":
        for x in (*tensors, *weights):
            x.requires_grad_()
    if suffix == "_backward":
        params, grads, state = tensors
        tensors = [torch.randn_like(params), torch.randn_like(state), grads, state]
    torch.library.opcheck(operator, (*tensors, weights, *OPTIONS))
