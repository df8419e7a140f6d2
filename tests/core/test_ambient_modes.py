"""Caches do not depend on the device, mode or transform that surrounded the call that filled them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from metakern import adapt, meta_loss
from metakern.core import memo as _memo
from metakern.inner_loop.engines import mlp as _fused_inner_loop
from metakern.maml import meta_backward
from metakern.ops import (
    LSTMState,
    inner_update,
    lstm_step,
    lstm_step_,
    mlp_inner_loop,
    mlp_meta_loss,
)
from metakern.optim import LearnedOptimizer
from metakern.rules import CoordinatewiseLSTM
from metakern.tasks import digit_networks, digits
from tests.conftest import BACKENDS, assert_close
from tests.inner_loops import mlp, regression

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = torch.device("cpu")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device=DEVICE)


def forget() -> None:
    """Clear all caches."""
    _memo._constant.cache_clear()
    _fused_inner_loop.served_before.clear()
    for cached in (digits.all_digits, digits._classes, digit_networks.load_digits):
        cached.cache_clear()


# --------------------------------------------------------------------------------------------------------- contexts


class Functions(TorchFunctionMode):
    """Function mode that changes every new constant."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result + 1 if func is torch.tensor else result


class Dispatched(TorchDispatchMode):
    """Dispatch mode that changes every new constant."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result + 1 if "lift_fresh" in str(func) else result


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


Call = Callable[[], Any]


def within(context: Callable[[], Any]) -> Callable[[Call], Any]:
    def run(call: Call) -> Any:
        with context():
            return call()

    return run


def traced(mode: str) -> Callable[[Call], Any]:
    return lambda call: make_fx(lambda: call(), tracing_mode=mode, _allow_non_fake_inputs=True)()


def scaled(call: Call) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        call()
        return x.sum()

    return function


CONTEXTS: dict[str, Callable[[Call], Any]] = {
    "torch.device": within(lambda: torch.device("meta")),
    "set_default_device": within(default_device),
    "FakeTensorMode": within(lambda: FakeTensorMode(allow_non_fake_inputs=True)),
    "make_fx real": traced("real"),
    "make_fx fake": traced("fake"),
    "make_fx symbolic": traced("symbolic"),
    "torch.func.grad": lambda call: grad(scaled(call))(torch.ones(2, device=DEVICE)),
    "torch.func.vmap": lambda call: vmap(scaled(call))(torch.ones(2, 2, device=DEVICE)),
    "inference_mode": within(torch.inference_mode),
    "no_grad": within(torch.no_grad),
    "TorchFunctionMode": within(Functions),
    "TorchDispatchMode": within(Dispatched),
    "autocast": within(lambda: torch.autocast("cpu")),
}

# ------------------------------------------------------------------------------------------------------------ calls


def sets() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    episode = regression(3, 4, 5, 2, 1)
    return episode.support, episode.query


#: Created here, outside all contexts.
SETS, NET = sets(), mlp(2, 4, 1)
PARAMS = [drawn(3, 4, 2), drawn(3, 4, seed=1), drawn(3, 1, 4, seed=2), drawn(3, 1, seed=3)]
RATES = [torch.full((3,), 0.1, dtype=torch.float64)] * 4
COORDINATES, GRADIENTS = drawn(7), drawn(7, seed=1)
STATE = LSTMState.zeros(7, hidden_size=4, num_layers=1, dtype=torch.float64)
RULES = {name: CoordinatewiseLSTM(4, 1, backend=name).double() for name in BACKENDS}
for rule in RULES.values():
    rule.load_state_dict(RULES["reference"].state_dict())


def by_meta_loss(backend: str) -> list[Tensor]:
    net = NET
    losses = meta_loss(net, *SETS, steps=3, lr=0.1, backend=backend)
    return [losses, *torch.autograd.grad(losses.mean(), list(net.parameters()))]


def by_adapt(backend: str) -> list[Tensor]:
    net, (support, query) = NET, SETS
    prediction = adapt(net, *support, steps=3, lr=0.1, backend=backend)(query[0])
    return [prediction, *torch.autograd.grad(prediction.sum(), list(net.parameters()))]


def by_meta_backward(backend: str) -> list[Tensor]:
    net = NET
    for _ in range(2):
        net.zero_grad()
        losses = meta_backward(net, *SETS, steps=3, lr=0.1, backend=backend)
    return [losses, *[p.grad for p in net.parameters() if p.grad is not None]]


def by_operators(backend: str) -> list[Tensor]:
    params = PARAMS
    options: dict[str, Any] = {"lr": RATES, "per_step": True}
    options |= {
        "steps": 3,
        "backend": backend,
        "adapted": [True, True, False, True],
        "first_order": [True, False, True],
    }
    support, query = SETS
    losses = mlp_meta_loss(params, support, query, step_weights=[0.0, 0.5, 1.0], **options)
    return [losses, *mlp_inner_loop(params, *support, **options)]


def by_inner_update(backend: str) -> list[Tensor]:
    return inner_update(PARAMS[:1], [PARAMS[0].cos()], 0.1, clip_norm=0.5, backend=backend)


def by_lstm_step(backend: str) -> list[Tensor]:
    rule, params, grads, state = RULES[backend], COORDINATES, GRADIENTS, STATE
    new, state = lstm_step(params, grads, state, rule.weights(), backend=backend)
    lstm_step_(new, grads, state, rule.weights(), backend=backend)
    return [new, state.data, rule(params, grads, rule.init_state(params))[0]]


OPTIMIZED: dict[str, Any] = {}


def by_optimizer(backend: str) -> list[Tensor]:
    """State and optimizer are created in the first step and kept."""
    net, optimizer = OPTIMIZED[backend]
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(0.5)
            p.grad = torch.ones_like(p)
    optimizer.state.clear()
    optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def by_digits(backend: str) -> list[Tensor]:
    images, labels = digit_networks.load_digits("valid")
    return [
        images,
        labels.double(),
        digits._classes()["test"].images.double(),
        (images * nn.Parameter(images[0])).sum(),
    ]


CALLS = {
    call.__name__: call
    for call in (by_meta_loss, by_adapt, by_meta_backward, by_operators, by_inner_update, by_lstm_step, by_optimizer)
}


#: Contexts in which every call works.
SERVED = ("torch.device", "set_default_device")


def check(call: Callable[[str], list[Tensor]], backend: str, context: str) -> None:
    forget()
    for name in ("reference", backend):
        torch.manual_seed(0)
        net, rule = nn.Linear(3, 2), CoordinatewiseLSTM(4, 1, backend=name)
        OPTIMIZED[name] = net, LearnedOptimizer(net.parameters(), rule)
    expected = [x.detach().clone() for x in call("reference")]
    forget()
    # Calls may be refused in the other contexts.
    refusals = contextlib.nullcontext() if context in SERVED else contextlib.suppress(Exception)
    with refusals:
        CONTEXTS[context](lambda: call(backend))
    for _ in range(2):
        for index, (got, want) in enumerate(zip(call(backend), expected, strict=True)):
            assert_close(f"result {index}", got, want, 1e-5 if want.dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", CALLS)
def test_a_call_after_one_in_a_context(name: str, context: str) -> None:
    check(CALLS[name], "cpp", context)


def by_short_operator(backend: str) -> list[Tensor]:
    """Short, as Triton's interpreter is slow."""
    params, (x, y) = [PARAMS[0][0, :1], PARAMS[1][0, :1]], SETS[0]
    return mlp_inner_loop(params, x[:1], y[:1], lr=0.1, steps=1, backend=backend)


@pytest.mark.parametrize("context", ["torch.device", "TorchFunctionMode"])
@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's kernels run on the GPU here")
def test_constants_of_triton_kernels(context: str) -> None:
    check(by_short_operator, "triton", context)


@pytest.mark.parametrize("context", CONTEXTS)
def test_data_that_were_first_loaded_in_a_context(context: str) -> None:
    check(by_digits, "reference", context)


@pytest.mark.parametrize("call", ["meta_loss", "adapt"])
@pytest.mark.parametrize("kind", ["torch.device", "set_default_device"])
def test_a_call_where_another_device_is_the_default(call: str, kind: str) -> None:
    forget()
    expected = CALLS[f"by_{call}"]("reference")
    episode, net = sets(), mlp(2, 4, 1)

    def run() -> Tensor:
        if call == "meta_loss":
            return meta_loss(net, *episode, steps=3, lr=0.1)
        return adapt(net, *episode[0], steps=3, lr=0.1)(episode[1][0])

    assert_close("result", CONTEXTS[kind](run), expected[0], 1e-12)
    assert_close("result", run(), expected[0], 1e-12)


def test_long_constants_are_not_kept() -> None:
    forget()
    net, (support, _) = mlp(2, 4, 1), sets()
    adapt(net, *support, steps=2000, lr=1e-4, loss=F.mse_loss)
    assert _memo._constant.cache_info().currsize == 0
