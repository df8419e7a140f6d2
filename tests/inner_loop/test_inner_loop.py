"""The inner loop for any model: buffers, tied and frozen parameters, recomputation, torch.func and torch.compile."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
import torch.nn.attention
import torch.nn.functional as F
from torch import Tensor, nn

from metakern import adapt, meta_loss
from tests.conftest import assert_close, assert_same_bits
from tests.inner_loops import Episode, Tied, assert_same, check, hand_written, mlp, regression

F64 = torch.float64

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------ models


class Conv4(nn.Sequential):
    """Four blocks of convolution, batch norm, ReLU and pooling, as for Omniglot, and a linear head."""

    def __init__(self, size: int, channels: int, ways: int) -> None:
        layers: list[nn.Module] = []
        for block in range(4):
            layers += [nn.Conv2d(channels if block else 1, channels, 3, padding=1), nn.BatchNorm2d(channels)]
            layers += [nn.ReLU(inplace=True), *([nn.MaxPool2d(2)] if block < 2 else [])]
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels * (size // 4) ** 2, ways))


@pytest.mark.parametrize("training", [True, False])
def test_convolutions_with_batch_norm(training: bool) -> None:
    torch.manual_seed(0)
    net = Conv4(8, 3, 2).double()
    net(torch.randn(9, 1, 8, 8, dtype=F64))  # running statistics to start from
    net.train(training)
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(2, 3, 4, 1, 8, 8, dtype=F64)
    y = torch.randint(2, (2, 3, 4))
    losses = meta_loss(net, (x[0], y[0]), (x[1], y[1]), loss=F.cross_entropy, steps=2, lr=0.1)
    expected = hand_written(net, Episode((x[0], y[0]), (x[1], y[1])), 2, lambda *_: 0.1, loss=F.cross_entropy)
    # In train() mode batch norm takes a convolution's bias away again: its meta-gradient is rounding noise.
    cancelled = {id(m.bias) for m in net if isinstance(m, nn.Conv2d) and training}
    assert_same(losses, expected, [p for p in net.parameters() if id(p) not in cancelled])
    for name, tensor in net.state_dict().items():
        assert_same_bits(name, tensor, before[name])


@pytest.mark.parametrize("vectorize", [True, False])
def test_tied_parameters(vectorize: bool) -> None:
    torch.manual_seed(0)
    episode, net = regression(3, 4, 4, 2, 1), Tied()
    held = [net.a.weight, net.b.weight, net.again.weight]
    check(net, episode, 2, vectorize=vectorize)
    check(net, episode, 2, parameters="b.weight", names=["a.weight"], vectorize=vectorize)  # by any of its names
    assert all(a is b for a, b in zip(held, [net.a.weight, net.b.weight, net.again.weight], strict=True))


def test_frozen_and_unused_parameters() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.unused = mlp(2, 5, 1), nn.Parameter(torch.ones(2, dtype=F64))
            self.net[0].weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    episode, model = regression(3, 4, 4, 2, 1), Partly()
    adapted = adapt(model, *episode.support, steps=2)
    assert "net.0.weight" not in adapted.parameters
    assert_same_bits("unused parameter", adapted.parameters["unused"], torch.ones(3, 2, dtype=F64))
    meta_loss(model, episode.support, episode.query, steps=2).mean().backward()
    assert model.net[0].weight.grad is None
    assert model.net[0].bias.grad is not None


class Counting(nn.Module):
    """Updates a buffer that the output depends on: by a constant, or by a mean over the data."""

    def __init__(self, of_data: bool) -> None:
        super().__init__()
        self.linear, self.of_data = nn.Linear(2, 1).double(), of_data
        self.register_buffer("calls", torch.zeros((), dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += x.mean() if self.of_data else 1
        return self.linear(x) + self.calls


@pytest.mark.parametrize(("of_data", "vectorize"), [(False, True), (False, False), (True, False)])
def test_buffers_written_in_place(of_data: bool, vectorize: bool) -> None:
    episode, model = regression(3, 4, 4, 2, 1), Counting(of_data)
    check(model, episode, 2, vectorize=vectorize)
    assert model.calls == 0


@pytest.mark.parametrize(("training", "vectorize"), [(True, True), (True, False), (False, True), (False, False)])
def test_attention_to_second_order(training: bool, vectorize: bool) -> None:
    """Fused attention has no second derivative, so the inner loop avoids it."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double().train(training)
    x, y = torch.randn(2, 2, 2, 3, 4, dtype=F64), torch.randn(2, 2, 2, 3, 4, dtype=F64)
    losses = meta_loss(model, (x[0], y[0]), (x[1], y[1]), steps=2, lr=0.1, vectorize=vectorize)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = hand_written(model, Episode((x[0], y[0]), (x[1], y[1])), 2, lambda *_: 0.1)
    assert_same(losses, expected, list(model.parameters()))


def test_dropout_draws_for_each_task_and_is_recomputed() -> None:
    net = nn.Sequential(nn.Linear(1, 64), nn.Dropout(0.5), nn.Linear(64, 1)).double()
    x, y = torch.ones(3, 1, 1, dtype=F64), torch.zeros(3, 1, 1, dtype=F64)
    for vectorize in (True, False):
        first, second, _ = adapt(net, x, y, vectorize=vectorize).parameters["0.weight"]
        assert (first != second).any()
    gradients, states = [], []
    for every in (None, 1, 2):
        torch.manual_seed(0)
        losses = meta_loss(net, (x, y), (x, y), steps=3, lr=0.1, checkpoint_every=every)
        states.append(torch.get_rng_state())
        gradients.append(torch.autograd.grad(losses.sum(), list(net.parameters())))
        states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states)
    for found in gradients[1:]:
        for a, b in zip(found, gradients[0], strict=True):
            assert_close("meta-gradient", a, b, 1e-13)


def test_mode_of_the_model_when_it_is_called() -> None:
    net = nn.Sequential(nn.Linear(2, 64), nn.Dropout(0.5), nn.BatchNorm1d(64), nn.Linear(64, 1)).double().eval()
    episode = regression(3, 4, 4, 2, 1)
    adapted = adapt(net, *episode.support)
    assert_same_bits("in eval mode", adapted(episode.query[0]), adapted(episode.query[0]))
    net.train()
    assert (adapted(episode.query[0]) != adapted(episode.query[0])).any()


# ------------------------------------------------------------------------------------ memory and transforms


def saved_bytes(**options: Any) -> int:
    """Bytes that the graph of a meta-loss keeps, every storage once."""
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            kept.add(self)

    episode, net = regression(2, 10, 10, 1, 1), mlp(1, 40, 40, 1)
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda k: k.tensor):
        losses = meta_loss(net, episode.support, episode.query, lr=0.01, backend="reference", **options)
    storages = {k.tensor.untyped_storage().data_ptr(): k.tensor.untyped_storage().nbytes() for k in kept}
    assert losses.requires_grad
    return sum(storages.values())


def test_checkpoints_keep_memory_small() -> None:
    whole, sparse = saved_bytes(steps=100), saved_bytes(steps=100, checkpoint_every=10)
    parameters = 2 * 8 * sum(p.numel() for p in mlp(1, 40, 40, 1).parameters())  # of 2 tasks
    assert sparse < whole / 15
    assert sparse < 12 * parameters  # those of 10 steps, and the graph of the query loss
    assert saved_bytes(steps=20, checkpoint_every=2) < 12 * parameters


def test_checkpoints_need_all_that_they_recompute_from() -> None:
    episode, net = regression(2, 4, 4, 2, 1), mlp(2, 5, 1)
    weight = torch.ones((), dtype=F64, requires_grad=True)

    def loss(prediction: Tensor, y: Tensor) -> Tensor:
        return weight * F.mse_loss(prediction, y)

    meta_loss(net, episode.support, episode.query, loss=loss).sum().backward()
    assert weight.grad is not None
    with pytest.raises(
        RuntimeError, match=r"checkpoint_every recomputes from model, data and lr, but loss or model hold"
    ):
        meta_loss(net, episode.support, episode.query, loss=loss, checkpoint_every=1)


def test_checkpointed_gradients_cannot_be_differentiated_again() -> None:
    episode, net = regression(2, 4, 4, 2, 1), mlp(2, 5, 1)
    for backend, message in (("reference", "differentiate twice"), ("cpp", "provides no second derivative")):
        loss = meta_loss(net, episode.support, episode.query, steps=2, checkpoint_every=1, backend=backend).sum()
        gradient = torch.autograd.grad(loss, net[0].weight, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=message):
            gradient.sum().backward()


def test_autocast_is_kept_in_recomputation() -> None:
    episode, net = regression(2, 4, 4, 8, 1), mlp(8, 16, 1).float()
    support, query = (tuple(t.float() for t in part) for part in (episode.support, episode.query))
    gradients = []
    for every in (None, 1):
        with torch.autocast("cpu", torch.bfloat16):
            losses = meta_loss(net, support, query, steps=2, lr=0.1, checkpoint_every=every)
        gradients.append(torch.autograd.grad(losses.sum(), list(net.parameters())))
    for a, b in zip(*gradients, strict=True):
        assert_same_bits("meta-gradient", a, b)


def test_torch_func_of_the_meta_loss() -> None:
    episode, net = regression(3, 4, 4, 2, 1), mlp(2, 5, 1)
    lr = torch.tensor(0.1, dtype=F64)

    def losses(rate: Tensor) -> Tensor:
        return meta_loss(net, episode.support, episode.query, steps=2, lr=rate)

    expected = torch.autograd.functional.jacobian(losses, lr)
    assert_close("jacrev", torch.func.jacrev(losses)(lr), expected, 1e-12)
    assert_close("grad", torch.func.grad(lambda rate: losses(rate).sum())(lr), expected.sum(), 1e-12)
    rates = torch.tensor([0.1, 0.2], dtype=F64)
    assert_close("vmap", torch.func.vmap(losses)(rates), torch.stack([losses(r) for r in rates]), 1e-12)


@pytest.mark.parametrize("first_order", [False, True])
def test_torch_compile(first_order: bool) -> None:
    episode, net = regression(3, 4, 4, 2, 1), mlp(2, 5, 1)
    lr = {name: torch.full((2,), 0.1, dtype=F64, requires_grad=True) for name, _ in net.named_parameters()}

    def losses(*data: Tensor) -> Tensor:
        return meta_loss(net, data[:2], data[2:], steps=2, lr=lr, first_order=first_order, clip_norm=1.0)

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    data = (*episode.support, *episode.query)
    assert_same(compiled(*data), losses(*data), [*net.parameters(), *lr.values()], 1e-12)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_torch_compile_with_another_rate_at_every_call(backend: str) -> None:
    """From the second rate on, torch.compile takes it for a symbol."""
    episode, net = regression(3, 4, 4, 2, 1), mlp(2, 5, 1)

    def losses(lr: float) -> Tensor:
        return meta_loss(net, episode.support, episode.query, lr=lr, backend=backend)

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for lr in (0.1, 0.2, 0.3):
        assert_same(compiled(lr), losses(lr), list(net.parameters()), 1e-12)


def test_torch_compile_of_a_convolutional_network() -> None:
    """With the options that choose code: batch norm, patterns, masks, labels, weights of steps."""
    torch.manual_seed(0)
    net = Conv4(4, 2, 2).double()
    x, y = torch.randn(2, 3, 4, 1, 4, 4, dtype=F64), torch.randint(2, (2, 3, 4))
    mask = torch.tensor([[True] * 4, [True, False, True, False], [False, True, True, True]])

    def losses(*data: Tensor) -> Tensor:
        options: dict[str, Any] = {"loss": F.cross_entropy, "parameters": ["15.*", "8.*"], "support_mask": mask}
        return meta_loss(net, data[:2], data[2:], steps=2, lr=0.1, step_weights=[0.25, 0.75], **options)

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    data = (x[0], y[0], x[1], y[1])
    cancelled = {id(m.bias) for m in net if isinstance(m, nn.Conv2d)}
    assert_same(compiled(*data), losses(*data), [p for p in net.parameters() if id(p) not in cancelled])


@pytest.mark.parametrize("options", [{"checkpoint_every": 1}, {"vectorize": False}])
def test_transforms_refuse_what_they_cannot_trace(options: dict[str, Any]) -> None:
    episode, net = regression(3, 4, 4, 2, 1), mlp(2, 5, 1, activation=nn.Softplus)
    message = r"checkpoint_every and vectorize=False do not work in torch\.compile and torch\.func where the fused"
    compiled = torch.compile(meta_loss, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=message):
        compiled(net, episode.support, episode.query, **options)
    with pytest.raises(RuntimeError, match=message):
        torch.func.jacrev(lambda lr: meta_loss(net, *vars(episode).values(), lr=lr, **options))(torch.tensor(0.1))


@pytest.mark.parametrize("printed", [False, True])
def test_which_path_serves_is_logged_or_printed(
    printed: bool, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    episode, net = regression(3, 4, 4, 2, 1), mlp(2, 5, 1)
    with caplog.at_level(logging.INFO if printed else logging.DEBUG, "metakern"):
        meta_loss(net, episode.support, episode.query, steps=2, explain=printed)
        meta_loss(net, episode.support, episode.query, steps=2, loss=F.l1_loss, explain=printed)
        adapt(net, *episode.support, vectorize=False, explain=printed)
    heard, other = capsys.readouterr().out.splitlines(), caplog.messages
    if not printed:
        heard, other = other, heard
    assert not other
    fused, first, second = heard
    assert fused == "meta_loss: K=2: fused inner loop, Sequential"
    assert first.endswith("does not serve: the loss calls l1_loss")
    assert first.startswith("meta_loss: T=3, S=4, K=2: generic path, all tasks at once by torch.vmap")
    assert second.startswith("adapt: T=3, S=4, K=1: generic path, one task after another")


def test_import_stays_cheap() -> None:
    command = "import metakern, sys; print('torch._dynamo' in sys.modules)"
    # Triton, which imports it, is left out.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
