"""lstm_step's CUDA kernels with RNNProp's and Meta-LSTM's stages, run on the CPU thread by thread.

The conformance suite holds every pair of stages to the reference; here is what only these kernels have: shared memory
that is too small, schedules of threads, chunks of tiles. Axis legend: N coordinates, H hidden units, L layers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from metakern.core import backend as _backend
from tests.conftest import assert_same_bits
from tests.cuda.device import Device
from tests.ops.lstm_step.emulator import Emulator
from tests.ops.lstm_step.test_cuda import SCHEDULES
from tests.ops.lstm_step.test_stages import (
    OWN_PAIRS,
    PAIRS,
    assert_agree,
    by_function,
    by_operators,
    make_staged,
    raw_inputs,
)

own_pairs = pytest.mark.parametrize(("features", "head"), OWN_PAIRS)


@own_pairs
@pytest.mark.parametrize("kilobytes", [64, 163, 227])
@pytest.mark.parametrize(
    ("hidden", "layers", "dtype"), [(20, 3, torch.float32), (48, 3, torch.float32), (20, 3, torch.float64)]
)
def test_memory_that_does_not_hold_the_weights(
    features: str, head: str, hidden: int, layers: int, dtype: torch.dtype, kilobytes: int, emulator: Emulator
) -> None:
    # From 64 kB on the kernel for 20 units gives way to the general one, and the weights are read from the tensors.
    if kilobytes == 64 and (hidden == 48 or dtype == torch.float64):
        kilobytes = 100
    staged = make_staged(40, features, head, dtype, hidden=hidden, layers=layers)
    assert_agree(staged, by_operators(staged, operators=emulator, device=Device(shared_kilobytes=kilobytes)))


@own_pairs
def test_chunks_of_several_tiles(features: str, head: str, emulator: Emulator) -> None:
    staged = make_staged(20_001, features, head, hidden=2, layers=1)
    assert_agree(staged, by_operators(staged, operators=emulator, device=Device(multiprocessors=7)))


@own_pairs
@pytest.mark.parametrize("hidden", [20, 7])
def test_same_bits_in_every_schedule_and_for_every_number_of_multiprocessors(
    features: str, head: str, hidden: int, emulator: Emulator
) -> None:
    staged = make_staged(417, features, head, hidden=hidden)
    expected = by_operators(staged, operators=emulator)
    for schedule, count in zip(SCHEDULES, (132, 1, 3, 2), strict=True):
        device = replace(schedule, multiprocessors=count)
        for want, got in zip(expected, by_operators(staged, operators=emulator, device=device), strict=True):
            for name, x in want.items():
                assert_same_bits(f"{name} on {device}", got[name], x)


@own_pairs
@pytest.mark.parametrize("n", [1, 45])
def test_what_stands_behind_the_last_coordinate_reaches_nothing(
    features: str, head: str, n: int, emulator: Emulator
) -> None:
    staged = make_staged(n, features, head)
    clean, dirty = (by_operators(staged, tail, emulator) for tail in (0.0, float("nan")))
    for want, got in zip(clean, dirty, strict=True):
        for name, x in want.items():
            assert_same_bits(name, got[name], x)


@own_pairs
def test_in_place_gives_the_same_bits(features: str, head: str, emulator: Emulator) -> None:
    staged = make_staged(200, features, head)
    expected = emulator.lstm_step_staged(*raw_inputs(staged), *staged.options())
    for device in SCHEDULES:
        inputs = raw_inputs(replace(staged, params=staged.params.clone()))
        one = replace(device, multiprocessors=1)
        found = emulator.lstm_step_staged(*inputs, *staged.options(), device=one, in_place=True)
        for name, x, want in zip(("params", "state", "stage state"), found, expected, strict=True):
            assert_same_bits(name, x, want)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Backends that serve the calls: the tensors count as those of a GPU, whose kernels are built."""
    found = []
    resolve = _backend.resolve

    def on_a_gpu(backend: str | None, device: torch.device, unserved: dict[str, str] | None = None) -> str:
        found.append(resolve(backend, torch.device("cuda"), unserved))
        return found[-1]

    monkeypatch.setattr(_backend, "missing", lambda name, device: "")
    monkeypatch.setattr(_backend, "resolve", on_a_gpu)
    monkeypatch.setattr(_backend, "_warned", set())
    return found


@pytest.mark.parametrize(("features", "head"), PAIRS)
def test_on_a_gpu_auto_takes_the_cuda_kernels(features: str, head: str, served: list[str]) -> None:
    staged = make_staged(6, features, head)
    assert_agree(staged, by_function(staged, "auto"))  # the operator dispatches to the CPU kernels
    assert served == ["cuda"]


def test_a_pair_without_kernels_warns_on_a_gpu_and_raises_by_name(served: list[str]) -> None:
    staged = make_staged(6, "moments", "gates", torch.float64)
    reason = "the kernels are not compiled for features 'moments' with head 'gates'"
    with pytest.warns(_backend.FallbackWarning, match=reason):
        assert_agree(staged, by_function(staged, "auto"))
    assert served == ["reference"]
    with pytest.raises(RuntimeError, match=f"backend 'cuda' cannot run: {reason}"):
        by_function(staged, "cuda")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: lstm_step_staged has no kernels for it"):
        by_function(make_staged(6, "moments", "tanh"), "triton")
