"""Memory of whole inner loops of many steps."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metakern import adapt
from metakern.ops import mlp_inner_loop, mlp_meta_loss
from tests.conftest import assert_close
from tests.inner_loops import mlp

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 50_000


@pytest.fixture
def one_gigabyte() -> Iterator[None]:
    """Limit the address space to the current use plus a gigabyte."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def problem() -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(64, 64, generator=generator) / 64, torch.zeros(64)] * 2
    return [p.clone() for p in params], (torch.randn(1, 1, 64, generator=generator), torch.ones(1, 1, 64))


@pytest.mark.usefixtures("one_gigabyte")
def test_checkpoints_that_no_way_back_reads_are_not_reserved() -> None:
    """1.7 GB of them."""
    params, sets = problem()
    with torch.no_grad():
        by_adapt = mlp_inner_loop(params, *sets, lr=1e-5, steps=STEPS, backend="cpp")
        options = {"lr": 1e-5, "steps": STEPS, "checkpoint_every": 1}
        losses = mlp_meta_loss(params, sets, sets, backend="cpp", **options)
    assert all(bool(p.isfinite().all()) for p in by_adapt)
    hidden = torch.relu(sets[0] @ by_adapt[0].mT + by_adapt[1].unsqueeze(1))
    prediction = hidden @ by_adapt[2].mT + by_adapt[3].unsqueeze(1)
    assert_close("losses", losses, (prediction - sets[1]).square().mean((1, 2)), 1e-5)


@pytest.mark.usefixtures("one_gigabyte")
def test_adapt_under_no_grad() -> None:
    _, sets = problem()
    with torch.no_grad():
        adapted = adapt(mlp(64, 64, 64).float(), *sets, lr=1e-5, steps=STEPS, backend="cpp")
    assert all(bool(p.isfinite().all()) for p in adapted.parameters.values())
