"""Models and losses that the fused inner loop recognises from their recorded computation, and those it declines."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from metakern import adapt, meta_loss
from tests.conftest import assert_close
from tests.inner_loop.engines.fused import EPISODE, F64, Forward, Net, sequential, served
from tests.inner_loops import Episode, hand_written, regression

pytestmark = pytest.mark.usefixtures("one_thread")

# ----------------------------------------------------------------------------------------------------------- models

SERVED: dict[str, Forward] = {
    "F.relu": lambda net, x: net.last(F.relu(net.first(x))),
    "in place": lambda net, x: net.last(F.relu(net.first(x), inplace=True)),
    "torch.relu": lambda net, x: net.last(torch.relu(net.first(x))),
    "method": lambda net, x: net.last(net.first(x).tanh()),
    "method in place": lambda net, x: net.last(net.first(x).sigmoid_()),
    "module": lambda net, x: net.last(net.act(net.first(x))),
    "leaky": lambda net, x: net.last(F.leaky_relu(net.first(x), 0.3)),
    "leaky in place": lambda net, x: net.last(F.leaky_relu(net.first(x), inplace=True)),
    "no activation": lambda net, x: net.last(net.first(x)),
    "flatten": lambda net, x: net.last(net.first(x.flatten(1)).relu()),
    "view": lambda net, x: net.last(net.first(x.view(x.shape[0], -1)).relu()),
    "view of all": lambda net, x: net.last(net.first(x.view(-1, 2)).relu()),
    "reshape": lambda net, x: net.last(net.first(x.reshape(len(x), -1)).relu()),
    "torch.flatten": lambda net, x: net.last(net.first(torch.flatten(x, start_dim=1)).relu()),
    "functional": lambda net, x: F.linear(
        F.relu(F.linear(x, net.first.weight, net.first.bias)), net.last.weight, bias=net.last.bias
    ),
    "dropout in eval mode": lambda net, x: net.last(F.dropout(net.drop(net.first(x)).relu(), 0.5, net.training)),
    "casts that do nothing": lambda net, x: net.last(net.first(x.to(net.first.weight.dtype)).relu().contiguous()),
    "branches on shapes": lambda net, x: net.last(net.first(x).relu() if x.dim() == 2 else x),
}
UNSERVED: dict[str, tuple[str, Forward]] = {
    "scaled": ("calls mul", lambda net, x: net.last(0.5 * F.relu(net.first(x)))),
    "sine": ("calls sin", lambda net, x: net.last(net.first(x).sin())),
    "no_grad": ("_set_grad_enabled", lambda net, x: net.last(within(net.no_grad, net.first, x).relu())),
    "detached": ("calls detach", lambda net, x: net.last(net.first(x).detach().relu())),
    "data": ("calls data", lambda net, x: net.last(net.first(x).relu().data)),
    "gradient hook": ("calls requires_grad", lambda net, x: net.last(hooked(net.first(x)).relu())),
    "scaled weight": ("calls mul", lambda net, x: net.last(F.linear(x, 2 * net.first.weight, net.first.bias).relu())),
    "skip": ("something else than the last", lambda net, x: net.last(net.first(x).relu() + net.first(x))),
    "activation first": ("relu elsewhere than behind", lambda net, x: net.last(net.first(x.relu()))),
    "two activations": ("tanh elsewhere than behind", lambda net, x: net.last(net.first(x).relu().tanh())),
    "activation last": ("does not end in nn.Linear", lambda net, x: net.last(net.first(x)).relu()),
    "negative slope": ("leaky ReLU of slope -0.1", lambda net, x: net.last(F.leaky_relu(net.first(x), -0.1))),
    "tanh of gelu": ("calls gelu with an approx", lambda net, x: net.last(F.gelu(net.first(x), approximate="tanh"))),
    "another output": ("returns something else", lambda net, x: unseen_product(net.last(net.first(x).relu()))),
    "squeezed": ("calls squeeze", lambda net, x: net.last(net.first(x).relu()).squeeze(-1).unsqueeze(-1)),
    "on values": ("calls sum", lambda net, x: net.last(net.first(x).relu() if x.sum() > 0 else net.first(x).tanh())),
    "autocast": ("autocast", lambda net, x: net.last(within(autocast, net.first, x).relu().double())),
    "random": ("random numbers", lambda net, x: net.last(net.first(x).relu() if random.random() < 2 else x)),
    "attribute": ("changes attributes", lambda net, x: net.last(setattr(net, "seen", x) or net.first(x).relu())),
    "by size": ("of another size", lambda net, x: net.last(getattr(net.first(x), "relu" if len(x) == 4 else "tanh")())),
    "caught": ("calls sin", lambda net, x: net.last(caught(net.first(x)).relu())),
    "function of its own": ("gradients off", lambda net, x: net.last(Doubled.apply(net.first(x)).relu())),
    "unseen write": ("writes into samples or results", lambda net, x: net.last(unseen_write(net.first(x)).relu())),
    "own way to a weight": ("no parameters of the model", lambda net, x: net.last(F.linear(x, *net.kept).relu())),
    "raises": ("raises ValueError", lambda net, x: fails(x)),
}


def within(context: Callable[[], Any], function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with context():
        return function(x)


def autocast() -> Any:
    return torch.autocast("cpu")


def hooked(x: Tensor) -> Tensor:
    x.requires_grad and x.register_hook(lambda g: 2 * g)
    return x


def caught(x: Tensor) -> Tensor:
    try:
        return x.sin()
    except Exception:  # recording must not end by an exception caught here
        return x


class Doubled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is needed."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def unseen_write(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        x.mul_(0.5)
    return x


def unseen_product(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return x * 2


def fails(x: Tensor) -> Tensor:
    raise ValueError("no")


@pytest.mark.parametrize("name", SERVED)
def test_layers_in_a_module_of_ones_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    net = Net(SERVED[name]).eval()
    assert served(net, capsys)
    assert served(net, capsys, first_order=True, parameters="last.*")
    losses = meta_loss(net, EPISODE.support, EPISODE.query, steps=3, lr=0.1, backend="cpp")
    assert_close("losses", losses, hand_written(net, EPISODE, 3, lambda name, step: 0.1), 1e-11)


#: Plain PyTorch, or vmap, raises for these.
FAILING = ("raises", "unseen write", "data", "on values", "own way to a weight")


@pytest.mark.parametrize("name", [name for name in UNSERVED if name not in FAILING])
def test_modules_that_do_anything_else(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    reason, forward = UNSERVED[name]
    assert not served(Net(forward).eval(), capsys)
    with pytest.raises(RuntimeError, match=f"backend 'cpp' cannot run: .*{reason}"):
        meta_loss(Net(forward).eval(), EPISODE.support, EPISODE.query, backend="cpp")


@pytest.mark.parametrize("name", FAILING)
def test_modules_that_a_recording_cannot_follow(name: str) -> None:
    reason, forward = UNSERVED[name]
    net = Net(forward).eval()
    net.kept = [net.first.weight, net.first.bias]
    with pytest.raises(RuntimeError, match=f"backend 'cpp' cannot run: .*{reason}"):
        meta_loss(net, EPISODE.support, EPISODE.query, backend="cpp")


def test_rates_follow_the_order_of_parameters_not_of_layers(capsys: pytest.CaptureFixture[str]) -> None:
    net = Net(SERVED["F.relu"])
    rates = [0.05, 0.1, 0.15, 0.2]
    assert served(net, capsys, lr=rates)
    by_name = dict(zip(dict(net.named_parameters()), rates, strict=True))
    expected = hand_written(net, EPISODE, 3, lambda name, step: by_name[name])
    assert_close("losses", meta_loss(net, EPISODE.support, EPISODE.query, steps=3, lr=rates), expected, 1e-11)
    adapted = adapt(net, *EPISODE.support, lr=rates).parameters
    reference = adapt(net, *EPISODE.support, lr=rates, backend="reference").parameters
    assert list(adapted) == list(reference) == list(by_name)
    for name, p in adapted.items():
        assert_close(name, p, reference[name], 1e-11)


def test_images_are_flattened_by_any_view(capsys: pytest.CaptureFixture[str]) -> None:
    episode = regression(3, 4, 5, 2, 1)
    sets = [(x.view(*x.shape[:2], 1, 2), y) for x, y in (episode.support, episode.query)]
    for name in ("flatten", "view", "view of all", "reshape", "torch.flatten"):
        assert served(Net(SERVED[name]), capsys, Episode(*sets))
    numbers = [(x[..., 0], y) for x, y in (episode.support, episode.query)]  # [T, S]
    net = Net(lambda net, x: net.last(F.relu(F.linear(x.view(-1, 1), net.first.weight, net.first.bias))))
    net.first = nn.Linear(1, 5).double()
    assert served(net, capsys, Episode(*numbers))


def test_parameters_that_no_layer_uses(capsys: pytest.CaptureFixture[str]) -> None:
    net = Net(SERVED["F.relu"])
    net.extra = nn.Linear(2, 2).double()
    assert not served(net, capsys)
    for module in (0, 1, None):
        model = sequential()
        held = model if module is None else model[module]
        held.register_parameter("extra", nn.Parameter(torch.zeros(2, dtype=F64)))
        assert not served(model, capsys)
        assert list(adapt(model, *EPISODE.support).parameters) == list(dict(model.named_parameters()))


def test_a_recording_is_made_at_every_call(capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def forward(net: Any, x: Tensor) -> Tensor:
        calls.append(x.shape)
        return net.last(net.first(x).relu())

    net = Net(forward)
    for _ in range(2):
        calls.clear()
        meta_loss(net, EPISODE.support, EPISODE.query, steps=5, lr=0.1, backend="cpp")
        assert calls == [(4, 2), (5, 2)], "once for each size, whatever the number of steps and tasks"
    net.run = UNSERVED["scaled"][1]
    assert not served(net, capsys)


@pytest.mark.parametrize("where", ["attribute", "list", "closure", "loss"])
def test_calls_that_are_counted(where: str) -> None:
    """A later call may compute something else: here from the third on."""
    counts, net = [0], nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.count, self.counts = net, 0, [0]

        def forward(self, x: Tensor) -> Tensor:
            if where == "attribute":
                self.count += 1
            elif where == "list":
                self.counts[0] += 1
            elif where == "closure":
                counts[0] += 1
            return self.net(x) if self.count + self.counts[0] + counts[0] < 3 else self.net(-x)

    def loss(prediction: Tensor, y: Tensor) -> Tensor:
        counts[0] += where == "loss"
        return F.mse_loss(prediction, y)

    episode = regression(1, 4, 4, 2, 1)
    losses = meta_loss(Counting(), episode.support, episode.query, loss=loss, steps=3)
    assert type(losses.grad_fn).__name__ != "_EagerMetaLossBackward", "the fused inner loop serves"


def test_random_numbers_and_buffers_stay_as_they_were() -> None:
    """Models that draw random numbers or write buffers are recognised without running them."""
    net = Net(lambda net, x: net.last(F.dropout(net.first(x), 0.5, net.training).relu()))
    drawn = []
    for backend in (None, "reference"):
        torch.manual_seed(0)
        drawn.append(meta_loss(net, EPISODE.support, EPISODE.query, steps=2, backend=backend))
    assert_close("losses", *drawn, 1e-12)
    counting = Net(lambda net, x: net.last(net.first(x).relu() + 0 * net.count.add_(1)))
    counting.register_buffer("count", torch.zeros((), dtype=F64))
    meta_loss(counting, EPISODE.support, EPISODE.query, vectorize=False)
    assert counting.count == 0


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_modules_of_ones_own_in_torch_func(transform: str) -> None:
    net = Net(SERVED["F.relu"])

    def losses(params: Any, x: Tensor, backend: str) -> Tensor:
        class Objective(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def forward(self, x: Tensor) -> Tensor:
                return meta_loss(self.net, (x, EPISODE.support[1]), EPISODE.query, steps=2, lr=0.1, backend=backend)

        return functional_call(Objective(), {f"net.{name}": p for name, p in params.items()}, (x,))

    params, x = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}, EPISODE.support[0]
    results = []
    for backend in ("cpp", "reference"):
        one = functools.partial(losses, backend=backend)
        if transform == "grad":
            results.append(list(grad(lambda p, one=one: one(p, x).sum())(params).values()))
        else:
            results.append([vmap(lambda x, one=one: one(params, x))(torch.stack([x, x / 2]))])
    for got, expected in zip(*results, strict=True):
        assert_close("result", got, expected, 1e-11)


# ----------------------------------------------------------------------------------------------------------- losses

LOSSES: dict[str, Any] = {
    "lambda": lambda p, t: F.mse_loss(p, t),
    "partial": functools.partial(F.mse_loss, reduction="mean"),
    "keywords": lambda p, t: F.mse_loss(input=p, target=t),
    "pow": lambda p, t: (p - t).pow(2).mean(),
    "power": lambda p, t: ((p - t) ** 2).mean(),
    "square": lambda p, t: (t - p).square().mean(),
    "product": lambda p, t: torch.mean(torch.mul(d := torch.sub(p, t), d)),
    "module": nn.MSELoss(),
    "casts": lambda p, t: F.mse_loss(p, t.double()),
}
OTHER_LOSSES: dict[str, Any] = {
    "scaled": lambda p, t: 0.5 * F.mse_loss(p, t),
    "sum": functools.partial(F.mse_loss, reduction="sum"),
    "sum of squares": lambda p, t: (p - t).pow(2).sum(),
    "axis": lambda p, t: (p - t).pow(2).mean(0).sum(),
    "fourth": lambda p, t: (p - t).pow(4).mean(),
    "scaled difference": lambda p, t: torch.sub(p, t, alpha=2).pow(2).mean(),
    "of itself": lambda p, t: (p - p.detach()).pow(2).mean() + p.mean(),
    "absolute": nn.L1Loss(),
    "penalty": lambda p, t: F.mse_loss(p, t) + 0.1 * p.square().mean(),
    "two": lambda p, t: (F.mse_loss(p, t), F.mse_loss(2 * p, t))[1],
    "first of two": lambda p, t: (a := F.mse_loss(p, t), F.l1_loss(p, t), a)[2],
    "detached": lambda p, t: F.mse_loss(p.detach(), t) + 0 * p.sum() + p.mean(),
    "random": lambda p, t: F.mse_loss(p, t) if random.random() < 2 else F.l1_loss(p, t),
    "by size": lambda p, t: F.mse_loss(p, t) if len(p) == 4 else F.l1_loss(p, t),
}


@pytest.mark.parametrize("model", ["Sequential", "Net"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_by_what_they_compute(name: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    net = sequential() if model == "Sequential" else Net(SERVED["F.relu"])
    for _ in range(2):
        assert served(net, capsys, loss=LOSSES[name])


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_other_losses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not served(sequential(), capsys, loss=OTHER_LOSSES[name])


def labelled(binary: bool = False) -> Episode:
    (x, y), (query_x, query_y) = regression(3, 4, 5, 2, 3).support, regression(3, 4, 5, 2, 3).query
    targets = [(t > 0).double() if binary else t.argmax(2) for t in (y, query_y)]
    return Episode((x, targets[0]), (query_x, targets[1]))


def test_classification_losses(capsys: pytest.CaptureFixture[str]) -> None:
    net = sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 3))
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    plain: list[Any] = [lambda p, t: F.cross_entropy(p, t), nn.CrossEntropyLoss(), functools.partial(F.cross_entropy)]
    for loss in plain:
        assert served(net, capsys, labelled(), loss=loss)
    others: list[Any] = [
        lambda p, t: F.cross_entropy(p, t, weight),
        lambda p, t: F.cross_entropy(p, t, label_smoothing=0.1),
        lambda p, t: F.cross_entropy(p, t, ignore_index=0),
        lambda p, t: F.cross_entropy(2 * p, t),
        lambda p, t: F.nll_loss(p.log_softmax(1), t),
        nn.CrossEntropyLoss(label_smoothing=0.1),
    ]
    for loss in others:
        assert not served(net, capsys, labelled(), loss=loss)
    binary: list[Any] = [lambda p, t: F.binary_cross_entropy_with_logits(p, t), nn.BCEWithLogitsLoss()]
    for loss in binary:
        assert served(net, capsys, labelled(True), loss=loss)
    assert not served(net, capsys, labelled(True), loss=nn.BCEWithLogitsLoss(pos_weight=weight))


def test_labels_that_are_ignored_go_to_plain_pytorch(capsys: pytest.CaptureFixture[str]) -> None:
    net, episode = sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 3)), labelled()
    episode.support[1][0, 0] = -100
    for loss in (F.cross_entropy, nn.CrossEntropyLoss(), lambda p, t: F.cross_entropy(p, t)):
        assert not served(net, capsys, episode, loss=loss)


@pytest.mark.parametrize("kind", ["forward hook", "pre-hook", "backward hook", "forward", "class", "subclass"])
def test_changed_loss_modules(kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    loss = nn.MSELoss()
    assert served(sequential(), capsys, loss=loss)
    if kind == "forward hook":
        loss.register_forward_hook(lambda m, inputs, output: 2 * output)
    elif kind == "pre-hook":
        loss.register_forward_pre_hook(lambda m, inputs: (2 * inputs[0], inputs[1]))
    elif kind == "backward hook":
        loss.register_full_backward_hook(lambda m, inputs, outputs: None)
    elif kind == "forward":
        loss.forward = lambda p, t: (p - t).abs().mean()  # type: ignore[method-assign]
    elif kind == "class":
        monkeypatch.setattr(nn.MSELoss, "forward", lambda self, p, t: (p - t).abs().mean())
    else:

        class Scaled(nn.MSELoss):
            def forward(self, input: Tensor, target: Tensor) -> Tensor:
                return 3 * super().forward(input, target)

        loss = Scaled()
    assert not served(sequential(), capsys, loss=loss)


def test_masks_ask_for_a_loss_that_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    mask = torch.tensor([[True, True, False, True]] * 3)
    assert served(sequential(), capsys, loss=F.mse_loss, support_mask=mask)
    assert not served(sequential(), capsys, loss=functools.partial(F.mse_loss), support_mask=mask)


# ------------------------------------------------------------------------------------------- activations and clipping


def test_activations_of_each_layer(capsys: pytest.CaptureFixture[str]) -> None:
    layers = [nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4), nn.LeakyReLU(0.2), nn.Linear(4, 3), nn.Linear(3, 1)]
    net = sequential(*layers)
    for _ in range(2):
        assert served(net, capsys)
    losses = meta_loss(net, EPISODE.support, EPISODE.query, steps=3, lr=0.1, backend="cpp")
    assert_close("losses", losses, hand_written(net, EPISODE, 3, lambda name, step: 0.1), 1e-11)
    net[3].negative_slope = 0.4
    assert served(net, capsys)
    net[3].negative_slope = -0.4
    assert not served(net, capsys)


@pytest.mark.parametrize("model", ["Sequential", "Net"])
def test_clipped_gradients(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    net = sequential() if model == "Sequential" else Net(SERVED["F.relu"])
    for clip_norm in (0.3, 0.3, 0.5, 1e3, None):
        assert served(net, capsys, clip_norm=clip_norm)
        losses = meta_loss(net, EPISODE.support, EPISODE.query, steps=3, lr=0.1, clip_norm=clip_norm)
        expected = hand_written(net, EPISODE, 3, lambda name, step: 0.1, clip_norm=clip_norm)
        assert_close("losses", losses, expected, 1e-11)
    assert served(net, capsys, clip_norm=0.3, parameters="*weight")
