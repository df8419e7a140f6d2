"""Networks for the fused inner loop, and a check that it served a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metakern import meta_loss
from tests.conftest import assert_close
from tests.inner_loops import Episode, regression

F64 = torch.float64

Forward = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """Two layers with a custom forward; created in reverse order, so that registration order differs from use."""

    def __init__(self, forward: Forward, outputs: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last, self.first = nn.Linear(5, outputs), nn.Linear(2, 5)
        self.drop, self.act, self.no_grad = nn.Dropout(), nn.GELU(), torch.no_grad
        self.double()
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def sequential(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(layers or (nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1)))).double()


EPISODE = regression(3, 4, 5, 2, 1)


def served(model: nn.Module, capsys: pytest.CaptureFixture[str], episode: Episode = EPISODE, **options: Any) -> bool:
    """Whether a call is fused; checks its losses and gradients against a plain PyTorch loop."""
    results, options = [], {"steps": 3, "lr": 0.1, **options}
    capsys.readouterr()
    for backend in (None, "reference"):
        losses = meta_loss(model, episode.support, episode.query, backend=backend, explain=backend is None, **options)
        leaves = [p for p in model.parameters() if p.requires_grad]
        results.append([losses, *torch.autograd.grad(losses.mean(), leaves, allow_unused=True)])
    for index, (got, expected) in enumerate(zip(*results, strict=True)):
        assert (got is None) == (expected is None)
        if got is not None:
            assert_close(f"result {index}", got, expected, 1e-11)
    return "fused inner loop, " in capsys.readouterr().out
