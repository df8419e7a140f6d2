"""Threads that call meta_backward on one model, or backward() beside it: no gradient is lost."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from metakern import _fused_inner_loop, meta_loss
from metakern.maml import meta_backward
from tests.conftest import assert_close
from tests.inner_loops import mlp, regression

pytestmark = pytest.mark.usefixtures("one_thread")

THREADS, ROUNDS = 4, 30

SETS = regression(1, 1, 1, 2, 1)


@pytest.fixture
def switches() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def directly(net: nn.Module) -> None:
    meta_backward(net, SETS.support, SETS.query, lr=0.1)


def by_autograd(net: nn.Module) -> None:
    meta_loss(net, SETS.support, SETS.query, lr=0.1).mean().backward()


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("others", [directly, by_autograd])
def test_gradients_of_all_threads_add_up(others: Callable[[nn.Module], None]) -> None:
    net = mlp(2, 512, 512, 1)  # so large that additions overlap
    directly(net)
    net.zero_grad()
    directly(net)  # without a graph, as the kind of call is known now
    once = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    together, lost = threading.Barrier(THREADS), []

    def run(call: Callable[[nn.Module], None], first: bool) -> None:
        for _ in range(ROUNDS):
            together.wait()
            if first:
                net.zero_grad()
            together.wait()
            call(net)
            together.wait()
            if first:
                pairs = zip(net.parameters(), once, strict=True)
                lost.append(max(float((p.grad / THREADS - g).abs().max()) for p, g in pairs if p.grad is not None))

    calls = [directly if index % 2 else others for index in range(THREADS)]
    threads = [threading.Thread(target=run, args=(call, index == 0)) for index, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lost) == ROUNDS
    assert max(lost) < 1e-12, f"gradients are lost in {sum(x > 1e-12 for x in lost)} of {ROUNDS} rounds"


def test_a_thread_that_is_not_the_first_of_its_process_accumulates_under_a_mutex(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, taken = mlp(2, 4, 1), []
    directly(net)
    backward = torch.autograd.backward
    monkeypatch.setattr(torch.autograd, "backward", lambda *a: (taken.append(1), backward(*a)))
    alone = len(sys._current_frames()) == 1
    directly(net)
    assert len(taken) == (not alone)
    thread = threading.Thread(target=directly, args=(net,))
    thread.start()
    thread.join()
    assert len(taken) == (not alone) + 1


def test_one_thread_and_several_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for count in (1, 2):
        monkeypatch.setattr(_fused_inner_loop.sys, "_current_frames", lambda count=count: range(count))
        net = mlp(2, 4, 1)
        net[0].weight = nn.Parameter(net[0].weight.detach())
        for _ in range(3):
            directly(net)
        results.append([p.grad for p in net.parameters()])
        assert all(p.grad is not None and p.grad.stride() == p.stride() for p in net.parameters())
    for a, b in zip(*results, strict=True):
        assert_close("gradient", a, b, 1e-13)
