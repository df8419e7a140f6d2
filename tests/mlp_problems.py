"""Small MLPs with support and query sets, for the tests of every implementation of mlp_inner_loop."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from metakern.ops import mlp_inner_loop, mlp_meta_loss
from tests.conftest import assert_close

F64 = torch.float64

#: Adjacent pairs of activations: one kind needs z, one needs only h, one has no curvature.
MIXED = (
    ["leaky_relu:0.2", "leaky_relu:0.7"],
    ["relu", "leaky_relu:1.5"],
    ["relu", "tanh"],
    ["tanh", "leaky_relu"],
    ["gelu", "relu"],
    ["sigmoid", "gelu"],
    ["identity", "tanh"],
    ["leaky_relu:0", "identity"],
)


class Case:
    """T MLPs with support and query sets, and leaves for their meta-gradients."""

    def __init__(
        self,
        widths: list[int],
        tasks: int,
        samples: int = 5,
        queries: int = 4,
        loss: str = "mse",
        own: bool = False,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.generator, self.loss, self.widths = torch.Generator().manual_seed(seed), loss, widths
        self.device = device
        self.params = []
        for inputs, units in itertools.pairwise(widths):
            lead = (tasks,) if own else ()
            self.params += [self.draw(*lead, units, inputs) / inputs**0.5, self.draw(*lead, units) / 4]
        self.support, self.query = self.sets(tasks, samples), self.sets(tasks, queries)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=F64).to(self.device)

    def sets(self, tasks: int, samples: int) -> tuple[Tensor, Tensor]:
        x, y = self.draw(tasks, samples, self.widths[0]), self.draw(tasks, samples, self.widths[-1])
        if self.loss == "cross_entropy":
            return x, y.argmax(2)
        return x, y if self.loss == "mse" else (y > 0).to(F64)

    def meta(self, backend: str, dtype: torch.dtype = F64, lr: Any = 0.1, **options: Any) -> list[Tensor]:
        """Query losses [T], then the gradient of a weighted sum of them by every parameter and rate."""
        params = [p.detach().to(dtype, copy=True).requires_grad_() for p in self.params]
        rates = [r.detach().to(dtype, copy=True).requires_grad_() for r in lr] if isinstance(lr, list) else lr
        support, query = self.data(dtype)
        losses = mlp_meta_loss(params, support, query, lr=rates, loss=self.loss, backend=backend, **options)
        weights = torch.linspace(0.5, 1.5, losses.numel(), dtype=dtype, device=losses.device)
        leaves = [*params, *(rates if isinstance(rates, list) else [])]
        return [losses, *torch.autograd.grad((losses * weights).sum(), leaves)]

    def adapt(self, backend: str, dtype: torch.dtype = F64, lr: Any = 0.1, **options: Any) -> list[Tensor]:
        """Adapted parameters, then the gradient of a fixed linear function of them."""
        params = [p.detach().to(dtype, copy=True).requires_grad_() for p in self.params]
        rates = [r.detach().to(dtype, copy=True).requires_grad_() for r in lr] if isinstance(lr, list) else lr
        (x, y), _ = self.data(dtype)
        results = mlp_inner_loop(params, x, y, lr=rates, loss=self.loss, backend=backend, **options)
        weights = [torch.linspace(-1, 1, r.numel(), dtype=dtype, device=r.device).view(r.shape) for r in results]
        total = sum((r * weight).sum() for r, weight in zip(results, weights, strict=True))
        leaves = [*params, *(rates if isinstance(rates, list) else [])]
        return [*results, *torch.autograd.grad(total, leaves)]

    def data(self, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
        return [tuple(t.to(dtype) if t.is_floating_point() else t for t in s) for s in (self.support, self.query)]


def assert_equal(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Compare all on one scale, as the gradient of a single bias may cancel."""
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == b.shape, f"result {index} has shape {list(a.shape)}, expected {list(b.shape)}"
    assert_close("results", *(torch.cat([r.flatten() for r in results]) for results in (actual, expected)), tolerance)
