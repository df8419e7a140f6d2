"""Cache of large results' memory: reused once free, never while in use, bounded, and freed on request."""

import os
import subprocess
import sys

import pytest
import torch

import metakern
from metakern.core import backend as _backend
from metakern.ops import LSTMState, lstm_step

pytestmark = pytest.mark.skipif(not _backend.is_compiled(), reason="the cache belongs to the compiled kernels")

MIB = 2**20


@pytest.fixture(autouse=True)
def empty():
    metakern.empty_cache()
    yield
    metakern.empty_cache()


def step(n: int = 10_000) -> tuple[torch.Tensor, LSTMState]:
    """One step of n coordinates; with H = 20 and L = 2 the state of 10,000 takes 3.2 MB."""
    torch.manual_seed(0)
    weights = metakern.rules.CoordinatewiseLSTM().weights()
    with torch.no_grad():
        return lstm_step(torch.ones(n), torch.ones(n), LSTMState.zeros(n), weights, backend="cpp")


def test_memory_that_is_free_serves_the_next_result():
    _, first = step()
    address = first.data.data_ptr()
    assert _backend._C.cached_bytes() == 0
    del first
    assert 3 * MIB < _backend._C.cached_bytes() < 4 * MIB
    _, second = step()
    assert second.data.data_ptr() == address
    assert _backend._C.cached_bytes() == 0


def test_results_in_use_share_nothing():
    _, kept = step()
    before = kept.data.clone()
    others = [step()[1] for _ in range(4)]
    addresses = {state.data.data_ptr() for state in (kept, *others)}
    assert len(addresses) == 5
    assert torch.equal(kept.data, before)
    view = step()[1].data[3]  # a view keeps its result alive
    expected = view.clone()
    step()
    assert torch.equal(view, expected)


def test_a_block_serves_only_results_of_about_its_size():
    step(20_000)
    kept = _backend._C.cached_bytes()
    _, small = step(10_000)
    assert _backend._C.cached_bytes() == kept  # the small result did not take the large block
    del small
    assert _backend._C.cached_bytes() > kept


def test_empty_cache_frees_everything():
    step()
    assert _backend._C.cached_bytes() > 0
    metakern.empty_cache()
    assert _backend._C.cached_bytes() == 0


def test_small_results_are_not_kept():
    step(100)
    assert _backend._C.cached_bytes() == 0


def run(code: str, limit: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"METAKERN_CPU_CACHE_MB": limit}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


STEPS = """
import torch, metakern
from metakern.core import backend as _backend
from metakern.ops import LSTMState, lstm_step
weights = metakern.rules.CoordinatewiseLSTM().weights()
states = [lstm_step(torch.ones(n), torch.ones(n), LSTMState.zeros(n), weights)[1] for n in (10_000, 20_000, 40_000)]
del states
print(_backend._C.cached_bytes())
"""


@pytest.mark.parametrize(("limit", "largest"), [("0", 0), ("8", 8 * MIB), ("1000", 1000 * MIB)])
def test_the_environment_sets_the_limit(limit, largest):
    result = run(STEPS, limit)
    assert result.returncode == 0, result.stderr
    kept = int(result.stdout)
    assert kept <= largest
    assert (kept > 0) == (largest > 0)


@pytest.mark.parametrize("limit", ["much", "-1", "1.5"])
def test_a_limit_that_is_no_number_is_named(limit):
    result = run(STEPS, limit)
    assert result.returncode != 0
    assert f"METAKERN_CPU_CACHE_MB must be a number of mebibytes of at least 0, got '{limit}'" in result.stderr


# Threads take blocks while the process forks; a child that deadlocks is killed.
FORKS = """
import os, signal, sys, threading, time
import torch
from metakern.core import backend as _backend
from metakern.ops import inner_update

params = [torch.ones(1, 2**14 + 1) for _ in range(64)]  # a smaller result is not kept
stop = threading.Event()


def work():
    while not stop.is_set():
        inner_update(params, params, 0.1, backend="cpp")


threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
end, forks, failed = time.monotonic() + 40, 0, 0
while forks < 1500 and (forks < 100 or time.monotonic() < end):
    forks += 1
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        inner_update(params[:1], params[:1], 0.1, backend="cpp")
        _backend._C.empty_cache()
        os._exit(0)
    failed += os.waitpid(child, 0)[1] != 0
    if failed:
        break
stop.set()
for thread in threads:
    thread.join()
inner_update(params, params, 0.1, backend="cpp")
assert _backend._C.cached_bytes() > 0
print(f"{failed} of {forks}")
"""


def test_a_forked_child_never_waits_for_a_thread_of_its_parent():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", FORKS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    failed, forks = result.stdout.split(" of ")
    assert int(forks) >= 100
    assert int(failed) == 0, f"child {forks} was killed while it waited"


def test_the_oldest_block_leaves_first_whatever_the_order():
    blocks = {n: step(n)[1] for n in (10_000, 20_000, 40_000)}
    sizes = {n: state.data.numel() * 4 for n, state in blocks.items()}
    for n in (20_000, 40_000, 10_000):
        del blocks[n]
    total = _backend._C.cached_bytes()
    assert total == sum(sizes.values())
    _, middle = step(40_000)  # the one between two others
    assert _backend._C.cached_bytes() == total - sizes[40_000]
    _, first, _, last = *step(20_000), *step(10_000)
    assert _backend._C.cached_bytes() == 0
    del middle, first, last
    assert _backend._C.cached_bytes() == total
