"""meta_backward equals losses.mean().backward(), at first by autograd, then without it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad

from metakern import adapt, meta_backward, meta_loss
from metakern.inner_loop.arguments import LoopOptions
from metakern.inner_loop.engines import ENGINES
from metakern.inner_loop.engines import mlp as _fused_inner_loop
from metakern.maml import per_step_batch_norm
from tests.conftest import assert_close, assert_same_bits
from tests.inner_loops import mlp, regression

Sets = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _forget() -> None:
    """Clear the cache of calls from other tests."""
    _fused_inner_loop.served_before.clear()


def sets(tasks: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> Sets:
    drawn = regression(tasks, 4, 5, 2, 3, seed=seed)
    support, query = (tuple(t.to(dtype) for t in pair) for pair in (drawn.support, drawn.query))
    return support, query  # type: ignore[return-value]


def classes(tasks: int = 3, seed: int = 0) -> Sets:
    (x, y), (query_x, query_y) = sets(tasks, seed=seed)
    return (x, y.argmax(2)), (query_x, query_y.argmax(2))


def expected(net: nn.Module, data: Sets, weights: Tensor | None = None, **options: Any) -> tuple[Tensor, list[Tensor]]:
    losses = meta_loss(net, *data, **options)
    mean = losses.mean() if weights is None else (losses * weights).sum()
    return losses.detach(), list(torch.autograd.grad(mean, list(net.parameters())))


def grads(net: nn.Module) -> list[Tensor]:
    found = [p.grad for p in net.parameters() if p.grad is not None]
    assert len(found) == len(list(net.parameters()))
    return found


@pytest.fixture
def no_autograd(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that, once called, makes losses with a graph fail: later calls must do without autograd."""

    def fail(*_: Any) -> Tensor:
        pytest.fail("an engine was asked for losses with a graph")

    def start() -> None:
        for engine in ENGINES:
            monkeypatch.setattr(type(engine), "meta_loss", fail)

    return start


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "five steps": {"steps": 5, "lr": 0.02},
    "first order": {"steps": 3, "first_order": True},
    "checkpoints": {"steps": 5, "checkpoint_every": 2},
    "cpp": {"backend": "cpp"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_losses_and_gradients_are_those_of_meta_loss(
    name: str, dtype: torch.dtype, activation: Callable[[], nn.Module], no_autograd: Any
) -> None:
    net, options = mlp(2, 5, 4, 3, activation=activation).to(dtype), OPTIONS[name]
    wanted = [expected(net, sets(dtype=dtype, seed=seed), **options) for seed in range(3)]
    _fused_inner_loop.served_before.clear()  # the first call does without autograd, too
    no_autograd()
    for seed, (losses, gradients) in enumerate(wanted):
        net.zero_grad()
        got = meta_backward(net, *sets(dtype=dtype, seed=seed), **options)
        assert not got.requires_grad
        assert_same_bits("losses", got, losses)
        for index, (a, b) in enumerate(zip(grads(net), gradients, strict=True)):
            assert_close(f"gradient {index}", a, b, 1e-13 if dtype == torch.float64 else 1e-6)


def test_classes_and_binary_targets(no_autograd: Any) -> None:
    net = mlp(2, 5, 3).double()
    binary = tuple((x, (y > 0).double()) for x, y in sets())
    cases: list[tuple[Sets, Any]] = [(classes(), F.cross_entropy), (binary, F.binary_cross_entropy_with_logits)]  # type: ignore[list-item]
    wanted = [expected(net, data, loss=loss) for data, loss in cases]
    no_autograd()
    for (data, loss), (losses, gradients) in zip(cases, wanted, strict=True):
        net.zero_grad()
        assert_same_bits("losses", meta_backward(net, *data, loss=loss), losses)
        for a, b in zip(grads(net), gradients, strict=True):
            assert_close("gradient", a, b, 1e-13)


def test_gradients_add_up_in_place(no_autograd: Any) -> None:
    net = mlp(2, 5, 3).double()
    meta_backward(net, *sets())
    once, kept = [g.clone() for g in grads(net)], grads(net)
    no_autograd()
    meta_backward(net, *sets())
    for a, b, same in zip(grads(net), once, kept, strict=True):
        assert a is same
        assert_close("gradient", a, 2 * b, 1e-13)


@pytest.mark.parametrize("lr", [torch.tensor(0.01), 0.01], ids=["by autograd", "without"])
def test_a_gradient_of_ones_own(lr: Any) -> None:
    net, weights = mlp(2, 5, 3).double(), torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64)
    _, gradients = expected(net, sets(), weights, lr=lr)
    meta_backward(net, *sets(), gradient=weights, lr=lr)
    for a, b in zip(grads(net), gradients, strict=True):
        assert_close("gradient", a, b, 1e-13)
    for bad, got in ((torch.ones(2), r"float32 \[2\]"), (torch.ones(3), r"float32 \[3\]"), (weights.sum(), r"\[\]")):
        with pytest.raises(ValueError, match=rf"gradient must be torch.float64 \[3\] on cpu, got .*{got}"):
            meta_backward(net, *sets(), gradient=bad, lr=lr)
    with pytest.raises(TypeError, match="gradient must be a tensor"):
        meta_backward(net, *sets(), gradient=1.0)  # type: ignore[arg-type]


def test_hooks_of_parameters_are_called() -> None:
    net, seen = mlp(2, 5, 3).double(), []
    meta_backward(net, *sets())
    first, second, *_ = net.parameters()
    handles = [
        first.register_hook(lambda g: seen.append("hook")),
        second.register_post_accumulate_grad_hook(lambda p: seen.append("post")),
    ]
    meta_backward(net, *sets())
    assert sorted(seen) == ["hook", "post"]
    for handle in handles:
        handle.remove()
    meta_backward(net, *sets())
    assert len(seen) == 2


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_gradients_lie_in_memory_as_their_parameters_do(optimizer: Any) -> None:
    """Fused optimizers walk both side by side."""
    nets = [mlp(2, 5, 3).double() for _ in range(2)]
    for net in nets:
        net[0].weight = nn.Parameter(net[0].weight.detach().T.contiguous().T)
    optimizers = [optimizer(net.parameters(), 0.1, fused=True) for net in nets]
    for _ in range(3):
        for net, of in zip(nets, optimizers, strict=True):
            of.zero_grad()
            if net is nets[0]:
                meta_backward(net, *sets())
            else:
                meta_loss(net, *sets()).mean().backward()
            assert net[0].weight.grad.stride() == net[0].weight.stride()  # type: ignore[union-attr, operator]
            of.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert_close("parameter", a.detach(), b.detach(), 1e-12)


def test_gradients_of_another_kind_go_on() -> None:
    net = mlp(2, 5, 3).double()
    meta_backward(net, *sets())
    once = grads(net)[0].clone()
    net.zero_grad()
    first = next(net.parameters())
    first.grad = torch.zeros(5, 2, dtype=torch.float64).to_sparse()
    meta_backward(net, *sets())
    assert_close("gradient", first.grad.to_dense(), once, 1e-12)


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected")
def test_anomalies_are_still_detected() -> None:
    net, ((x, y), query) = mlp(2, 5, 3).double(), sets()
    meta_backward(net, (x, y), query)
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="returned nan values"):
        meta_backward(net, (x * float("nan"), y), query)


def test_forward_mode_is_refused_at_every_call() -> None:
    net, ((x, y), query) = mlp(2, 5, 3).double(), sets()
    meta_backward(net, (x, y), query)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward"):
        meta_backward(net, (forward_ad.make_dual(x, x), y), query, backend="cpp")


def test_defaults_are_those_of_meta_loss() -> None:
    """Which the options that both share repeat."""
    for call in (meta_loss, adapt):
        defaults = {name: p.default for name, p in inspect.signature(call).parameters.items()}
        shared = LoopOptions._field_defaults
        assert {name: defaults[name] for name in shared} == shared


def test_other_models_and_options_go_by_autograd() -> None:
    (x, y), (query_x, query_y) = sets()
    rates = torch.full((2,), 0.1, dtype=torch.float64, requires_grad=True)
    cases: list[tuple[nn.Module, dict[str, Any]]] = [
        (nn.Sequential(nn.Linear(2, 5), nn.Softplus(), nn.Linear(5, 3)), {}),
        (mlp(2, 5, 3), {"lr": {"0.weight": rates, "0.bias": 0.1, "2.weight": 0.1, "2.bias": 0.1}, "steps": 2}),
        (mlp(2, 5, 3), {"clip_norm": 0.1}),
        (mlp(2, 5, 3), {"parameters": "2.*"}),
        (mlp(2, 5, 3), {"step_weights": [0.5, 0.5], "steps": 2}),
        (mlp(2, 5, 3), {"backend": "reference"}),
    ]
    for net, options in cases:
        net.double()
        losses, gradients = expected(net, ((x, y), (query_x, query_y)), **options)
        for _ in range(2):
            net.zero_grad()
            assert_close("losses", meta_backward(net, (x, y), (query_x, query_y), **options), losses, 1e-13)
            for a, b in zip(grads(net), gradients, strict=True):
                assert_close("gradient", a, b, 1e-12)
    assert rates.grad is not None
    assert bool((rates.grad != 0).all())


def test_frozen_parameters_get_none() -> None:
    net = mlp(2, 5, 3).double()
    next(net.parameters()).requires_grad_(False)
    for _ in range(2):
        meta_backward(net, *sets())
    assert [p.grad is None for p in net.parameters()] == [True, False, False, False]


def test_running_statistics_move_once() -> None:
    net = per_step_batch_norm(nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), steps=1).double()
    twin = per_step_batch_norm(nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), steps=1).double()
    twin.load_state_dict(net.state_dict())
    meta_backward(net, *sets())
    meta_loss(twin, *sets()).mean().backward()
    for (name, a), b in zip(net.state_dict().items(), twin.state_dict().values(), strict=True):
        assert_same_bits(name, a, b)


def test_no_grad_and_transforms() -> None:
    net = mlp(2, 5, 3).double()
    with torch.no_grad():
        for _ in range(2):
            net.zero_grad()
            meta_backward(net, *sets())
            assert len(grads(net)) == 4
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        meta_backward(net, *sets())
    with pytest.raises(RuntimeError, match="call meta_loss"):
        grad(lambda x: meta_backward(net, (x, sets()[0][1]), sets()[1]).sum())(sets()[0][0])


def test_errors_are_those_of_meta_loss_at_every_call() -> None:
    net = mlp(2, 5, 3).double()
    (x, y), (query_x, query_y) = classes()
    bad = query_y.clone()
    bad[0, 0] = 3
    for _ in range(2):
        with pytest.raises(ValueError, match="query_y"):
            meta_backward(net, (x, y), (query_x, bad), loss=F.cross_entropy)
        meta_backward(net, (x, y), (query_x, query_y), loss=F.cross_entropy, steps=1)
        with pytest.raises(TypeError, match="steps must be an integer"):
            meta_backward(net, (x, y), (query_x, query_y), loss=F.cross_entropy, steps=True)
        with pytest.raises(TypeError, match="unexpected keyword argument 'step'"):
            meta_backward(net, (x, y), (query_x, query_y), loss=F.cross_entropy, step=1)


def test_who_asks_hears_the_path(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    net = mlp(2, 5, 3).double()
    for _ in range(2):
        meta_backward(net, *sets(), explain=True)
        assert "fused inner loop" in capsys.readouterr().out
    with caplog.at_level(logging.DEBUG, "metakern"):
        meta_backward(net, *sets())
    assert "fused inner loop" in caplog.text
