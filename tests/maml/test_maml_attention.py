"""Attention and sparse embeddings in one-task learners: second order, against a loop by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from metakern import MAML, MetaSGD
from tests.conftest import assert_close


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0]).mean(1)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.scaled_dot_product_attention(self.query(x), x, x, is_causal=True)).mean(1)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Linear(4, 1), nn.Flatten(), nn.Linear(3, 1))


def by_hand(net: nn.Module, x: Tensor, y: Tensor, first_order: bool, sets: int = 2) -> Tensor:
    params = dict(net.named_parameters())
    for _ in range(sets):
        with sdpa_kernel(SDPBackend.MATH):
            loss = F.mse_loss(functional_call(net, params, (x,)), y)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=not first_order)
        params = {name: p - 0.1 * g for (name, p), g in zip(params.items(), grads, strict=True)}
    with sdpa_kernel(SDPBackend.MATH):
        return F.mse_loss(functional_call(net, params, (x,)), y)


@pytest.mark.parametrize("kind", [MAML, MetaSGD])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("make", [Attention, Scaled, encoder])
def test_attention_is_differentiated_twice(make: Callable[[], nn.Module], first_order: bool, kind: type) -> None:
    torch.manual_seed(0)
    net, x, y = make().double(), torch.randn(5, 3, 4).double(), torch.randn(5, 1).double()
    learner = kind(net, 0.1, first_order=first_order).clone()
    for _ in range(2):
        learner.adapt(F.mse_loss(learner(x), y))
    loss, expected = F.mse_loss(learner(x), y), by_hand(net, x, y, first_order)
    assert_close("query loss", loss, expected, 1e-12)
    params = list(net.parameters())
    got, want = (torch.autograd.grad(one, params, retain_graph=True) for one in (loss, expected))
    for a, b in zip(got, want, strict=True):
        assert_close("meta-gradient", a, b, 1e-10)


def test_other_calls_keep_the_attention_that_torch_picks() -> None:
    flags = []

    class Seen(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            flags.append(torch.backends.cuda.flash_sdp_enabled())
            return super().forward(x)

    maml, x = MAML(Seen(2, 1), 0.1), torch.ones(3, 2)
    maml.clone()(x)
    maml.clone(first_order=True)(x)
    with torch.no_grad():
        maml(x)
    assert flags == [False, True, True]
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("kind", [MAML, MetaSGD])
@pytest.mark.parametrize("width", [3, 300])
@pytest.mark.parametrize("first_order", [False, True])
def test_sparse_embeddings_adapt_as_dense_ones(first_order: bool, width: int, kind: type) -> None:
    torch.manual_seed(0)
    x, y = torch.tensor([[1, 2], [2, 3], [1, 1]]), torch.tensor([0, 1, 1])
    weight, results = torch.randn(50, width).double(), []
    for sparse in (True, False):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Embedding(50, width, sparse=sparse), nn.Flatten(), nn.Linear(2 * width, 2)).double()
        net[0].weight.data.copy_(weight)
        learner = kind(net, 0.1, first_order=first_order).clone()
        for _ in range(2):
            learner.adapt(F.cross_entropy(learner(x), y))
        loss = F.cross_entropy(learner(x), y)
        loss.backward()
        grads: list[Any] = [p.grad.to_dense() if p.grad.layout != torch.strided else p.grad for p in net.parameters()]
        results.append([loss, *learner.parameters(), *grads])
    for a, b in zip(*results, strict=True):
        assert_close("with sparse=True", a, b, 1e-12)
