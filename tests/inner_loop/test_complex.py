"""Complex parameters: adapted values and meta-gradients are those of a plain loop, conjugates included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metakern import MAML, adapt, meta_loss
from tests.conftest import assert_close

C128 = torch.complex128


class Waves(nn.Module):
    """Complex weights, a real bias, and a real output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 2, dtype=C128))
        self.phase = nn.Parameter(torch.randn(3, dtype=C128))
        self.bias = nn.Parameter(torch.randn(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        z = x.to(C128) @ self.weight.mT * torch.exp(1j * self.phase) + self.phase.conj()
        return z.real * z.imag + z.abs() + self.bias


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (4, 2), (4, 3), (5, 2), (5, 3)
    a, b, c, d = (torch.randn(3, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return a, b, c, d


def by_hand(model: nn.Module, steps: int, rates: Any, clip_norm: float | None = None, first_order: bool = False) -> Any:
    losses, adapted = [], []
    for sx, sy, qx, qy in zip(*data(), strict=True):
        params = dict(model.named_parameters())

        def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return (torch.func.functional_call(model, params, (x,)) - y).square().mean()

        for _ in range(steps):
            value, tensors = loss(params, sx, sy), list(params.values())
            found = torch.autograd.grad(value, tensors, create_graph=not first_order, retain_graph=True)
            squares = torch.stack([(g * g.conj()).real.sum() for g in found]).sum()
            scale = clip_norm / squares.sqrt() if clip_norm is not None and squares > clip_norm**2 else 1.0
            params = {n: p - rates[n] * (g * scale) for (n, p), g in zip(params.items(), found, strict=True)}
        losses.append(loss(params, qx, qy))
        adapted.append(params)
    return torch.stack(losses), {name: torch.stack([each[name] for each in adapted]) for name in adapted[0]}


def assert_near(name: str, actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    if actual.is_complex():
        actual, expected = torch.view_as_real(actual.resolve_conj()), torch.view_as_real(expected.resolve_conj())
    assert_close(name, actual, expected, 1e-10)


@pytest.mark.parametrize("options", [{}, {"first_order": True}, {"clip_norm": 0.5}, {"checkpoint_every": 1}])
@pytest.mark.parametrize("vectorize", [True, False])
def test_complex_parameters(vectorize: bool, options: dict[str, Any]) -> None:
    model, (sx, sy, qx, qy) = Waves(), data()
    leaves, by_options = list(model.parameters()), {k: v for k, v in options.items() if k != "checkpoint_every"}
    learned = {n: torch.full((), 0.02, dtype=torch.float64, requires_grad=True) for n, _ in model.named_parameters()}
    for lr in (0.02, learned):
        rates = lr if isinstance(lr, dict) else dict.fromkeys(learned, lr)
        expected, adapted = by_hand(model, 2, rates, **by_options)
        losses = meta_loss(model, (sx, sy), (qx, qy), steps=2, lr=lr, vectorize=vectorize, **options)
        assert_near("losses", losses, expected)
        wanted = [*leaves, *(learned.values() if lr is learned else [])]
        got, want = (torch.autograd.grad(x.mean(), wanted, retain_graph=True) for x in (losses, expected))
        for index, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_near(f"meta-gradient {index}", a, b)
        found = adapt(model, sx, sy, steps=2, lr=lr, vectorize=vectorize, **options).parameters
        for name, p in found.items():
            assert_near(name, p, adapted[name])


@pytest.mark.parametrize("first_order", [False, True])
def test_one_task_at_a_time(first_order: bool) -> None:
    model, (sx, sy, qx, qy) = Waves(), data()
    expected, _ = by_hand(model, 2, dict.fromkeys(dict(model.named_parameters()), 0.02), first_order=first_order)
    losses = []
    maml = MAML(model, lr=np.float64(0.02), first_order=first_order)
    for task in range(3):
        learner = maml.clone()
        for _ in range(2):
            learner.adapt((learner(sx[task]) - sy[task]).square().mean())
        losses.append((learner(qx[task]) - qy[task]).square().mean())
    stacked = torch.stack(losses)
    assert_near("losses", stacked, expected)
    got, want = (torch.autograd.grad(x.mean(), list(model.parameters())) for x in (stacked, expected))
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_near(f"meta-gradient {index}", a, b)
