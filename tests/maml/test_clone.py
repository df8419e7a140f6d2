"""clone_module, update_module, detach_module and maml_update: learn2learn's calls and their contracts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern as l2l
from metakern import clone_module, detach_module, update_module
from metakern.maml import maml_update
from tests.conftest import assert_close, assert_same_bits
from tests.inner_loops import Tied, mlp


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 2, generator=generator).double(), torch.randn(6, 1, generator=generator).double()


def conv_net() -> nn.Module:
    """Parts that are registered twice: on their own and in a chain of both."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.ReLU())
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
            self.chain = nn.Sequential(self.body, self.head)

        def forward(self, x: Tensor) -> Tensor:
            return self.chain(x)

    torch.manual_seed(0)
    return Net().double()


def test_they_are_where_learn2learn_has_them() -> None:
    assert l2l.clone_module is l2l.maml.clone_module is clone_module
    assert l2l.update_module is l2l.maml.update_module
    assert l2l.detach_module is l2l.maml.detach_module
    assert l2l.algorithms.maml_update is l2l.algorithms.maml.maml_update is maml_update
    assert l2l.algorithms.maml.MAML is l2l.algorithms.MAML is l2l.MAML


# --------------------------------------------------------------------------------------------------------------- clone


def test_a_clone_gives_the_originals_output_and_gradients() -> None:
    net, (x, y) = conv_net(), data()
    images = torch.randn(5, 1, 4, 4).double()
    twin = copy.deepcopy(net)
    F.cross_entropy(clone_module(net)(images), torch.tensor([0, 1, 0, 1, 1])).backward()
    F.cross_entropy(twin(images), torch.tensor([0, 1, 0, 1, 1])).backward()
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert_close(name, p.grad, q.grad, 1e-14)
    net = mlp(2, 3, 1)
    clone = clone_module(net)
    grads = torch.autograd.grad(F.mse_loss(clone(x), y), list(clone.parameters()))
    expected = torch.autograd.grad(F.mse_loss(net(x), y), list(net.parameters()))
    for a, b in zip(grads, expected, strict=True):
        assert_same_bits("gradient", a, b)


def test_in_place_steps_of_original_and_clone_leave_each_other() -> None:
    net, (x, y) = mlp(2, 3, 1), data()
    clone = clone_module(net)
    for module in (net, clone):
        grads = torch.autograd.grad(F.mse_loss(module(x), y), list(module.parameters()))
        for p, g in zip(module.parameters(), grads, strict=True):
            p.data.sub_(0.1 * g)
    for p, q in zip(net.parameters(), clone.parameters(), strict=True):
        assert_same_bits("parameter", p.detach(), q.detach())


@pytest.mark.parametrize("make", [conv_net, Tied])
def test_what_is_held_twice_is_cloned_once(make: type) -> None:
    net = make()
    clone = clone_module(net)
    names = [name for name, _ in net.named_parameters(remove_duplicate=False)]
    assert [name for name, _ in clone.named_parameters(remove_duplicate=False)] == names
    assert len(list(clone.parameters())) == len(list(net.parameters()))
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in clone.parameters()}


def test_a_memo_ties_the_clones_of_modules_that_share() -> None:
    a = nn.Linear(2, 2)
    b = nn.Sequential(a, nn.Linear(2, 2))
    b[1].weight = a.weight
    memo: dict = {}
    first, second = clone_module(a, memo), clone_module(b, memo=memo)
    assert second[0] is first
    assert second[1].weight is first.weight
    assert second[1].weight is not clone_module(b)[1].weight


def test_modules_and_parameters_that_are_none() -> None:
    net = nn.ModuleList([nn.Linear(2, 1, bias=False), None, nn.Linear(1, 1)])
    clone = clone_module(net)
    assert clone[1] is None
    assert clone[0].bias is None
    updated = update_module(clone, [torch.ones_like(p) for p in clone.parameters()])
    assert updated[1] is None
    detach_module(clone)


@pytest.mark.parametrize("thing", [None, 3, "text"])
def test_what_is_no_module_is_left(thing: object) -> None:
    assert clone_module(thing) is thing
    assert update_module(thing) is thing
    assert detach_module(thing) is None


def test_buffers_are_shared_unless_they_require_gradients() -> None:
    net = nn.BatchNorm1d(2)
    net.register_buffer("offset", torch.zeros(2, requires_grad=True))
    clone = clone_module(net)
    assert clone.running_mean is net.running_mean
    clone.offset.sum().backward()
    assert net.offset.grad.tolist() == [1, 1]


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_networks_are_cloned_and_updated(kind: type) -> None:
    torch.manual_seed(0)
    net, x = kind(2, 3, num_layers=2).double(), torch.randn(4, 5, 2).double()
    clone, twin = clone_module(net), copy.deepcopy(net)
    assert_same_bits("output", clone(x)[0].detach(), net(x)[0].detach())
    update_module(clone, [torch.full_like(p, 0.1) for p in clone.parameters()])
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.1)
    assert_close("output", clone(x)[0], twin(x)[0], 1e-14)
    clone(x)[0].sum().backward()
    twin(x)[0].sum().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert_close("gradient", p.grad, q.grad, 1e-13)


# -------------------------------------------------------------------------------------------------------------- update


@pytest.mark.parametrize("make", [conv_net, Tied])
def test_updates_are_added_and_gradients_flow_through(make: type) -> None:
    net = make()
    clone = clone_module(net)
    updates = [torch.randn_like(p).requires_grad_() for p in net.parameters()]
    before = list(clone.parameters())
    kept = [p.detach().clone() for p in before]
    assert update_module(clone, updates=updates) is clone
    for p, old, value, q, u in zip(clone.parameters(), before, kept, net.parameters(), updates, strict=True):
        assert_same_bits("updated", p.detach(), (q + u).detach())
        assert_same_bits("the one before", old.detach(), value)
    sum(p.sum() for p in clone.parameters()).backward()
    for p, u in zip(net.parameters(), updates, strict=True):
        assert bool((p.grad == 1).all())
        assert bool((u.grad == 1).all())


def test_updates_of_some() -> None:
    net = mlp(2, 3, 1)
    clone = clone_module(net)
    kept = list(clone.parameters())
    update_module(clone, [None, torch.ones(3).double(), None, None])
    changed = [p is not q for p, q in zip(clone.parameters(), kept, strict=True)]
    assert changed == [False, True, False, False]


def test_updates_as_attributes() -> None:
    net = mlp(2, 3, 1)
    net.register_buffer("offset", torch.zeros(2))
    clone = clone_module(net)
    p = clone[0].bias
    p.update, clone.offset.update = torch.ones(3).double(), torch.ones(2)
    update_module(clone)
    assert_same_bits("bias", clone[0].bias.detach(), net[0].bias.detach() + 1)
    assert clone.offset.tolist() == [1, 1]
    assert p.update is None
    held = clone[0].bias
    update_module(clone)  # an update is taken once
    assert clone[0].bias is held


def test_a_memo_ties_the_updates_of_modules_that_share() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    b.weight = a.weight
    memo: dict = {}
    update_module(a, [torch.ones(2, 2), torch.ones(2)], memo)
    update_module(b, [torch.ones(2, 2) * 5, None], memo=memo)
    assert b.weight is a.weight


@pytest.mark.parametrize("updates", [[], [torch.ones(3, 2)] * 3])
def test_updates_of_another_number_or_shape(updates: list[Tensor]) -> None:
    net = mlp(2, 3, 1)
    with pytest.raises(ValueError, match=rf"updates must have one entry a parameter, 4, got {len(updates)}"):
        update_module(net, updates)
    with pytest.raises(ValueError, match=rf"grads must have one entry a parameter, 4, got {len(updates)}"):
        maml_update(net, 0.1, updates)
    with pytest.raises(ValueError, match=r"an update must have the parameter's shape, \[3\], got \[3, 3\]"):
        update_module(net, [None, torch.ones(3, 3), None, None])


# -------------------------------------------------------------------------------------------------------- maml_update


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64, requires_grad=True)])
def test_maml_update_is_a_gradient_step(lr: float | Tensor) -> None:
    net, (x, y) = mlp(2, 3, 1), data()
    clone = clone_module(net)
    grads = torch.autograd.grad(F.mse_loss(clone(x), y), list(clone.parameters()), create_graph=True)
    assert maml_update(clone, lr, grads) is clone
    loss = F.mse_loss(clone(x), y)
    leaves = [*net.parameters(), *([lr] if isinstance(lr, Tensor) else [])]
    got = torch.autograd.grad(loss, leaves)
    p = dict(net.named_parameters())
    grads = torch.autograd.grad(F.mse_loss(net(x), y), list(p.values()), create_graph=True)
    stepped = {n: q - lr * g for (n, q), g in zip(p.items(), grads, strict=True)}
    expected = F.mse_loss(torch.func.functional_call(net, stepped, (x,)), y)
    assert_close("loss", loss, expected, 1e-14)
    for a, b in zip(got, torch.autograd.grad(expected, leaves), strict=True):
        assert_close("meta-gradient", a, b, 1e-13)


def test_maml_update_takes_the_gradients_that_the_parameters_have() -> None:
    net, (x, y) = mlp(2, 3, 1), data()
    F.mse_loss(net(x), y).backward()
    expected = [(p - 0.1 * p.grad).detach() for p in net.parameters()]
    for p, q in zip(maml_update(net, lr=0.1).parameters(), expected, strict=True):
        assert_close("parameter", p, q, 1e-15)
    maml_update(net, 0.1)  # parameters that are no leaves have none


def test_maml_update_refuses_what_is_no_module_or_rate() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got int"):
        maml_update(1, 0.1)
    with pytest.raises(ValueError, match="lr must be finite, got nan"):
        maml_update(mlp(2, 1), float("nan"))


# -------------------------------------------------------------------------------------------------------------- detach


@pytest.mark.parametrize("keep", [False, True])
def test_detached_modules_are_off_the_graph(keep: bool) -> None:
    net, (x, _) = Tied(), data()
    net.register_buffer("offset", torch.zeros((), dtype=torch.float64, requires_grad=True))
    net.a.bias.requires_grad_(False)
    clone = clone_module(net)
    held = list(clone.parameters())
    assert detach_module(clone, keep_requires_grad=keep) is None
    assert all(p is q and p.is_leaf for p, q in zip(clone.parameters(), held, strict=True))
    assert [p.requires_grad for p in clone.parameters()] == [keep and p.requires_grad for p in net.parameters()]
    assert clone.offset.requires_grad == keep
    output = clone(x).sum()
    assert output.requires_grad == keep
    if keep:
        output.backward()
        assert all(p.grad is None for p in net.parameters())


def test_a_model_itself_can_be_detached() -> None:
    net = mlp(2, 3, 1)
    detach_module(net, keep_requires_grad=True)
    assert all(p.requires_grad for p in net.parameters())
    detach_module(net)
    with pytest.raises(RuntimeError, match="does not require grad"):
        net(data()[0]).sum().backward()
