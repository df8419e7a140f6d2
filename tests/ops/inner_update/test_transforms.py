"""inner_update as a registered operator: opcheck, torch.compile, torch.func, second derivatives under them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.func import grad

from metakern.ops import inner_update
from tests.conftest import assert_close
from tests.update_problems import LAYOUTS, draw, make_lr, step_of

SHAPES: list[tuple[int, ...]] = [(3, 2), (), (5,)]
ACTIVE = torch.tensor([True, False, True])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip_norm": 2.5},
    "clipped, some rest": {"clip_norm": 2.5, "active": ACTIVE},
}


def problem(layout: str, dtype: torch.dtype = torch.float64, tasks: int = 3) -> tuple[list[Tensor], list[Tensor], Any]:
    return draw(tasks, dtype, 0, SHAPES), draw(tasks, dtype, 1, SHAPES), make_lr(layout, dtype, SHAPES)


# ---------------------------------------------------------------------------------------------------- opcheck


# ---------------------------------------------------------------------------------------------- torch.compile


# ------------------------------------------------------------------------------------------------- torch.func


def loss_of(params: list[Tensor], grads: list[Tensor], lr: Any, **options: Any) -> Tensor:
    return torch.stack([new.sin().sum() for new in inner_update(params, grads, lr, **options)]).sum()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "number"])
def test_func_grad_equals_autograd_to_second_order(layout: str, options: str) -> None:
    params, grads, lr = problem(layout)
    arguments = {**OPTIONS[options], "step": step_of(layout), "backend": "cpp"}

    def slope(grads: list[Tensor], lr: Any, gradient: Any) -> Tensor:
        found = gradient(params, grads, lr)
        return torch.stack([x.square().sum() for x in found]).sum()

    def by_autograd(params: list[Tensor], grads: list[Tensor], lr: Any) -> Any:
        return torch.autograd.grad(loss_of(params, grads, lr, **arguments), grads, create_graph=True)

    def by_func(params: list[Tensor], grads: list[Tensor], lr: Any) -> Any:
        return grad(lambda g: loss_of(params, g, lr, **arguments))(grads)

    got = grad(slope, argnums=(0, 1))(grads, lr, by_func)
    leaves = [g.clone().requires_grad_() for g in grads]
    rates = [x.clone().requires_grad_() for x in lr] if isinstance(lr, list) else lr.clone().requires_grad_()
    flat = [*leaves, *rates] if isinstance(rates, list) else [*leaves, rates]
    expected = torch.autograd.grad(slope(leaves, rates, by_autograd), flat)
    flat_got = [*got[0], *(got[1] if isinstance(got[1], list) else [got[1]])]
    assert any(x.any() for x in expected[3:])
    for a, b in zip(flat_got, expected, strict=True):
        assert_close("second derivative", a, b, 1e-12)
