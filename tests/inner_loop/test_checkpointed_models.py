"""Models that use torch.utils.checkpoint: recomputation in the backward uses the forward's parameters."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from metakern import MAML, MetaSGD, adapt, meta_loss
from metakern.inner_loop import lineage as _lineage
from metakern.maml import per_step_batch_norm
from tests.conftest import assert_close


@pytest.fixture(autouse=True)
def doubles() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


class Net(nn.Module):
    """The same with and without a checkpoint."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head, self.checkpointed = nn.Linear(2, 6), nn.Linear(6, 1), checkpointed

    def block(self, x: Tensor) -> Tensor:
        return self.body(x).tanh().sin()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x))


class ByTensors(Net):
    """The checkpointed function uses parameters directly, so the backward calls no module."""

    def forward(self, x: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            return F.linear(x, self.body.weight, self.body.bias).tanh().sin()

        return self.head(checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))


class Sequence(Net):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__(checkpointed)
        self.layers = nn.Sequential(self.body, nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), self.head)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.layers, 2, x, use_reentrant=False) if self.checkpointed else self.layers(x)


class Square(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(x)


MODELS = [Net, ByTensors, Sequence]


def data(*axes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*axes, 2), torch.randn(*axes, 1)


def assert_same_meta_gradients(results: list[tuple[Tensor, list[Tensor]]]) -> None:
    (loss, grads), (expected, wanted) = results
    assert_close("loss", loss, expected, 1e-13)
    for a, b in zip(grads, wanted, strict=True):
        assert_close("meta-gradient", a, b, 1e-12)


@pytest.mark.parametrize("kind", [MAML, MetaSGD])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("clones", [1, 2])
@pytest.mark.parametrize("make", MODELS)
def test_one_task(make: type[Net], clones: int, first_order: bool, kind: Callable[..., Any]) -> None:
    (x, y), results = data(5), []
    for checkpointed in (True, False):
        net = make(checkpointed)
        learner = kind(net, 0.5, first_order=first_order)
        total = torch.zeros(())
        for _ in range(clones):
            learner = learner.clone()
            for _ in range(2):
                total = total + F.mse_loss(learner(x + 1), y)  # of the steps before the last, too
                learner.adapt(F.mse_loss(learner(x), y))
        total = total + F.mse_loss(learner(x), y)
        total.backward()
        results.append((total, [p.grad for p in net.parameters()]))
    assert_same_meta_gradients(results)


@pytest.mark.parametrize("vectorize", ["auto", False])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.filterwarnings("ignore:the tasks are evaluated one after another")
def test_tasks_of_a_meta_batch(make: type[Net], first_order: bool, vectorize: Any) -> None:
    support, query, results = data(3, 5), data(3, 4), []
    for checkpointed in (True, False):
        net = make(checkpointed)
        options: dict[str, Any] = {"steps": 3, "lr": 0.5, "first_order": first_order, "vectorize": vectorize}
        losses = meta_loss(net, support, query, step_weights=[0.2, 0.3, 0.5], **options)
        predictions = adapt(net, *support, **options)(query[0])
        total = losses.mean() + predictions.square().mean()
        total.backward()
        results.append((total, [p.grad for p in net.parameters()]))
    assert_same_meta_gradients(results)


@pytest.mark.filterwarnings("ignore:the tasks are evaluated one after another")
def test_statistics_of_every_step_move_once() -> None:
    support, query, results = data(3, 5), data(3, 4), []
    for checkpointed in (True, False):
        net = per_step_batch_norm(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), Net(False)), 2)
        net[2] = nn.Sequential(nn.Linear(3, 2), Net(checkpointed))
        torch.manual_seed(2)
        for p in net.parameters():
            p.data.normal_()
        losses = meta_loss(net, support, query, steps=2, lr=0.1, vectorize=False)
        losses.mean().backward()
        results.append((losses, [*(p.grad for p in net.parameters()), net[1].running_mean, net[1].running_var]))
    assert_same_meta_gradients(results)


def test_types_of_nodes_that_torch_vmap_makes_for_a_call_are_not_kept() -> None:
    net, (x, y) = nn.Sequential(nn.Linear(2, 3), Squares(), nn.Linear(3, 1)), data(2, 4)
    known = []
    for _ in range(4):
        meta_loss(net, (x, y), (x, y), steps=2).sum().backward()
        gc.collect()
        known.append(len(_lineage._SAVED))
    assert known[1:] == known[:1] * 3


def test_a_checkpointed_clone_leaves_its_model_as_it_is() -> None:
    net, (x, y) = Net(True), data(5)
    before = [p.detach().clone() for p in net.parameters()]
    learner = MAML(net, 0.5).clone()
    for _ in range(2):
        learner.adapt(F.mse_loss(learner(x), y))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert learner.head is learner.module.head
    F.mse_loss(learner(x), y).backward()


@pytest.mark.parametrize("in_a_list", [False, True])
def test_an_auxiliary_loss_that_the_model_keeps(in_a_list: bool) -> None:
    class WithAuxiliary(Net):
        def __init__(self, checkpointed: bool) -> None:
            super().__init__(checkpointed)
            self.weights = [self.head.weight] if in_a_list else []

        def forward(self, x: Tensor) -> Tensor:
            h = super().forward(x)
            self.auxiliary = h.square().mean() + sum(w.square().sum() for w in self.weights)
            return h

    support, query, results = data(3, 5), data(3, 4), []
    for checkpointed in (True, False):
        net = WithAuxiliary(checkpointed)

        def loss(prediction: Tensor, y: Tensor, net: Any = net) -> Tensor:
            return F.mse_loss(prediction, y) + net.auxiliary

        losses = meta_loss(net, support, query, loss=loss, steps=2, lr=0.1, vectorize=False)
        losses.mean().backward()
        results.append((losses, [p.grad for p in net.parameters()]))
        assert set(net.__dict__) == {*Net(False).__dict__, "weights", "auxiliary"}
    assert_same_meta_gradients(results)

    def by_hand(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        h = F.linear(F.linear(x, p["body.weight"], p["body.bias"]).tanh().sin(), p["head.weight"], p["head.bias"])
        extra = p["head.weight"].square().sum() if in_a_list else 0.0
        return F.mse_loss(h, y) + h.square().mean() + extra

    params = dict(net.named_parameters())
    for _ in range(2):
        total = by_hand(params, support[0][0], support[1][0])
        grads = torch.autograd.grad(total, list(params.values()), create_graph=True)
        params = {name: p - 0.1 * g for (name, p), g in zip(params.items(), grads, strict=True)}
    assert_close("by hand", results[0][0][0], by_hand(params, query[0][0], query[1][0]), 1e-12)
