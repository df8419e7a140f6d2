"""Random edits of models between calls: the fused inner loop detects every edit, or declines the call."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrize

from metakern import meta_loss
from metakern.maml import meta_backward
from tests.conftest import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

#: Total number of edit sequences, split into separate tests.
SEQUENCES, PARTS = 500, 10

WIDTHS = (2, 3, 2)


class Net(nn.Module):
    """The same layers with a custom forward."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.view(x.shape[0], -1))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(*WIDTHS[:2]), nn.Linear(*WIDTHS[1:])
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(F.relu(self.first(x))))


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Derived(nn.Sequential):
    """A subclass whose forward a test may patch."""


class Walk:
    """A model undergoing a sequence of edits."""

    def __init__(self, seed: int, stack: contextlib.ExitStack) -> None:
        self.random, self.stack = random.Random(seed), stack
        torch.manual_seed(seed)
        layers = [nn.Linear(*WIDTHS[:2]), nn.ReLU(), nn.Linear(*WIDTHS[1:])]
        kinds: list[Callable[[], nn.Module]] = [
            lambda: nn.Sequential(*layers),
            lambda: nn.Sequential(nn.Sequential(*layers[:2]), nn.Identity(), layers[2]),
            lambda: nn.Sequential(nn.Flatten(), layers[0], nn.Tanh(), nn.Dropout(), layers[2]),
            lambda: Net(nn.Sequential(*layers)),
            Functional,
            lambda: Derived(*layers),
        ]
        self.dtype = torch.float64
        self.clip_norm = self.random.choice([None, None, 0.5])
        self.net = self.random.choice(kinds)().double().train(self.random.random() < 0.3)
        self.handles: list[Any] = []
        self.restore: list[Callable[[], None]] = []

    def pick(self, *kinds: type) -> nn.Module | None:
        found = [m for m in self.net.modules() if not kinds or isinstance(m, kinds)]
        return self.random.choice(found) if found else None

    def linear(self) -> nn.Linear:
        found = self.pick(nn.Linear)
        return found if isinstance(found, nn.Linear) else nn.Linear(2, 2)

    def parameter(self) -> nn.Parameter | None:
        parameters = list(self.net.parameters())
        return self.random.choice(parameters) if parameters else None

    def place(self, *kinds: type) -> tuple[nn.Module, str] | None:
        """A module of one of these classes by its parent and name."""
        found = [(m, name) for m in self.net.modules() for name, c in m._modules.items() if isinstance(c, kinds)]
        return self.random.choice(found) if found else None


# ------------------------------------------------------------------------------------------------------------ edits


def swap_activation(walk: Walk) -> None:
    place = walk.place(nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU, nn.LeakyReLU)
    if place:
        kinds = [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.Softplus, lambda: nn.LeakyReLU(0.2)]
        setattr(*place, walk.random.choice(kinds)())


def swap_layer(walk: Walk) -> None:
    place = walk.place(nn.Linear)
    if place:
        old = getattr(*place)
        setattr(*place, nn.Linear(old.in_features, old.out_features, bias=walk.random.random() < 0.7).to(walk.dtype))


def assign_weight(walk: Walk) -> None:
    linear = walk.linear()
    if "weight" in linear._parameters:
        linear.weight = nn.Parameter(torch.randn_like(linear.weight))


def write_weight(walk: Walk) -> None:
    p = walk.parameter()
    if p is not None:
        with torch.no_grad():
            p.mul_(1.5)


def delete_weight(walk: Walk) -> None:
    linear = walk.linear()
    if "weight" in linear._parameters:
        weight = linear.weight.detach() * 2
        del linear.weight
        linear.weight = weight  # type: ignore[assignment]


def no_bias(walk: Walk) -> None:
    linear = walk.linear()
    if "bias" in linear._parameters:
        linear.bias = None  # type: ignore[assignment]


def freeze(walk: Walk) -> None:
    p = walk.parameter()
    if p is not None:
        p.requires_grad_(not p.requires_grad)


def cast(walk: Walk) -> None:
    walk.dtype = torch.float32 if walk.dtype == torch.float64 else torch.float64
    walk.net.to(walk.dtype)


def cast_one(walk: Walk) -> None:
    walk.linear().to(walk.random.choice([torch.float32, torch.float64]))


def hook(walk: Walk) -> None:
    module = walk.pick()
    assert module is not None
    options: dict[str, Any] = walk.random.choice([{}, {"always_call": True}, {"prepend": True}])
    walk.handles.append(module.register_forward_hook(lambda m, inputs, output: 0.5 * output, **options))


def hook_with_keywords(walk: Walk) -> None:
    module = walk.pick(nn.Linear, nn.ReLU)
    if module is not None:
        walk.handles.append(module.register_forward_hook(lambda m, a, k, output: output + 1, with_kwargs=True))


def hook_before(walk: Walk) -> None:
    module = walk.pick()
    assert module is not None
    walk.handles.append(module.register_forward_pre_hook(lambda m, inputs: (2 * inputs[0],)))


def unhook(walk: Walk) -> None:
    if walk.handles:
        walk.handles.pop(walk.random.randrange(len(walk.handles))).remove()


def hook_everywhere(walk: Walk) -> None:
    if walk.random.random() < 0.5:
        handle = register_module_forward_hook(lambda m, inputs, output: 1.5 * output)
    else:
        handle = register_module_forward_pre_hook(lambda m, inputs: (inputs[0] + 0.1,) if inputs else None)
    walk.handles.append(handle)
    walk.stack.callback(handle.remove)


def patch_instance(walk: Walk) -> None:
    module = walk.pick(nn.Linear, nn.ReLU, nn.Tanh, nn.Sequential)
    if module is not None:
        old = module.forward
        module.forward = lambda x: 0.5 * old(x)  # type: ignore[method-assign]
        walk.restore.append(lambda: module.__dict__.pop("forward", None))


def patch_class(walk: Walk) -> None:
    kind: Any = walk.random.choice([nn.Linear, nn.ReLU, nn.Tanh, nn.Sequential, Derived, nn.Identity])
    kept = kind.__dict__.get("forward")
    old = kind.forward

    def restore() -> None:
        if kept is None:
            kind.__dict__.get("forward") and delattr(kind, "forward")
        else:
            kind.forward = kept

    kind.forward = lambda self, x: 0.5 * old(self, x)
    walk.stack.callback(restore)
    walk.restore.append(restore)


def patch_function(walk: Walk) -> None:
    old = F.relu
    F.relu = lambda *a, **k: old(*a, **k).sin()

    def restore() -> None:
        F.relu = old

    walk.stack.callback(restore)
    walk.restore.append(restore)


def restore(walk: Walk) -> None:
    if walk.restore:  # the last, as patches hold what they replaced
        walk.restore.pop()()


def switch_mode(walk: Walk) -> None:
    walk.net.train(not walk.net.training)


def nest(walk: Walk) -> None:
    place = walk.place(nn.Linear, nn.ReLU, nn.Tanh)
    if place:
        setattr(*place, nn.Sequential(getattr(*place)))


def empty(walk: Walk) -> None:
    found = [m for m in walk.net.modules() if isinstance(m, nn.Sequential) and len(m) and m is not walk.net]
    if found:
        del walk.random.choice(found)[-1]


def insert(walk: Walk) -> None:
    if isinstance(walk.net, nn.Sequential):
        layer = walk.random.choice([nn.Identity, nn.Dropout, nn.ReLU, lambda: nn.LeakyReLU(0.3)])()
        walk.net.insert(walk.random.randrange(len(walk.net) + 1), layer.train(walk.net.training))


def reparametrize(walk: Walk) -> None:
    linear = walk.linear()
    if parametrize.is_parametrized(linear):
        parametrize.remove_parametrizations(linear, "weight")
    elif "weight" in linear._parameters:
        parametrize.register_parametrization(linear, "weight", Halved())


def tie(walk: Walk) -> None:
    linear = walk.linear()
    if "weight" in linear._parameters and "bias" in linear._parameters and linear.out_features == linear.in_features:
        linear.bias = nn.Parameter(linear.weight[0].detach().clone())


def grow(walk: Walk) -> None:
    """A parameter that no layer uses."""
    walk.linear().register_parameter("extra", nn.Parameter(torch.zeros(2, dtype=walk.dtype)))


EDITS = [
    *(swap_activation, swap_layer, assign_weight, write_weight, delete_weight, no_bias, freeze, cast, cast_one),
    *(hook, hook_with_keywords, hook_before, unhook, unhook, hook_everywhere, patch_instance, patch_class),
    *(patch_function, restore, restore, restore, switch_mode, switch_mode, nest, empty, insert, reparametrize, tie),
    grow,
]

# ------------------------------------------------------------------------------------------------------- comparison


def outcome(walk: Walk, backend: str | None, call: Callable[..., Tensor]) -> list[Tensor] | type[Exception]:
    """Losses and gradients, or the kind of error."""
    generator = torch.Generator().manual_seed(1)
    sets = [torch.randn(2, n, w, generator=generator).to(walk.dtype) for n in (3, 2) for w in (WIDTHS[0], WIDTHS[-1])]
    torch.manual_seed(2)  # of dropout
    try:
        walk.net.zero_grad()
        losses = call(
            walk.net, tuple(sets[:2]), tuple(sets[2:]), lr=0.1, steps=2, backend=backend, clip_norm=walk.clip_norm
        )
        if call is meta_loss:
            losses.mean().backward()
    except Exception as error:
        return type(error)
    return [losses.detach(), *[p.grad for p in walk.net.parameters() if p.grad is not None]]


def compare(walk: Walk, trace: list[str]) -> None:
    call = walk.random.choice([meta_loss, meta_backward])
    got, expected = (outcome(walk, backend, call) for backend in (None, "reference"))
    if isinstance(expected, type) or isinstance(got, type):
        assert got is expected, f"{trace}: {got}, expected {expected}"
        return
    assert len(got) == len(expected), trace
    tolerance = 1e-10 if walk.dtype == torch.float64 else 1e-4
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_close(f"{trace}: result {index}", a, b, tolerance)


@contextlib.contextmanager
def paths() -> Iterator[list[bool]]:
    """Context that records for each call whether it was fused."""
    taken: list[bool] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            taken.append("fused inner loop, " in record.getMessage())

    log, handler = logging.getLogger("metakern"), Collect()
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield taken
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


@pytest.mark.parametrize("part", range(PARTS))
def test_edits_between_calls(part: int) -> None:
    fused, all_calls = 0, 0
    for seed in range(part, SEQUENCES, PARTS):
        with contextlib.ExitStack() as stack:
            walk = Walk(seed, stack)
            trace: list[str] = []
            for _ in range(walk.random.randint(2, 4)):
                for _ in range(walk.random.choice([0, 1, 1, 2])):
                    edit = walk.random.choice(EDITS)
                    trace.append(edit.__name__)
                    edit(walk)
                if walk.random.random() < 0.2:
                    with paths() as taken:  # meta_backward takes another path if nobody listens
                        compare(walk, [str(seed), type(walk.net).__name__, *trace])
                    fused, all_calls = fused + sum(taken), all_calls + len(taken)
                else:
                    compare(walk, [str(seed), type(walk.net).__name__, *trace])
    assert 0.1 * all_calls < fused < 0.9 * all_calls, f"{fused} of {all_calls} calls were fused: the walk tests nothing"
