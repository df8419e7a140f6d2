"""Threads that call meta_backward on one model, or backward() beside it: no gradient is lost."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from metakern import meta_loss
from metakern.core import exclusive as _exclusive
from metakern.core.exclusive import exclusive
from metakern.inner_loop.engines import mlp as _fused_inner_loop
from metakern.maml import meta_backward
from tests.conftest import assert_close
from tests.inner_loops import mlp, regression

pytestmark = pytest.mark.usefixtures("one_thread")

THREADS, ROUNDS = 4, 30

SETS = regression(1, 1, 1, 2, 1)


@pytest.fixture
def switches() -> Iterator[None]:
    """Make threads switch as often as possible."""
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
    accumulator = _fused_inner_loop.accumulator
    monkeypatch.setattr(_fused_inner_loop, "accumulator", lambda p: (taken.append(p), accumulator(p))[1])
    count, alone = len(list(net.parameters())), len(sys._current_frames()) == 1
    directly(net)
    assert len(taken) == (0 if alone else count)
    thread = threading.Thread(target=directly, args=(net,))
    thread.start()
    thread.join()
    assert len(taken) == (count if alone else 2 * count)


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


class Recorded(nn.Module):
    """A model that the fused inner loop serves after calling it once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).tanh())


class Generic(Recorded):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).sin())


OPTIONS: list[dict[str, Any]] = [{}, {"vectorize": False}, {"backend": "reference", "checkpoint_every": 1}]


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("options", [*OPTIONS, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize("make", [Recorded, Generic])
def test_models_that_are_called_have_their_own_parameters_in_every_thread(
    make: type[Recorded], options: dict[str, Any]
) -> None:
    net, episode, errors = make().double(), regression(2, 4, 4, 2, 1), []
    params = list(net.parameters())
    meta_backward(net, episode.support, episode.query, steps=2, **options)
    once = [p.grad.clone() for p in params if p.grad is not None]
    net.zero_grad()

    def run() -> None:
        try:
            for _ in range(ROUNDS // 3):
                meta_backward(net, episode.support, episode.query, steps=2, **options)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(a is b for a, b in zip(net.parameters(), params, strict=True))
    for p, expected in zip(params, once, strict=True):
        assert p.grad is not None
        assert_close("meta-gradient", p.grad / (THREADS * (ROUNDS // 3)), expected, 1e-12)


def test_layers_that_another_thread_calls_are_recognised_with_their_own_parameters() -> None:
    net, results = mlp(2, 3, 1), []

    def call() -> None:
        results.append(meta_loss(net, SETS.support, SETS.query, steps=2).item())

    call()
    call()  # of a kind that is known now
    thread, weight = threading.Thread(target=call), net[0].weight
    with exclusive(net):
        net[0].weight = nn.Parameter(torch.ones_like(weight))
        thread.start()
        thread.join(0.2)
        net[0].weight = weight
    thread.join()
    assert len(results) == 3
    assert len(set(results)) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_can_call_a_model_that_a_thread_was_in_when_it_was_forked() -> None:
    net, inside, leave = Generic().double(), threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive(net):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads in a process that forks
        child = os.fork()
    if not child:
        signal.alarm(20)
        meta_loss(net, SETS.support, SETS.query)
        os._exit(0)
    leave.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def test_locks_go_with_their_models() -> None:
    before = len(_exclusive._locks)
    for _ in range(5):
        meta_loss(Generic().double(), SETS.support, SETS.query)
    gc.collect()
    assert len(_exclusive._locks) <= before
