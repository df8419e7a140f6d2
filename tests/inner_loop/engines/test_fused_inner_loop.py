"""adapt and meta_loss by the fused inner loop, under torch.func and torch.compile; backend="cpp" is the fused one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils import _pytree as pytree

from metakern import adapt, meta_loss
from metakern.core import backend as _backend
from metakern.inner_loop.engines import mlp as _fused_inner_loop
from metakern.inner_loop.engines import mlp_model as _mlp
from metakern.inner_loop.remembered import Remembered
from tests.conftest import assert_close, assert_same_bits
from tests.inner_loops import mlp, regression

F64 = torch.float64
B = 3

pytestmark = pytest.mark.usefixtures("one_thread")


class Objective(nn.Module):
    """Query losses [T] of a network, by one of the two calls."""

    def __init__(self, net: nn.Module, call: str, **options: Any) -> None:
        super().__init__()
        self.net, self.call, self.options = net, call, {"steps": 2, "lr": 0.1, **options}

    def forward(self, *data: Tensor) -> Tensor:
        if self.call == "meta_loss":
            return meta_loss(self.net, data[:2], data[2:], **self.options)
        prediction = adapt(self.net, *data[:2], **self.options)(data[2])
        return (prediction - data[3]).square().mean((1, 2))


def episode(dtype: torch.dtype = F64, tasks: int = 3, seed: int = 0) -> tuple[Tensor, ...]:
    drawn = regression(tasks, 4, 4, 2, 1, seed=seed)
    return tuple(t.to(dtype) for t in (*drawn.support, *drawn.query))


def assert_all_close(got: Any, expected: Any, tolerance: float = 1e-12) -> None:
    for index, (a, b) in enumerate(zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True)):
        assert_close(f"result {index}", a, b, tolerance)


# ------------------------------------------------------------------------------------ torch.func

Losses = Callable[..., Tensor]

#: Transforms of f(parameters, support_x), given parameters, stacked parameters and x.
SERVED: dict[str, Callable[[Losses, Any, Any, Tensor], Any]] = {
    "grad": lambda f, p, ps, x: grad(lambda p: f(p, x).square().sum())(p),
    "jacrev": lambda f, p, ps, x: jacrev(f)(p, x),
    "vmap of grad": lambda f, p, ps, x: vmap(grad(lambda p: f(p, x).square().sum()))(ps),
    "grad of vmap": lambda f, p, ps, x: grad(lambda ps: vmap(lambda p: f(p, x))(ps).square().sum())(ps),
    "vmap over samples": lambda f, p, ps, x: vmap(lambda x: f(p, x))(torch.stack([x, x / 2])),
    "grad by samples' vmap": lambda f, p, ps, x: vmap(grad(lambda p, x: f(p, x).sum()), (None, 0))(
        p, x.expand(2, *x.shape)
    ),
}
REFUSED: dict[str, tuple[str, Callable[[Losses, Any, Any, Tensor], Any]]] = {
    "hessian": ("it has no forward-mode derivative", lambda f, p, ps, x: hessian(lambda p: f(p, x).sum())(p)),
    "jvp": ("it has no forward-mode derivative", lambda f, p, ps, x: jvp(lambda p: f(p, x), (p,), (p,))),
    "grad of grad": (
        "torch.func differentiates it twice",
        lambda f, p, ps, x: grad(lambda p: sum(g.sum() for g in grad(lambda p: f(p, x).sum())(p).values()))(p),
    ),
    "by samples": ("the samples require gradients", lambda f, p, ps, x: grad(lambda x: f(p, x).sum())(x)),
    "by batched samples": (
        "the samples require gradients",
        lambda f, p, ps, x: grad(lambda xs: vmap(lambda x: f(p, x))(xs).sum())(torch.stack([x, x / 2])),
    ),
}


def transformed(transform: Callable[[Losses, Any, Any, Tensor], Any], call: str, **options: Any) -> Any:
    """Apply a transform to the query losses as a function of the parameters."""
    model, (x, *data) = Objective(mlp(2, 5, 1), call, **options), episode()
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    batch = {name: torch.stack([p.detach() * (1 - 0.2 * i) for i in range(B)]) for name, p in params.items()}
    return transform(lambda p, x: functional_call(model, p, (x, *data)), params, batch, x)


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("call", ["adapt", "meta_loss"])
def test_functional_parameters(call: str, name: str) -> None:
    got, expected = (transformed(SERVED[name], call, backend=backend) for backend in ("cpp", "reference"))
    assert_all_close(got, expected)


@pytest.mark.parametrize("name", REFUSED)
def test_derivatives_that_plain_pytorch_serves(name: str, caplog: pytest.LogCaptureFixture) -> None:
    reason, transform = REFUSED[name]
    with caplog.at_level(logging.DEBUG, "metakern"):
        got = transformed(transform, "meta_loss")
    assert caplog.messages
    assert all(message.endswith(f"the fused inner loop does not serve: {reason}") for message in caplog.messages)
    assert_all_close(got, transformed(transform, "meta_loss", backend="reference"))
    with pytest.raises(RuntimeError, match=f"backend 'cpp' cannot run: {reason}"):
        transformed(transform, "meta_loss", backend="cpp")


def test_vmap_over_learned_rates() -> None:
    """Every element has its own rates and their gradients."""
    model, data, results = mlp(2, 5, 1), episode(), []
    rates = {name: torch.full((B, *p.shape), 0.1, dtype=F64) for name, p in model.named_parameters()}
    rates = {
        name: rate * torch.linspace(0.5, 1.5, B, dtype=F64).view(-1, *[1] * (rate.dim() - 1))
        for name, rate in rates.items()
    }
    for backend in ("cpp", "reference"):

        def loss(lr: Any, backend: str = backend) -> Tensor:
            return meta_loss(model, data[:2], data[2:], steps=2, lr=lr, backend=backend).sum()

        results.append((vmap(loss)(rates), vmap(grad(loss))(rates)))
    assert_all_close(*results)


def test_weights_of_steps_in_transforms() -> None:
    """Concrete step weights are read; traced ones fall back to plain PyTorch."""
    model, data, weights = mlp(2, 5, 1), episode(), torch.tensor([0.25, 0.75], dtype=F64)

    def losses(lr: Tensor, weights: Tensor, backend: str | None = "cpp") -> Tensor:
        return meta_loss(model, data[:2], data[2:], steps=2, lr=lr, step_weights=weights, backend=backend).sum()

    lr = torch.tensor(0.1, dtype=F64)
    assert_close("slope", grad(losses)(lr, weights), grad(losses)(lr, weights, "reference"), 1e-12)
    several = torch.stack([weights, weights.flip(0)])
    for function in (lambda w: losses(lr, w, None), lambda w: grad(losses)(lr, w, None)):
        assert_close("batch", vmap(function)(several), torch.stack([function(w) for w in several]), 1e-12)
    by_weights = grad(losses, argnums=1)
    assert_close("slope", by_weights(lr, weights, None), by_weights(lr, weights, "reference"), 1e-12)
    with pytest.raises(
        RuntimeError, match="step_weights is a tensor that requires a gradient, or whose values are not known"
    ):
        by_weights(lr, weights)


# ------------------------------------------------------------------------------------ torch.compile


def losses_and_gradients(function: Callable[..., Tensor], model: nn.Module, data: Any) -> list[Tensor]:
    losses = function(*data)
    return [losses, *torch.autograd.grad(losses.mean(), list(model.parameters()))]


@pytest.mark.parametrize(("dtype", "mode"), [(torch.float32, "inductor"), (F64, "aot_eager")])
def test_one_graph_serves_all_data(dtype: torch.dtype, mode: str) -> None:
    torch._dynamo.reset()
    net = mlp(2, 5, 1).to(dtype)
    rates = nn.ParameterDict(
        {n.replace(".", "_"): torch.full((2,), 0.1, dtype=dtype) for n, _ in net.named_parameters()}
    )
    model = Objective(net, "meta_loss", backend="cpp", lr=list(rates.values()))
    model.rates = rates  # among its parameters, so that gradients of them are compared
    counter = torch._dynamo.testing.CompileCounterWithBackend(mode)
    compiled = torch.compile(model.forward, fullgraph=True, backend=counter)
    for seed in range(3):
        data = episode(dtype, seed=seed)
        pairs = zip(losses_and_gradients(compiled, model, data), losses_and_gradients(model, model, data), strict=True)
        for index, (got, expected) in enumerate(pairs):
            assert_same_bits(f"result {index}", got, expected)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9)
    assert counter.frame_count == 1
    for tasks in (5, 9, 17):
        data = episode(dtype, tasks)
        assert_same_bits("losses", compiled(*data), model(*data))
    assert counter.frame_count == 2, "every count of tasks compiles a graph of its own"


COMPILED: dict[str, dict[str, Any]] = {
    "rate": {"lr": torch.tensor(0.1, dtype=F64)},
    "head": {"parameters": "2.*"},
    "mask": {"support_mask": torch.tensor([[True] * 4, [True, False, True, False], [False, True, True, True]])},
    "weights": {"step_weights": [0.25, 0.75]},
    "first order": {"first_order": [True, False]},
    "labels": {"loss": nn.CrossEntropyLoss()},
    "checkpoints": {"checkpoint_every": 1},
}


@pytest.mark.parametrize("options", COMPILED)
def test_options_compile_to_one_graph(options: str) -> None:
    torch._dynamo.reset()
    data = episode()
    if options == "labels":
        data = tuple(t if i % 2 == 0 else (t[..., 0] > 0).long() for i, t in enumerate(data))
    net = mlp(2, 5, 2 if options == "labels" else 1)
    model = Objective(net, "meta_loss", backend="cpp", **COMPILED[options])
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    pairs = zip(losses_and_gradients(compiled, model, data), losses_and_gradients(model, model, data), strict=True)
    for index, (got, expected) in enumerate(pairs):
        assert_same_bits(f"result {index}", got, expected)


def test_compiled_adapt_equals_eager() -> None:
    torch._dynamo.reset()
    model, data = Objective(mlp(2, 5, 1), "adapt", backend="cpp"), episode()
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert_all_close(losses_and_gradients(compiled, model, data), losses_and_gradients(model, model, data))


def test_compiled_transforms_take_plain_pytorch() -> None:
    torch._dynamo.reset()
    model, data = mlp(2, 5, 1), episode()

    def slope(lr: Tensor, backend: str | None) -> Tensor:
        return grad(lambda lr: meta_loss(model, data[:2], data[2:], steps=2, lr=lr, backend=backend).sum())(lr)

    lr, compiled = torch.tensor(0.1, dtype=F64), torch.compile(slope, fullgraph=True, backend="aot_eager")
    assert_close("slope", compiled(lr, None), slope(lr, "cpp"), 1e-12)
    with pytest.raises(Exception, match=r"backend 'cpp' cannot run: .*torch\.func transforms it within torch\.compile"):
        compiled(lr, "cpp")


def test_checkpoints_in_torch_func() -> None:
    got = transformed(SERVED["grad"], "meta_loss", backend="cpp", checkpoint_every=1)
    assert_all_close(got, transformed(SERVED["grad"], "meta_loss", backend="reference"))


def test_a_model_too_large_for_one_backend_goes_to_the_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served = []
    operator = _fused_inner_loop.mlp_meta_loss

    def spy(*args: Any, **options: Any) -> Tensor:
        served.append(options["backend"])
        return operator(*args, **options)

    monkeypatch.setattr(_fused_inner_loop, "mlp_meta_loss", spy)
    monkeypatch.setitem(_backend.PREFERRED, "cpu", ("cpp", "triton"))
    monkeypatch.setattr(_fused_inner_loop, "served_before", Remembered(most=8))
    data = episode(tasks=1)
    objective = Objective(mlp(2, 4, 1), "meta_loss", steps=1, explain=True)
    with torch.no_grad():
        expected = objective(*data)
        _fused_inner_loop.served_before.clear()
        monkeypatch.setattr(_mlp, "unserved", lambda *size: "it is too large")
        assert_close("losses", objective(*data), expected, 1e-12)
        assert served == ["cpp", "triton"]
        _fused_inner_loop.served_before.clear()
        monkeypatch.setattr(_mlp, "unserved_by_triton", lambda widths: "it is too wide")
        assert_close("losses", objective(*data), expected, 1e-12)
    assert served == ["cpp", "triton"]
    assert "it is too large; it is too wide" in capsys.readouterr().out


def test_a_remembered_call_is_served_as_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fused_inner_loop, "served_before", Remembered(most=8))
    remembered = _fused_inner_loop.served_before
    net, data = mlp(2, 4, 1), episode()
    objective = Objective(net, "meta_loss")
    losses = [objective(*data) for _ in range(2)]
    assert len(remembered) == 1
    assert_same_bits("losses", *losses)
    grads = [torch.autograd.grad(loss.sum(), list(net.parameters())) for loss in losses]
    for index, (a, b) in enumerate(zip(*grads, strict=True)):
        assert_same_bits(f"gradient {index}", a, b)


@pytest.mark.parametrize("change", ["weights", "dtype", "frozen", "activation", "hook", "samples"])
def test_what_is_remembered_does_not_outlive_a_change(change: str) -> None:
    net, data = mlp(2, 4, 1), episode()
    objective = Objective(net, "meta_loss")
    objective(*data)
    if change == "weights":
        net[0] = nn.Linear(2, 4).double()
    elif change == "dtype":
        net, data = net.float(), tuple(x.float() for x in data)
    elif change == "frozen":
        net[0].weight.requires_grad_(False)
    elif change == "activation":
        net[1] = nn.ReLU()
    elif change == "hook":
        net[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    else:
        data = tuple(x[:, :3] for x in data)
    expected = Objective(net, "meta_loss", backend="reference")(*data)
    assert_close("losses", objective(*data), expected, 1e-5 if change == "dtype" else 1e-12)


def test_what_is_remembered_is_not_taken_for_sets_of_another_kind() -> None:
    net, (x, y, query_x, query_y) = mlp(2, 4, 1), episode()
    meta_loss(net, (x, y), (query_x, query_y), steps=2, lr=0.1)
    with pytest.raises(TypeError, match="support must be a pair"):
        meta_loss(net, (x, y, query_x), (query_y,), steps=2, lr=0.1)


def test_a_loss_that_cannot_be_hashed_takes_the_generic_path() -> None:
    class Squares:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, prediction: Tensor, y: Tensor) -> Tensor:
            return (prediction - y).square().mean()

    net, data = mlp(2, 4, 1), episode()
    losses = Objective(net, "meta_loss", loss=Squares())(*data)
    assert_close("losses", losses, Objective(net, "meta_loss")(*data), 1e-12)
