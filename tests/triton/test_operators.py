"""Operators around the kernels: schemas, fake kernels, torch.compile, and a missing Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from metakern.ops import lstm_step_
from tests.ops.lstm_step.triton_evaluation import options
from tests.problems import make_problem

NAMES = ("lstm_step_triton", "lstm_step_triton_", "lstm_step_triton_backward")


def arguments(name: str, dtype: torch.dtype, device: torch.device | str, n: int = 40) -> tuple[Any, ...]:
    problem = make_problem(n, 3, 2, dtype, device=device)
    state = problem.state.data
    tensors = (problem.params, state, problem.grads, state.clone()) if name.endswith("backward") else None
    return (*(tensors or (problem.params, problem.grads, state)), problem.weights, *options(problem))


@pytest.mark.parametrize("name", NAMES)
def test_fake_kernel_on_a_device_that_is_not_there(name: str) -> None:
    real = arguments(name, torch.float32, "cpu")

    def fake(x: Any) -> Any:
        if isinstance(x, list):
            return [fake(y) for y in x]
        return torch.empty(x.shape, dtype=x.dtype, device="cuda") if isinstance(x, torch.Tensor) else x

    with FakeTensorMode():
        outputs = getattr(torch.ops.metakern, name)(*(fake(x) for x in real))
    if name == "lstm_step_triton_":
        assert outputs is None
        return
    first = 2 if name.endswith("backward") else 0
    expected = [real[first], real[3 if first else 2], *(real[4] if first else [])]
    got = [outputs[0], outputs[1], *(outputs[2] if first else [])]
    for x, like in zip(got, expected, strict=True):
        assert (x.shape, x.dtype, x.device.type) == (like.shape, like.dtype, "cuda")


TRACE = """
import torch, triton
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget

class Driver:  # what tracing asks of a GPU
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0

triton.runtime.driver.set_active(Driver())

class Traced(Exception): pass

def show(graph, _):
    for node in graph.graph.nodes:
        if node.op == "call_function" and "getitem" not in str(node.target):
            print(node.target, node.kwargs.get("tensors_to_clone", ""))
    raise Traced

def trace(function, *inputs):
    print(function.__name__)
    try:
        torch.compile(function, backend=aot_autograd(fw_compiler=show), fullgraph=True)(*inputs)
    except Exception as error:
        assert "Traced" in repr(error), error
"""

LSTM_STEP = """
from metakern.ops.lstm_step import prepare
from tests.problems import make_problem

prepare("triton")
problem = make_problem(100, 5, 2)
inputs = (problem.params, problem.grads, problem.state.data, problem.weights)

def forward(p, g, s, w):
    return torch.ops.metakern.lstm_step_triton(p, g, s, w, 1, 10.0, 0.1, 0)
def in_place(p, g, s, w):
    torch.ops.metakern.lstm_step_triton_(p, g, s, w, 1, 10.0, 0.1, 0)
def backward(p, g, s, w):
    return torch.ops.metakern.lstm_step_triton_backward(p, s, g, s, w, 1, 10.0, 0.1, 0)

for function in (forward, in_place, backward):
    trace(function, *inputs)
"""

INNER_UPDATE = """
import metakern.ops.inner_update.triton
from tests.update_problems import make_update

problem = make_update(2, "per parameter", shapes=[(3, 2), (5,)], resting=(1,))

def plain(params, grads, lr, active):
    return torch.ops.metakern.inner_update_triton(params, grads, lr, 0.3, -1, None, None)
def clipped(params, grads, lr, active):
    return torch.ops.metakern.inner_update_triton(params, grads, lr, 0.3, -1, 1.0, active)

for function in (plain, clipped):
    trace(function, problem.params, problem.grads, problem.lr, problem.active)
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_compile_sees_the_forward_kernel_and_what_it_writes() -> None:
    result = run_python(TRACE + LSTM_STEP)
    assert result.returncode == 0, result.stderr
    written = "triton_kernel_wrapper_functional ['new_params', 'new_state']"
    assert result.stdout.splitlines() == [
        *("forward", "aten.empty_like.default ", "aten.empty_like.default ", written),
        *("in_place", written),
        *("backward", "metakern.lstm_step_triton_backward.default "),
    ]


def test_compile_sees_every_kernel_of_inner_update() -> None:
    result = run_python(TRACE + INNER_UPDATE)
    assert result.returncode == 0, result.stderr
    kernels = [line.split()[-1] for line in result.stdout.splitlines() if "aten" not in line]
    update, sums, factors = "['updated']", "['sums']", "['coefficients']"
    assert kernels == ["plain", update, update, "clipped", sums, sums, factors, update, update]


def test_metakern_works_without_triton_and_says_what_is_missing() -> None:
    code = "import sys, torch; sys.modules['triton'] = None; import metakern; "
    call = "metakern.ops.inner_update([torch.ones(2)], [torch.ones(2)], 0.1"
    assert run_python(f"{code}{call})").returncode == 0
    result = run_python(f"{code}{call}, backend='triton')")
    assert "backend 'triton' cannot run: Triton is not installed (pip install 'metakern[triton]')" in result.stderr
    assert run_python("import sys, metakern; sys.exit('triton' in sys.modules)").returncode == 0


def test_in_place_refuses_memory_that_is_shared(device: torch.device) -> None:
    problem = make_problem(64, 3, 1, device=device)
    state, memory = problem.state, torch.zeros(65, device=device)
    with pytest.raises(RuntimeError, match="grads must not share a part of params' memory"):
        lstm_step_(memory[:64], memory[1:], state, problem.weights, backend="triton")
    with pytest.raises(RuntimeError, match="params, grads and state must not share memory"):
        lstm_step_(state.data.view(-1)[:64], problem.grads, state, problem.weights, backend="triton")
    assert not memory.any()
    lstm_step_(memory[:64], memory[:64], state, problem.weights, backend="triton")
    assert memory[:64].all()
