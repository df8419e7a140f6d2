"""Leaky ReLUs and layers of several activations in mlp_inner_loop and mlp_meta_loss, and gradients of dead units."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.ops import mlp_inner_loop, mlp_meta_loss
from metakern.ops.mlp_inner_loop import cuda_shared_bytes
from metakern.ops.mlp_inner_loop.reference import parse_activation
from tests.conftest import assert_same_bits
from tests.inner_loops import assert_same, hand_written, regression
from tests.mlp_problems import MIXED, Case

F32, F64 = torch.float32, torch.float64

MODULES = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU, "identity": nn.Identity}


def module(name: str) -> nn.Module:
    if name.startswith("leaky_relu"):
        return nn.LeakyReLU(float(name.partition(":")[2] or 0.01))
    return MODULES[name]()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("names", MIXED, ids=str)
def test_equals_a_loop_by_hand(names: list[str], first_order: bool, backend: str) -> None:
    torch.manual_seed(0)
    first, second, third = nn.Linear(2, 5), nn.Linear(5, 4), nn.Linear(4, 3)
    net = nn.Sequential(first, module(names[0]), second, module(names[1]), third).double()
    episode, params = regression(2, 4, 3, 2, 3), list(net.parameters())
    options = {"steps": 2, "activation": names, "first_order": first_order, "backend": backend}
    losses = mlp_meta_loss(params, episode.support, episode.query, lr=0.1, **options)
    assert_same(losses, hand_written(net, episode, 2, lambda *_: 0.1, first_order=first_order), params)


def test_one_name_is_that_of_every_layer() -> None:
    case = Case([3, 4, 5, 2], 18)
    for name in ("tanh", "leaky_relu:0.3"):
        for a, b in zip(*(case.meta("cpp", steps=2, activation=n) for n in (name, [name] * 2)), strict=True):
            assert_same_bits("result", a, b)


def test_a_number_is_the_kind_of_every_layer_for_the_operators_themselves() -> None:
    case, flags = Case([3, 4, 5, 2], 3), torch.ones(2, dtype=torch.bool)
    arguments = [
        (case.params, *case.support, None, [], 0.1, 2, False, -1, kind, 0, 1, False, flags) for kind in (1, [1], [1, 1])
    ]
    results = [torch.ops.metakern.mlp_inner_loop(*a)[0] for a in arguments]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits("result", a, b)


def test_a_linear_model_takes_any_name_or_none() -> None:
    case = Case([3, 2], 3)
    results = [case.meta("cpp", steps=2, activation=names) for names in ("relu", "gelu", [])]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits("result", a, b)
    with pytest.raises(ValueError, match=r"one for each of 0 hidden layers, got \['relu'\]"):
        case.meta("cpp", steps=2, activation=["relu"])


def test_names() -> None:
    assert parse_activation("leaky_relu") == ("leaky_relu", nn.LeakyReLU().negative_slope)
    assert parse_activation("leaky_relu:2e-1") == ("leaky_relu", 0.2)
    assert parse_activation("leaky_relu:0.0") == ("relu", 0.0)
    assert parse_activation("identity") == ("leaky_relu", 1.0)
    sizes = [3, 4, 5, 2], 6, 7
    mixed, tanh, gelu = (cuda_shared_bytes(*sizes, a, "mse", F32) for a in (["tanh", "gelu"], "tanh", "gelu"))
    assert mixed == gelu > tanh


# ------------------------------------------------------------------------------------ gradients that exploded


def exploding(tasks: int) -> tuple[list[Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Networks of 3 hidden units, the first of them dead: the gradient that arrives there is infinite."""
    first, bias = torch.tensor([[0.0], [0.5], [0.25]], dtype=F64), torch.tensor([-1.0, 0.25, 0.5], dtype=F64)
    second, offset = torch.tensor([[1e308, 0.5, -0.25]], dtype=F64), torch.zeros(1, dtype=F64)
    x = torch.linspace(-0.5, 1, tasks * 2, dtype=F64).view(tasks, 2, 1)
    support, query = (x, torch.full_like(x, 100.0)), (x.flip(1), torch.full_like(x, 50.0))
    return [first, bias, second, offset], support, query


def plain(
    params: list[Tensor], support: tuple[Tensor, Tensor], query: tuple[Tensor, Tensor], lr: float
) -> list[Tensor]:
    """Losses after two steps and their meta-gradients, by autograd, task by task."""
    leaves = [p.clone().requires_grad_() for p in params]
    losses = []
    for xs, ys, query_x, query_y in zip(*support, *query, strict=True):
        now = leaves

        def loss(now: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.mse_loss(F.linear(F.relu(F.linear(x, *now[:2])), *now[2:]), y)

        for _ in range(2):
            found = torch.autograd.grad(loss(now, xs, ys), now, create_graph=True)
            now = [p - lr * g for p, g in zip(now, found, strict=True)]
        losses.append(loss(now, query_x, query_y))
    total = torch.stack(losses)
    return [total.detach(), *torch.autograd.grad(total.sum(), leaves)]


def assert_dead_units_have_no_gradient(tasks: int, clip_norm: float | None, backend: str) -> None:
    params, support, query = exploding(tasks)
    expected = plain(params, support, query, 0.01)
    assert all(x.isfinite().all() for x in expected)
    delta = 2 * (F.linear(F.relu(F.linear(support[0], *params[:2])), *params[2:]) - support[1])
    assert (delta @ params[2]).isinf().any()  # what the test is about
    leaves = [p.requires_grad_() for p in params]
    options = {"steps": 2, "lr": 0.01, "clip_norm": clip_norm, "backend": backend}
    losses = mlp_meta_loss(leaves, support, query, **options)
    for got, want in zip([losses, *torch.autograd.grad(losses.sum(), leaves)], expected, strict=True):
        torch.testing.assert_close(got.detach(), want, rtol=1e-10, atol=1e-10)
    adapted = mlp_inner_loop(leaves, *support, **options)
    total = sum(a.sum() for a in (*adapted[:2], *adapted[3:]))
    assert all(g.isfinite().all() for g in [*adapted, *torch.autograd.grad(total, leaves)])
    assert_same_bits("weight of the dead unit", adapted[2][:, 0, 0], torch.full((len(support[0]),), 1e308, dtype=F64))


@pytest.mark.parametrize("clip_norm", [None, 1e6])
@pytest.mark.parametrize("tasks", [1, 18])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_an_infinite_gradient_of_a_dead_unit_is_zero(backend: str, tasks: int, clip_norm: float | None) -> None:
    assert_dead_units_have_no_gradient(tasks, clip_norm, backend)
