"""Models that refer to their parts outside the registered submodules: a clone uses its own parts, or raises."""

from __future__ import annotations

import functools
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern import MAML, MetaSGD, clone_module
from tests.conftest import assert_close

Plain = Callable[[dict[str, Tensor], Tensor], Tensor]


@pytest.fixture(autouse=True)
def doubles() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


class Net(nn.Module):
    """Two layers; subclasses keep other references to them, and compute by those."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


def plain(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(F.linear(x, p["body.weight"], p["body.bias"]).tanh(), p["head.weight"], p["head.bias"])


def halved(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(0.5 * F.linear(x, p["body.weight"], p["body.bias"]).tanh(), p["head.weight"], p["head.bias"])


def by_hand(net: nn.Module, forward: Plain, x: Tensor, y: Tensor, steps: int = 2, lr: float = 0.1) -> Tensor:
    params = {name.replace("_orig_mod.", ""): p for name, p in net.named_parameters()}
    for _ in range(steps):
        grads = torch.autograd.grad(F.mse_loss(forward(params, x), y), list(params.values()), create_graph=True)
        params = {name: p - lr * g for (name, p), g in zip(params.items(), grads, strict=True)}
    return F.mse_loss(forward(params, x), y)


def check(net: nn.Module, forward: Plain, kind: Callable[..., Any] = MAML, clones: int = 1, **options: Any) -> None:
    """Query loss and meta-gradients of two steps are those of a loop by hand."""
    x, y = torch.randn(5, 2), torch.randn(5, 1)
    learner = kind(net, 0.1, **options)
    for _ in range(clones):
        learner = learner.clone()
    for _ in range(2):
        learner.adapt(F.mse_loss(learner(x), y))
    params = list(net.parameters())
    loss, expected = F.mse_loss(learner(x), y), by_hand(net, forward, x, y)
    assert_close("query loss", loss, expected, 1e-13)
    for got, want in zip(torch.autograd.grad(loss, params), torch.autograd.grad(expected, params), strict=True):
        assert_close("meta-gradient", got, want, 1e-12)


# ------------------------------------------------------------------------------------------ references that are rebound


class BoundMethod(Net):
    def __init__(self) -> None:
        super().__init__()
        self.f = self.body.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.f(x).tanh())


class PlainList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [self.body, torch.tanh, self.head]

    def forward(self, x: Tensor) -> Tensor:
        return functools.reduce(lambda h, layer: layer(h), self.layers, x)


class NestedContainers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.parts = {"first": ({"layer": self.body},), "last": types.SimpleNamespace(layer=self.head)}

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["last"].layer(self.parts["first"][0]["layer"](x).tanh())


class ListOfParameters(Net):
    def __init__(self) -> None:
        super().__init__()
        self.weights = [(self.body.weight, self.body.bias), (self.head.weight, self.head.bias)]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, *self.weights[0]).tanh(), *self.weights[1])


class OneOfTwoInAList(Net):
    """The head adapts in any case; the body by the list alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.body.weight, self.body.bias]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, *self.weights).tanh())


class KeyedByModule(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = {self.body: 1.0, self.head: 1.0}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scale[self.body] * self.body(x).tanh()) * self.scale[self.head]


class Child(nn.Module):
    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.parent = weakref.ref(parent)

    def forward(self, x: Tensor) -> Tensor:
        return self.parent().body(x)


class WeakParent(Net):
    def __init__(self) -> None:
        super().__init__()
        self.child = Child(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.child(x).tanh())


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class UnregisteredWrapper(Net):
    def __init__(self) -> None:
        super().__init__()
        self.wrapped = [Wrapper(self.body)]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wrapped[0](x).tanh())


class CompiledFunction(Net):
    def __init__(self) -> None:
        super().__init__()
        self.f = torch.compile(self.body.forward, backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.f(x).tanh())


class CompiledPart(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fast = [torch.compile(self.body, backend="eager")]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fast[0](x).tanh())


REBOUND = [
    BoundMethod,
    PlainList,
    NestedContainers,
    ListOfParameters,
    OneOfTwoInAList,
    KeyedByModule,
    WeakParent,
    UnregisteredWrapper,
    CompiledFunction,
    CompiledPart,
]


@pytest.mark.parametrize("kind", [MAML, MetaSGD])
@pytest.mark.parametrize("clones", [1, 3])
@pytest.mark.parametrize("make", REBOUND)
def test_references_of_a_clone_are_to_its_own_parts(make: type[Net], clones: int, kind: type) -> None:
    check(make(), plain, kind, clones)


def replaced_forward(net: Net) -> None:
    f = net.body.forward
    net.body.forward = lambda x: f(x)


def forward_of_the_whole(net: Net) -> None:
    f = net.forward
    net.forward = lambda x: f(x)


def wrapped_forward(net: Net) -> None:
    f = net.forward

    @functools.wraps(f)
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return f(*args, **kwargs)

    net.forward = forward


def partial_forward(net: Net) -> None:
    # How accelerate hooks into a module: the old forward is kept, the new one is a partial with the module.
    net.body._old_forward = net.body.forward

    def new_forward(module: nn.Module, x: Tensor) -> Tensor:
        return module._old_forward(x)

    net.body.forward = functools.update_wrapper(functools.partial(new_forward, net.body), net.body._old_forward)


def bound_function(net: Net) -> None:
    net.forward = types.MethodType(lambda self, x: self.head(self.body(x).tanh()), net)


def default_argument(net: Net) -> None:
    net.forward = lambda x, body=net.body, head=net.head: head(body(x).tanh())


def recursive_function(net: Net) -> None:
    def forward(x: Tensor, depth: int = 1) -> Tensor:
        return forward(net.body(x).tanh(), depth - 1) if depth else net.head(x)

    net.forward = forward


def hook_with_another_part(net: Net) -> None:
    net.body.register_forward_hook(lambda module, inputs, output: F.linear(inputs[0], net.body.weight, net.body.bias))


def bound_hook(net: Net) -> None:
    net.again = types.MethodType(lambda self, module, inputs: (inputs[0],) if self.body is module else None, net.body)
    net.body.body = net.body  # a module that holds itself
    net.body.register_forward_pre_hook(net.again)


PATCHES = [
    replaced_forward,
    forward_of_the_whole,
    wrapped_forward,
    partial_forward,
    bound_function,
    default_argument,
    recursive_function,
    hook_with_another_part,
    bound_hook,
]


@pytest.mark.parametrize("clones", [1, 2])
@pytest.mark.parametrize("patch", PATCHES)
def test_functions_that_replace_a_forward_use_the_clones_parts(patch: Callable[[Net], None], clones: int) -> None:
    net = Net()
    patch(net)
    check(net, plain, clones=clones)
    x = torch.randn(3, 2)
    assert_close("the original", net(x), plain(dict(net.named_parameters()), x), 1e-14)  # it is as it was


def test_a_forward_that_changes_the_output() -> None:
    net = Net()
    f = net.body.forward
    net.head.forward = lambda h, g=net.head.forward: g(0.5 * h)
    net.body.forward = lambda x: f(x)
    check(net, halved)


def test_what_a_function_counts_is_seen_by_all_who_share_it() -> None:
    net, calls = Net(), []
    f, count = net.forward, 0

    def forward(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        calls.append(count)
        return f(x)

    net.forward = forward
    clone = clone_module(net)
    for module in (net, clone, net):
        module(torch.ones(1, 2))
    assert calls == [1, 2, 3]
    assert count == 3


def test_plain_attributes_stay_shared() -> None:
    net = Net()
    net.history, net.names, net.frozen = [1, "a"], {"a": 1}, nn.Linear(1, 1)
    net.teacher = [nn.Linear(2, 2)]
    clone = clone_module(net)
    assert clone.history is net.history
    assert clone.names is net.names
    assert clone.teacher[0] is net.teacher[0]


def test_hooks_of_a_clone_are_its_own() -> None:
    net = Net()
    clone = MAML(net, 0.1).clone()
    clone.module.body.register_forward_hook(lambda *_: None)
    assert not net.body._forward_hooks


# ------------------------------------------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize("allow_unused", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_clones_of_a_compiled_model_run_as_it_is_written(backend: str, allow_unused: bool) -> None:
    net = torch.compile(Net(), backend=backend)
    with pytest.warns(
        UserWarning, match=r"clones of MAML run the model as it is written, without torch.compile"
    ) as seen:
        check(net, plain, allow_unused=allow_unused)
    assert [w.filename for w in seen if "clones of MAML" in str(w.message)] == [__file__]


def test_clones_of_a_module_compiled_in_place() -> None:
    net = Net()
    net.compile(backend="aot_eager")
    with pytest.warns(UserWarning, match="without torch.compile"):
        check(net, plain)
    nested = Net()
    nested.body = torch.compile(nested.body, backend="aot_eager")
    with pytest.warns(UserWarning, match="without torch.compile"):
        check(nested, plain)
    assert nested.body(torch.ones(1, 2)).shape == (1, 3)  # the original is still compiled


def test_scripted_models_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(Net())
    with pytest.raises(TypeError, match=r"model must not be scripted or traced, got RecursiveScriptModule"):
        MAML(scripted, 0.1).clone()


def test_lazy_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"LazyLinear take their shapes from the first call: call the model once"):
        MAML(nn.Sequential(nn.LazyLinear(3)), 0.1).clone()
