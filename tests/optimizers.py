"""Shared by the tests of LearnedOptimizer: parameters and gradients, a handwritten loop, comparisons, fixtures."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metakern.core import backend as _backend
from metakern.ops import unpack_state
from metakern.optim import LearnedOptimizer
from metakern.rules import CoordinatewiseLSTM

ODD_SHAPES = [(), (1,), (0,), (31,), (32,), (33,), (3, 0, 2), (5, 7), (2, 3, 4, 5), (), (129,)]

#: The kernels give the same bits for every way to batch the coordinates; the reference's matrix products do not.
TOLERANCE = {"rtol": 0, "atol": 0} if _backend.resolve(None, torch.device("cpu")) == "cpp" else {}


#: Options of a rule that keeps bfloat16 state: on the CPU the reference alone serves it.
BFLOAT16_STATE = {"backend": "reference", "bfloat16_state": True}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(name="rule")
def small_rule() -> CoordinatewiseLSTM:
    return make_rule()


def make_rule(**options: Any) -> CoordinatewiseLSTM:
    return CoordinatewiseLSTM(hidden_size=6, num_layers=2, **options)


def make_params(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def set_grads(params: Sequence[Tensor], step: int, active: Sequence[bool] | None = None) -> None:
    """Gradients that depend on the step and position only; None where ``active`` says so."""
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        p.grad = grad if active is None or active[i] else None


def all_at_once(
    rule: CoordinatewiseLSTM, start: Sequence[Tensor], steps: int, first: int = 0, state: Any = None
) -> tuple[list[Tensor], Any]:
    """All tensors through one ``rule(params, grads, state)`` a step.

    Where each fills whole tiles, that is the optimizer's launch: the reference's matrix products give the same bits.
    """
    params = [p.detach().clone() for p in start]
    state = rule.init_state(params) if state is None else state
    with torch.no_grad():
        for step in range(first, first + steps):
            set_grads(params, step)
            params, state = rule(params, [p.grad for p in params], state)
    return params, state


def by_hand(
    rule: CoordinatewiseLSTM, start: Sequence[Tensor], patterns: Sequence[Sequence[bool] | None]
) -> tuple[list[Tensor], list[Any]]:
    """Every tensor on its own through ``rule(params, grads, state)``, skipped where a pattern says so."""
    params = [p.detach().clone() for p in start]
    states = [rule.init_state(p) for p in params]
    with torch.no_grad():
        for step, pattern in enumerate(patterns):
            set_grads(params, step, pattern)
            for i, p in enumerate(params):
                if p.grad is not None:
                    params[i], states[i] = rule(p, p.grad, states[i])
                    p.grad = None
    return params, states


def run(optimizer: LearnedOptimizer, patterns: Sequence[Sequence[bool] | None], first: int = 0) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step, pattern in enumerate(patterns):
        set_grads(params, first + step, pattern)
        optimizer.step()


def assert_same(params: Sequence[Tensor], expected: Sequence[Tensor], tolerance: dict[str, float] = TOLERANCE) -> None:
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), equal_nan=True, **tolerance)


def assert_state(
    optimizer: LearnedOptimizer,
    params: Sequence[Tensor],
    states: Sequence[Any],
    tolerance: dict[str, float] = TOLERANCE,
) -> None:
    saved = optimizer.state_dict()["state"]
    for i, (p, state) in enumerate(zip(params, states, strict=True)):
        h, c = unpack_state(state)
        if i not in saved:
            assert not h.any(), "a state that moved must be saved"
            continue
        assert saved[i]["h"].shape == (optimizer.rule.num_layers, p.numel(), optimizer.rule.hidden_size)
        assert_same([saved[i]["h"], saved[i]["c"]], [h, c], tolerance)


def roundtrip(state_dict: dict[str, Any]) -> Any:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
