"""Layers and losses of torch.nn, batched, against a plain loop: adapted values, losses, second-order meta-gradients.

Those that draw random numbers are left out, as a loop draws others: Dropout, AlphaDropout, FeatureAlphaDropout and
RReLU in train() mode, and FractionalMaxPool. Dropout is in tests/inner_loop/test_inner_loop.py, embeddings in
tests/inner_loop/test_task_functions.py. SyncBatchNorm takes no samples on the CPU in train() mode.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor, nn

from metakern import adapt, meta_loss
from tests.conftest import assert_close
from tests.inner_loop.layers import FIRST_ORDER, LAYERS, LOOPED, LOOPED_LOSSES, LOSSES, Layer, Probe
from tests.inner_loops import Episode, evaluate, hand_written

F64 = torch.float64
STEPS, RATE = 2, 0.1

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated"),
]


def adapted_by_hand(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Parameters [T, *shape] after the steps, a task after another."""
    by_task = []
    for task in range(len(x)):
        params = dict(model.named_parameters())
        for _ in range(STEPS):
            found = torch.autograd.grad(evaluate(model, params, (x[task], y[task]), loss), list(params.values()))
            params = {
                name: (p - RATE * g).detach().requires_grad_()
                for (name, p), g in zip(params.items(), found, strict=True)
            }
        by_task.append(params)
    return {name: torch.stack([params[name] for params in by_task]) for name in by_task[0]}


def compare(name: str, model: nn.Module, episode: Episode, loss: Callable[..., Tensor], vectorize: bool | str) -> None:
    first_order = name in FIRST_ORDER
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the others have no second derivative
        by_hand = adapted_by_hand(model, *episode.support, loss)
        expected = hand_written(model, episode, STEPS, lambda *_: RATE, loss=loss, first_order=first_order)
    options: dict[str, Any] = {"loss": loss, "steps": STEPS, "lr": RATE, "vectorize": vectorize}
    options["first_order"] = first_order
    adapted = adapt(model, *episode.support, **options)
    for param, tensor in by_hand.items():
        assert_close(f"adapted {param}", adapted.parameters[param], tensor, 1e-10)
    losses = meta_loss(model, episode.support, episode.query, **options)
    assert_close("query losses", losses, expected, 1e-10)
    params = list(model.parameters())
    got, want = (torch.autograd.grad(x.mean(), params, retain_graph=True) for x in (losses, expected))
    largest = max(float(g.abs().max()) for g in want)
    for (param, _), a, b in zip(model.named_parameters(), got, want, strict=True):
        if float(b.abs().max()) < 1e-12 * largest:  # what normalisation takes away again is rounding noise
            assert float(a.abs().max()) < 1e-11 * largest, f"meta-gradient of {param} is not zero"
        else:
            assert_close(f"meta-gradient of {param}", a, b, 1e-9)


def problem(make: Layer, shape: tuple[int, ...]) -> tuple[nn.Module, Episode]:
    torch.manual_seed(0)
    layer = make().double()
    training = layer.training
    model = Probe(layer, shape).double()
    x = torch.randn(2, 3, 4, *shape, dtype=F64)  # support and query sets of three tasks
    with torch.no_grad():
        draw = lambda prediction, _: torch.randn_like(prediction)  # noqa: E731
        y = [torch.stack([evaluate(model, {}, (task, task), draw) for task in part]) for part in x]
    assert layer.training == training
    return model, Episode((x[0], y[0]), (x[1], y[1]))


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str) -> None:
    model, episode = problem(*LAYERS[name])
    compare(name, model, episode, F.mse_loss, True)


def compare_transformed(name: str, model: nn.Module, episode: Episode, loss: Callable[..., Tensor]) -> None:
    """Derivatives by the rates of all parameters: from the second step on they hold second derivatives of the loss."""
    rates = {param: torch.tensor(RATE, dtype=F64, requires_grad=True) for param, _ in model.named_parameters()}
    options: dict[str, Any] = {"loss": loss, "steps": STEPS, "first_order": name in FIRST_ORDER}

    def losses(lr: dict[str, Tensor]) -> Tensor:
        return meta_loss(model, episode.support, episode.query, lr=lr, **options).sum()

    got = torch.func.grad(losses)(rates)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = hand_written(model, episode, rate=lambda param, _: rates[param], **options).sum()
    want = torch.autograd.grad(expected, list(rates.values()))
    largest = max(float(g.abs()) for g in want)
    for param, b in zip(got, want, strict=True):
        error = float((got[param] - b).abs())
        assert error <= 1e-10 * largest, (
            f"derivative by the rate of {param} is off by {error}, the largest is {largest}"
        )


@pytest.mark.parametrize("name", LAYERS)
def test_layer_in_torch_func(name: str) -> None:
    compare_transformed(name, *problem(*LAYERS[name]), F.mse_loss)


@pytest.mark.parametrize("name", LOOPED)
def test_layer_that_torch_vmap_cannot_run(name: str) -> None:
    model, episode = problem(*LOOPED[name])
    with pytest.warns(UserWarning, match="evaluated one after another, as torch.vmap fails in"):
        compare(name, model, episode, F.mse_loss, "auto")


def classification(draw: Callable[[int, torch.Generator], Tensor]) -> tuple[nn.Module, Episode]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 4, 2, dtype=F64)
    y = [torch.stack([draw(4, generator) for _ in range(3)]) for _ in range(2)]
    for labels in y:
        if labels.dtype == torch.int64:
            labels[:, :2] = torch.tensor([0, 2])  # not all ignored
    return nn.Sequential(nn.Linear(2, 3), nn.Softsign(), nn.Linear(3, 3)).double(), Episode((x[0], y[0]), (x[1], y[1]))


@pytest.mark.parametrize("name", LOSSES)
def test_loss(name: str) -> None:
    loss, draw = LOSSES[name]
    model, episode = classification(draw)
    compare(name, model, episode, loss, True)
    compare_transformed(name, model, episode, loss)


@pytest.mark.parametrize("name", LOOPED_LOSSES)
def test_loss_that_torch_vmap_cannot_run(name: str) -> None:
    loss, draw = LOOPED_LOSSES[name]
    model, episode = classification(draw)
    with pytest.warns(UserWarning, match="evaluated one after another, as torch.vmap fails in"):
        compare(name, model, episode, loss, "auto")


def test_the_others_need_no_loop() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the tasks are evaluated")
        for name in ("Linear", "Conv2d", "TransformerEncoderLayer eval"):
            model, episode = problem(*LAYERS[name])
            adapt(model, *episode.support)
