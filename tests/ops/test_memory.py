"""Memory of the compiled operators: constant over many steps, none for unused outputs, clear errors."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import metakern
from metakern.core import backend as _backend
from metakern.ops import LSTMState, inner_update, lstm_step

pytestmark = pytest.mark.skipif(not _backend.is_compiled(), reason="the memory is that of the compiled kernels")

MIB = 2**20


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def meta_step() -> Callable[[], object]:
    net = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))
    x, y = torch.randn(4, 5, 1), torch.randn(4, 5, 1)

    def step() -> None:
        metakern.meta_backward(net, (x, y), (x, y), steps=2, lr=0.1)
        net.zero_grad()

    return step


def lstm() -> Callable[[], object]:
    weights = metakern.rules.CoordinatewiseLSTM(4, 1).weights()
    params, state = torch.ones(2100, requires_grad=True), LSTMState.zeros(2100, hidden_size=4, num_layers=1)
    assert state.data.numel() * 4 > 2**16  # it comes from the cache of results

    def step() -> None:
        lstm_step(params, params.detach(), state, weights, backend="cpp")[0].sum().backward()

    return step


def update() -> Callable[[], object]:
    params, grads = [torch.ones(3, 20)], [torch.ones(3, 20)]
    return lambda: inner_update(params, grads, 0.1, clip_norm=1.0, backend="cpp")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own account of memory")
@pytest.mark.parametrize("make", [meta_step, lstm, update])
def test_memory_is_flat_over_20_000_steps(make: Callable[[], Callable[[], object]]) -> None:
    step = make()
    for _ in range(2_000):
        step()
    gc.collect()
    before = resident()
    for _ in range(20_000):
        step()
    gc.collect()
    assert resident() - before < 2 * MIB  # 100 bytes a step would be as much


def run_in(megabytes: int, code: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that may reserve so much memory beyond what torch takes."""
    head = f"""
    import resource, torch, metakern
    from torch import nn
    torch.set_num_threads(2)
    torch.zeros(200_000).add_(1)  # the threads, with their stacks
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + {megabytes} * 2**20,) * 2)
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    x, y = torch.ones(32, 2, 1), torch.ones(32, 2, 1)
    """
    command = [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_adaptation_without_a_way_back_keeps_no_parameters_of_its_steps() -> None:
    # 100,000 times the parameters are 700 MB for a single task.
    code = """
    from metakern.ops import mlp_inner_loop
    params = list(net.parameters())
    with torch.no_grad():
        metakern.adapt(net, x, y, steps=100_000, lr=1e-6, backend="cpp")
        print("adapted")
        mlp_inner_loop(params, x, y, lr=1e-6, steps=100_000, backend="cpp")
        print("adapted")
    """
    result = run_in(512, code)
    assert result.stdout.split() == ["adapted", "adapted"], result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_out_of_memory_in_a_parallel_region_keeps_its_reason() -> None:
    code = """
    try:
        metakern.meta_loss(net, (x, y), (x, y), steps=100_000, lr=1e-6, backend="cpp")
    except RuntimeError as error:
        print(error)
    assert metakern.meta_loss(net, (x, y), (x, y), steps=2, lr=1e-6, backend="cpp").isfinite().all()
    """
    result = run_in(512, code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("out of memory: could not allocate "), result.stdout
