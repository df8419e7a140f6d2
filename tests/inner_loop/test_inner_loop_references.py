"""Models that refer to their own parts outside the registered submodules, all tasks at once and one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern import adapt, meta_loss
from metakern.inner_loop.clone import captures_tensors
from tests.conftest import assert_close
from tests.maml.test_maml_references import PATCHES, REBOUND, CompiledFunction, Net, by_hand, plain
from tests.maml.test_maml_references import doubles as doubles  # a fixture
from tests.maml.test_maml_stale import ByHelper, ByHelperToo


def check(net: nn.Module, forward: Callable[..., Tensor], vectorize: bool) -> None:
    x, y = torch.randn(3, 5, 2), torch.randn(3, 5, 1)
    losses = meta_loss(net, (x, y), (x, y), steps=2, lr=0.1, vectorize=vectorize)
    expected = torch.stack([by_hand(net, forward, x[task], y[task]) for task in range(3)])
    assert_close("losses", losses, expected, 1e-12)
    params = list(net.parameters())
    got, want = (torch.autograd.grad(one.mean(), params) for one in (losses, expected))
    for a, b in zip(got, want, strict=True):
        assert_close("meta-gradient", a, b, 1e-11)
    predictions = adapt(net, x, y, steps=2, lr=0.1, vectorize=vectorize)(x)
    assert_close("predictions", F.mse_loss(predictions, y, reduction="none").mean((1, 2)), expected, 1e-12)


def doubled(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.linear((2 * F.linear(x, p["body.weight"], p["body.bias"])).tanh(), p["head.weight"], p["head.bias"])


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("make", [*REBOUND, ByHelper, ByHelperToo])
def test_tasks_compute_with_their_own_parameters(make: type[Net], vectorize: bool) -> None:
    check(make(), doubled if make is ByHelperToo else plain, vectorize)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("patch", PATCHES)
def test_functions_that_replace_a_forward(patch: Callable[[Net], None], vectorize: bool) -> None:
    net = Net()
    patch(net)
    check(net, plain, vectorize)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("part", [False, True])
def test_compiled_models(part: bool, vectorize: bool, fresh_compiler: None) -> None:
    net = Net()
    if part:
        net.body = torch.compile(net.body, backend="eager")
    else:
        net = torch.compile(net, backend="eager")
    check(net, plain, vectorize)


class Counter(Net):
    """Keeps its parameters in a list, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.body.weight, self.body.bias]
        self.register_buffer("calls", torch.zeros(()))
        self.norm = nn.BatchNorm1d(2, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.head(F.linear(self.norm(x), *self.weights).tanh())


@pytest.mark.parametrize("vectorize", [True, False])
def test_buffers_of_such_a_model_stay_as_they_are(vectorize: bool) -> None:
    net = Counter()
    mean = net.norm.running_mean.clone()
    assert captures_tensors(net)

    def forward(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return plain(p, F.batch_norm(x, None, None, training=True))

    check(net, forward, vectorize)
    assert net.calls == 0
    assert torch.equal(net.norm.running_mean, mean)


def test_which_models_capture_tensors() -> None:
    for model in (Net(), ByHelper(), CompiledFunction(), nn.LSTM(2, 3), nn.BatchNorm1d(2), torch.compile(Net())):
        assert not captures_tensors(model)
    net = Net()
    net.lists, net.texts, net.other = [1, 2], {"a": "b"}, nn.Linear(2, 2)
    net.teacher = [nn.Linear(1, 1)]
    assert not captures_tensors(net)
    net.forward = lambda x, w=net.body.weight: x @ w
    assert captures_tensors(net)
    tied = Net()
    tied.unregistered = [nn.Linear(2, 3)]
    tied.unregistered[0].weight = tied.body.weight
    assert captures_tensors(tied)
    assert tied.unregistered[0].weight is tied.body.weight
