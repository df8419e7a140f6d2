"""Changes of a model, its loss or PyTorch itself between calls: the fused inner loop detects them or declines."""

from __future__ import annotations

import contextlib
import functools
import gc
import subprocess
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from metakern import meta_loss
from tests.conftest import assert_close
from tests.inner_loop.engines.fused import EPISODE, Net, sequential, served

pytestmark = pytest.mark.usefixtures("one_thread")


def plain(net: Any, x: Tensor) -> Tensor:
    return net.last(F.relu(net.first(x)))


# -------------------------------------------------------------------------------------------------- changed modules


def times_half(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: 0.5 * function(x)


def hook_locally(net: Any, kind: str) -> None:
    hooks = {
        "forward": lambda: net[1].register_forward_hook(lambda m, i, output: 2 * output),
        "pre": lambda: net[1].register_forward_pre_hook(lambda m, inputs: (2 * inputs[0],)),
        "keywords": lambda: net[1].register_forward_hook(lambda m, a, k, output: 2 * output, with_kwargs=True),
        "always": lambda: net[1].register_forward_hook(lambda m, i, output: 2 * output, always_call=True),
        "backward": lambda: net[1].register_full_backward_hook(lambda m, i, o: None),
        "backward pre": lambda: net[1].register_full_backward_pre_hook(lambda m, o: None),
    }
    hooks[kind]()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "forward of a layer": lambda net: setattr(net[0], "forward", times_half(net[0].forward)),
    "forward of the model": lambda net: setattr(net, "forward", times_half(net.forward)),
    "forward of an activation": lambda net: setattr(net[1], "forward", lambda h: h.sin()),
    "forward as a method": lambda net: setattr(
        net[0], "forward", types.MethodType(lambda self, x: 2 * F.linear(x, self.weight, self.bias), net[0])
    ),
    "_call_impl": lambda net: setattr(net[0], "_call_impl", times_half(net[0]._call_impl)),
    "hook": lambda net: hook_locally(net, "forward"),
    "pre-hook": lambda net: hook_locally(net, "pre"),
    "hook with keywords": lambda net: hook_locally(net, "keywords"),
    "hook always called": lambda net: hook_locally(net, "always"),
    "parametrization": lambda net: parametrize.register_parametrization(net[0], "weight", nn.Tanh()),
    "pruning": lambda net: prune.l1_unstructured(net[0], "weight", 0.5),
    "weight norm": lambda net: torch.nn.utils.weight_norm(net[0]),
    "weight that is no parameter": lambda net: replaced(net[0]),
    "weight under a property": lambda net: net[0].__dict__.update(weight=2 * net[0].weight.detach()),
    "another activation": lambda net: net.__setitem__(1, nn.Softplus()),
    "dropout": lambda net: net.insert(1, nn.Dropout(0.0)),
}


def replaced(layer: nn.Linear) -> None:
    weight = layer.weight.detach() * 2
    del layer.weight
    layer.weight = weight  # type: ignore[assignment]


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_a_model_after_a_call(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    net = sequential()
    for _ in range(2):
        assert served(net, capsys)
    CHANGES[name](net)
    for _ in range(2):
        assert not served(net, capsys, vectorize=name != "weight norm")


@pytest.mark.parametrize("kind", ["backward", "backward pre"])
def test_backward_hooks_of_a_model(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    net = sequential()
    hook_locally(net, kind)
    with pytest.raises(RuntimeError, match="cannot run: the model has hooks"):
        meta_loss(net, EPISODE.support, EPISODE.query, backend="cpp")


@contextlib.contextmanager
def set_on(owner: Any, name: str, value: Any) -> Iterator[None]:
    had = name in vars(owner)
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old) if had else delattr(owner, name)


@contextlib.contextmanager
def handled(register: Callable[..., Any], hook: Callable[..., Any]) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return 0.5 * result if func is F.relu else result


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return 0.5 * result if func is torch.ops.aten.relu.default else result


LINEAR, RELU, CALL = nn.Linear.forward, F.relu, nn.Module.__call__

SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "class": lambda: set_on(nn.Linear, "forward", lambda self, x: 0.5 * LINEAR(self, x)),
    "activation's class": lambda: set_on(nn.ReLU, "forward", lambda self, x: x.sin()),
    "container's class": lambda: set_on(nn.Sequential, "forward", lambda self, x: 0.5 * self[2](self[0](x).tanh())),
    "container's order": lambda: set_on(nn.Sequential, "__iter__", lambda self: iter([self[0], self[2]][:1])),
    "call of a class": lambda: set_on(nn.ReLU, "__call__", lambda self, x: x.sin()),
    "call of all": lambda: set_on(nn.Module, "__call__", lambda self, *a: 0.5 * CALL(self, *a)),
    "weight of a class": lambda: set_on_class_property(),
    "function": lambda: set_on(F, "relu", lambda x, inplace=False: RELU(x).sin()),
    "function within": lambda: set_on(torch, "relu", lambda x: x.sin()),
    "global hook": lambda: handled(register_module_forward_hook, lambda m, i, output: 0.9 * output),
    "functions' mode": Functions,
    "dispatch mode": Dispatched,
}


@contextlib.contextmanager
def set_on_class_property() -> Iterator[None]:
    nn.Linear.weight = property(lambda self: 2 * self._parameters["weight"])  # type: ignore[assignment]
    try:
        yield
    finally:
        del nn.Linear.weight


@pytest.mark.parametrize("model", ["Sequential", "Net"])
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_changes_of_pytorch_after_a_call(name: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    net = sequential() if model == "Sequential" else Net(lambda net, x: net.last(net.relu(net.first(x))))
    net.relu = nn.ReLU() if model == "Net" else None
    by_container = "container" in name
    assert served(net, capsys)
    with SURROUNDINGS[name]():
        if name == "container's order":
            with pytest.raises(RuntimeError, match="cannot run"):
                meta_loss(net, EPISODE.support, EPISODE.query, backend="cpp") if model == "Sequential" else fail()
        else:
            assert served(net, capsys) == (model == "Net" and by_container)
    assert served(net, capsys)


def fail() -> None:
    raise RuntimeError("cannot run: this model has no container")


def test_global_backward_hooks(capsys: pytest.CaptureFixture[str]) -> None:
    refused = pytest.raises(RuntimeError, match="cannot run: global module hooks")
    with handled(register_module_full_backward_hook, lambda m, i, o: None), refused:
        meta_loss(sequential(), EPISODE.support, EPISODE.query, backend="cpp")


def test_a_nested_container_that_is_emptied(capsys: pytest.CaptureFixture[str]) -> None:
    net = sequential(nn.Linear(2, 5), nn.Sequential(nn.ReLU()), nn.Linear(5, 1))
    assert served(net, capsys)
    before = meta_loss(net, EPISODE.support, EPISODE.query, lr=0.1)
    del net[1][0]
    assert served(net, capsys), "two layers without an activation between"
    assert bool((meta_loss(net, EPISODE.support, EPISODE.query, lr=0.1) - before).abs().max() > 1e-3)


def test_a_subclass_whose_forward_is_patched(capsys: pytest.CaptureFixture[str]) -> None:
    class Own(nn.Sequential):
        pass

    torch.manual_seed(0)
    net = Own(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    assert served(net, capsys)
    with set_on(Own, "forward", lambda self, x: 0.5 * nn.Sequential.forward(self, x)):
        assert not served(net, capsys)
    assert served(net, capsys)


def test_layers_that_do_nothing_in_eval_mode(capsys: pytest.CaptureFixture[str]) -> None:
    net = sequential(nn.Linear(2, 5), nn.Dropout(), nn.ReLU(), nn.Dropout(), nn.Linear(5, 1), nn.Identity())
    assert served(net.eval(), capsys)
    with pytest.raises(RuntimeError, match=r"dropout in train\(\) mode"):
        meta_loss(net.train(), EPISODE.support, EPISODE.query, backend="cpp")


# -------------------------------------------------------------------------------- libraries that wrap a model's forward


def wrapped(model: nn.Module, before: Callable[[Any], Any], after: Callable[[Any], Any]) -> None:
    """Like accelerate's add_hook_to_module: the old forward is kept beside the new one, modules keep their class."""
    old = model.forward
    model._old_forward = old

    def new_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args = tuple(map(before, args))
        return after(old(*args, **kwargs))

    model.forward = functools.update_wrapper(functools.partial(new_forward, model), old)  # type: ignore[method-assign]


def prepared(model: nn.Module, dtype: torch.dtype) -> None:
    """Like accelerate's prepare with mixed precision: autocast around the forward, outputs in float32."""
    forward = torch.autocast("cpu", dtype)(model.forward)
    model.forward = lambda *a: forward(*a).float()  # type: ignore[method-assign]


@pytest.mark.parametrize("part", ["model", "layer", "activation"])
def test_forwards_that_a_library_wraps(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    for after, fused in ((lambda x: x, True), (lambda x: 2 * x, False)):
        net = sequential()
        assert served(net, capsys)
        wrapped({"model": net, "layer": net[0], "activation": net[1]}[part], lambda x: x, after)
        for _ in range(2):
            assert served(net, capsys) == fused, "what still computes a chain of layers is served"
        wrapped(net, lambda x: x + 1, lambda x: x)
        assert not served(net, capsys)


def test_mixed_precision_by_a_library() -> None:
    net = sequential().float()
    support, query = ((x.float(), y.float()) for x, y in (EPISODE.support, EPISODE.query))
    prepared(net, torch.bfloat16)
    losses = [meta_loss(net, support, query, steps=3, lr=0.1, backend=backend) for backend in (None, "reference")]
    assert_close("losses", *losses, 1e-6)
    with pytest.raises(RuntimeError, match=r"cannot run: .*autocast"):
        meta_loss(net, support, query, backend="cpp")


# ----------------------------------------------------------------------------------------------------------- memory


def test_models_are_not_kept_alive(capsys: pytest.CaptureFixture[str]) -> None:
    for make in (sequential, lambda: Net(plain)):
        model = make()
        assert served(model, capsys)
        child = next(m for m in model.modules() if isinstance(m, nn.Linear))
        child.__dict__["owner"] = model  # a child that refers to its model
        assert served(model, capsys)
        alive = weakref.ref(model)
        del model, child
        gc.collect()
        assert alive() is None


def test_losses_are_not_kept_alive(capsys: pytest.CaptureFixture[str]) -> None:
    def make() -> Callable[[Tensor, Tensor], Tensor]:
        return lambda p, t: F.mse_loss(p, t)

    loss = make()
    for _ in range(2):
        assert served(sequential(), capsys, loss=loss)
    alive = weakref.ref(loss)
    del loss
    gc.collect()
    assert alive() is None


PATCHED_BEFORE = """
import functools
import torch
from torch import nn
old = nn.Linear.forward
nn.Linear.forward = functools.wraps(old)(lambda self, x: 0.5 * old(self, x))
from metakern import meta_loss
net, sets = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1)), (torch.randn(3, 4, 2), torch.randn(3, 4, 1))
losses = [meta_loss(net, sets, sets, backend=backend) for backend in (None, "reference")]
torch.testing.assert_close(*losses)
"""


def test_changes_of_pytorch_before_the_package_is_imported() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", PATCHED_BEFORE], check=True)


def test_containers_with_nothing_in_a_place() -> None:
    net = sequential()
    net.register_module("3", None)
    with pytest.raises(TypeError):
        meta_loss(net, EPISODE.support, EPISODE.query)
