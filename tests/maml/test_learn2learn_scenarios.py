"""Compatibility with learn2learn scripts: its learners' behaviour, and its examples' loops on tiny synthetic data."""

from __future__ import annotations

import copy
import gc
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, autograd, distributions, nn, optim

import metakern as l2l
from tests.conftest import assert_close, assert_same_bits

LEARNERS = [l2l.algorithms.MAML, l2l.algorithms.MetaSGD]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


def network() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3), nn.Softmax(1))
    net.register_buffer("unused", torch.zeros(1, 2, 3))
    return net.double()


def inputs() -> Tensor:
    return torch.randn(5, 4).double()


# ------------------------------------------------------------------------------------------------ promises of learners


@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize("first_order", [False, True])
def test_every_clone_computes_what_the_model_does(kind: type, first_order: bool) -> None:
    net, x = network(), inputs()
    learner = kind(net, lr=0.1, first_order=first_order)
    for clone in (learner.clone(), learner.clone(), learner):
        assert_same_bits("output", clone(x).detach(), net(x).detach())


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_clones_loss_reaches_every_parameter_of_the_model(kind: type) -> None:
    net = network()
    learner = kind(net, lr=0.1)
    learner(inputs())
    learner.clone()(inputs()).norm().backward()
    assert all(p.grad.norm() > 0 for p in net.parameters())


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_step_lowers_the_loss_and_passes_meta_gradients_on(kind: type) -> None:
    learner, x = kind(network(), lr=0.01), inputs()
    clone = learner.clone()
    loss = clone(x).norm()
    clone.adapt(loss)
    again = clone(x).norm()
    assert again <= loss
    again.backward()
    assert all(p.grad.norm() > 0 for p in learner.parameters())  # Meta-SGD's learning rates among them


def test_first_order_meta_gradients_are_gradients_at_the_adapted_parameters() -> None:
    net, x = network(), inputs()
    clone = l2l.algorithms.MAML(net, lr=0.01, first_order=True).clone()
    for _ in range(3):
        clone.adapt(clone(x).norm())
    reference = copy.deepcopy(net)
    with torch.no_grad():
        for p, q in zip(reference.parameters(), clone.parameters(), strict=True):
            p.copy_(q)
    reference(x).norm().backward()
    clone(x).norm().backward()
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        assert_close("meta-gradient", p.grad, q.grad, 1e-14)


def test_a_loss_of_every_other_parameter() -> None:
    maml = l2l.algorithms.MAML(network(), lr=0.1, allow_unused=True)
    clone = maml.clone()

    def loss() -> Tensor:
        return sum(p.norm() for p in itertools.islice(clone.parameters(), 0, None, 2))

    before = list(clone.parameters())
    clone.adapt(loss())
    changed = [p is not q for p, q in zip(clone.parameters(), before, strict=True)]
    assert changed == [True, False] * 3
    loss().backward()
    assert [p.grad is not None for p in maml.parameters()] == [True, False] * 3


def test_frozen_parameters_by_argument_of_adapt_or_of_the_constructor() -> None:
    net = network()
    net[2].weight.requires_grad = False
    clone = l2l.algorithms.MAML(net, lr=0.1, allow_unused=False, allow_nograd=False).clone()

    def loss(learner: nn.Module) -> Tensor:
        return sum(p.norm() for p in learner.parameters())

    with pytest.raises(RuntimeError, match="try allow_nograd=True"):
        clone.adapt(loss(clone))
    clone.adapt(loss(clone), allow_nograd=True)
    loss(clone).backward()
    assert [p.grad is None for p in net.parameters()] == [p is net[2].weight for p in net.parameters()]
    clone = l2l.algorithms.MAML(net, lr=0.1, allow_nograd=True).clone()
    clone.adapt(loss(clone))
    assert_same_bits("frozen weight", clone.module[2].weight, net[2].weight)


@pytest.mark.parametrize("kind", LEARNERS)
def test_parts_that_are_registered_twice(kind: type) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), nn.Conv2d(2, 1, 3)
            self.chain = nn.Sequential(self.body, self.head)

        def forward(self, x: Tensor) -> Tensor:
            return self.chain(x)

    learner = kind(Net(), lr=0.1)
    clone = learner.clone()
    for _ in range(2):
        clone.adapt(sum(p.norm() for p in clone.parameters()))
    assert clone.module.chain[0] is clone.module.body
    assert clone.module.chain[1].weight is clone.module.head.weight
    clone(torch.randn(1, 1, 6, 6)).sum().backward()
    assert all(p.grad is not None for p in learner.module.parameters())


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_networks_meta_learn(kind: type) -> None:
    maml = l2l.algorithms.MAML(kind(2, 1), lr=1e-2, allow_unused=False)
    outer, data, losses = optim.SGD(maml.parameters(), lr=0.01), torch.randn(6, 20, 2), []
    for _ in range(2):
        learner = maml.clone()
        for _ in range(3):
            learner.adapt(learner(data)[0].norm())
        loss = learner(data)[0].norm()
        outer.zero_grad()
        loss.backward()
        outer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


@pytest.mark.parametrize("kind", LEARNERS)
def test_memory_is_that_of_one_task(kind: type) -> None:
    def live() -> int:
        return sum(x.numel() for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter))

    learner, x = kind(nn.Sequential(*(nn.Linear(16, 16) for _ in range(5))), lr=1e-4), torch.randn(8, 16)
    counts = []
    for _ in range(4):
        clone = learner.clone()
        for _ in range(4):
            clone.adapt(clone(x).norm())
        counts.append(live())
    assert counts[0] > 1000
    assert counts[1:] == counts[1:2] * 3


@pytest.mark.parametrize("kind", LEARNERS)
def test_meta_parameters_are_saved_and_loaded(kind: type) -> None:
    learner, x = kind(network(), lr=0.1), inputs()
    buffer = io.BytesIO()
    torch.save(learner.state_dict(), buffer)
    buffer.seek(0)
    fresh = kind(network(), lr=0.5)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    clones = [one.clone() for one in (learner, fresh)]
    if kind is l2l.algorithms.MetaSGD:
        for clone in clones:
            clone.adapt(clone(x).norm())
    assert_same_bits("output", clones[1](x).detach(), clones[0](x).detach())


def test_meta_sgd_has_a_rate_for_every_number() -> None:
    net = network()
    learner = l2l.algorithms.MetaSGD(net, lr=0.1)
    sizes = [sum(p.numel() for p in module.parameters()) for module in (net, learner)]
    assert sizes[1] == 2 * sizes[0]
    assert all(bool((rate == 0.1).all()) for rate in learner.lrs)


# --------------------------------------------------------------------------------------------------- loops of examples


def train(iterate: Callable[[], Tensor | float], iterations: int) -> list[float]:
    """Train for some iterations; the last losses must be well below the first."""
    losses = [float(torch.as_tensor(iterate()).detach()) for _ in range(iterations)]
    quarter = iterations // 4
    first, last = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
    assert last < 0.8 * first, (first, last)
    return losses


def sinusoid() -> tuple[Tensor, Tensor]:
    x = torch.rand(20, 1) * 10 - 5
    return x, (torch.rand(()) + 2) * torch.sin(x + torch.rand(()))


def images(ways: int = 3, shots: int = 2, size: int = 8) -> tuple[Tensor, Tensor]:
    """Patches of noise around one pattern a class, two for every shot: the first to adapt, the second to evaluate."""
    patterns = torch.randn(ways, 1, 1, size, size)
    data = patterns + 0.3 * torch.randn(ways, 2 * shots, 1, size, size)
    return data.flatten(0, 1), torch.arange(ways).repeat_interleave(2 * shots)


def halves(data: Tensor, labels: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (data[::2], labels[::2]), (data[1::2], labels[1::2])


def adapted_loss(learner: Any, support: Any, query: Any, loss: Callable[..., Tensor], steps: int) -> Tensor:
    for _ in range(steps):
        learner.adapt(loss(learner(support[0]), support[1]))
    return loss(learner(query[0]), query[1])


def test_sinusoids_with_losses_summed_over_tasks() -> None:
    net = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    maml = l2l.algorithms.MAML(net, lr=0.01, first_order=False, allow_unused=True)
    opt, loss = optim.Adam(maml.parameters(), 0.01), nn.MSELoss(reduction="mean")

    def iterate() -> Tensor:
        total = sum(adapted_loss(maml.clone(), *halves(*sinusoid()), loss, steps=2) for _ in range(4)) / 4
        opt.zero_grad()
        total.backward()
        opt.step()
        return total

    train(iterate, 60)


def test_distributions_whose_adaptation_is_evaluated_by_what_came_before() -> None:
    """The pre-step proposal is still part of the graph: its loss passes gradients to the model."""

    class Normal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.scale = nn.Parameter(torch.randn(3)), nn.Parameter(torch.rand(3) + 0.5)

        def forward(self, x: Any = None) -> distributions.Normal:
            return distributions.Normal(self.mean, self.scale)

    maml = l2l.algorithms.MAML(Normal(), lr=0.01)
    opt = optim.Adam(maml.parameters(), 0.1)

    def iterate() -> Tensor:
        total = torch.zeros(())
        for shift in torch.linspace(2, 2.5, 3):
            learner = maml.clone()
            proposal = learner()
            learner.adapt((shift - proposal.mean).square().sum() + (1 - proposal.variance).square().sum())
            total = total + (shift - proposal.mean).square().sum() + (1 - proposal.variance).square().sum()
        opt.zero_grad()
        total.backward()
        opt.step()
        return total

    train(iterate, 40)


def test_only_the_head_adapts() -> None:
    features = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
    head = l2l.algorithms.MAML(nn.Linear(32, 3), lr=0.1)
    parameters = [*features.parameters(), *head.parameters()]
    opt, loss = optim.Adam(parameters, 0.01), nn.CrossEntropyLoss(reduction="mean")

    def iterate() -> float:
        opt.zero_grad()
        total = 0.0
        for _ in range(4):
            data, labels = images()
            error = adapted_loss(head.clone(), *halves(features(data), labels), loss, steps=3)
            error.backward()
            total += error.item()
        for p in parameters:
            p.grad.data.mul_(1 / 4)
        opt.step()
        return total

    train(iterate, 24)
    assert all(p.grad.norm() > 0 for p in parameters)


@pytest.mark.parametrize("kind", LEARNERS)
def test_classifiers_with_a_backward_a_task(kind: type) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
    maml = kind(net, lr=0.3, first_order=False)
    opt, loss = optim.Adam(maml.parameters(), 0.01), nn.CrossEntropyLoss(reduction="mean")

    def iterate() -> float:
        opt.zero_grad()
        total = 0.0
        for _ in range(4):
            error = adapted_loss(maml.clone(), *halves(*images()), loss, steps=1)
            error.backward()
            total += error.item()
            adapted_loss(maml.clone(), *halves(*images()), loss, steps=1)  # validation, whose graph is dropped
        for p in maml.parameters():
            p.grad.data.mul_(1 / 4)
        opt.step()
        return total

    train(iterate, 40)


def test_convolutions_with_log_probabilities() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)
            self.fc1, self.fc2 = nn.Linear(32, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.conv1(x))
            x = F.max_pool2d(F.relu(self.conv2(x)), 2)
            return F.log_softmax(self.fc2(F.relu(self.fc1(x.view(-1, 32)))), dim=1)

    maml = l2l.algorithms.MAML(Net(), lr=0.1)
    opt, loss = optim.Adam(maml.parameters(), lr=0.01), nn.NLLLoss(reduction="mean")

    def iterate() -> Tensor:
        total = torch.zeros(())
        for _ in range(3):
            error = adapted_loss(maml.clone(), *halves(*images()), loss, steps=3)
            error /= 6
            total += error
        opt.zero_grad()
        total.backward()
        opt.step()
        return total

    train(iterate, 24)


class Policy(nn.Module):
    """Normal actions around a linear function of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.sigma = nn.Linear(2, 2), nn.Parameter(torch.zeros(2))

    def density(self, state: Tensor) -> distributions.Normal:
        return distributions.Normal(self.mean(state), self.sigma.exp())

    def log_prob(self, state: Tensor, action: Tensor) -> Tensor:
        return self.density(state).log_prob(action).mean(1, keepdim=True)

    def forward(self, state: Tensor) -> Tensor:
        return self.density(state).sample()


def episodes(policy: Any, goal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """States, actions, and how much better than others these were."""
    states = torch.randn(64, 2)
    with torch.no_grad():
        actions = policy(states)
    rewards = -(actions - goal).square().sum(1, keepdim=True)
    return states, actions, (rewards - rewards.mean()) / rewards.std()


def test_policies_by_methods_of_the_module() -> None:
    learners = l2l.algorithms.MetaSGD(Policy(), lr=0.1)
    opt = optim.Adam(learners.parameters(), lr=0.05)
    goals = torch.tensor([[2.0, 1.0], [2.0, -1.0]])

    def iterate() -> float:
        total, distance = torch.zeros(()), 0.0
        for goal in goals:
            learner = learners.clone()
            for _ in range(2):
                states, actions, advantages = episodes(learner, goal)
                loss = -(learner.log_prob(states, actions) * advantages).mean()
                learner.adapt(loss)
            total = total - (learner.log_prob(states, actions) * advantages).mean()
            distance += (learner.density(states).mean - goal).square().mean().item()
        opt.zero_grad()
        total.backward()
        opt.step()
        return distance

    train(iterate, 60)


def test_policies_by_clone_module_and_maml_update() -> None:
    policy = Policy().double()
    states, actions, advantages = (x.double() for x in episodes(copy.deepcopy(policy).float(), torch.ones(2)))

    def surrogate(lr: float | Tensor) -> Tensor:
        clone = l2l.clone_module(policy)
        for _ in range(2):
            loss = -(clone.log_prob(states, actions) * advantages).mean()
            gradients = autograd.grad(loss, clone.parameters(), retain_graph=True, create_graph=True)
            clone = l2l.algorithms.maml.maml_update(clone, lr, gradients)
        kl = distributions.kl_divergence(clone.density(states), policy.density(states)).mean()
        return kl - (clone.log_prob(states, actions) * advantages).mean()

    parameters = list(policy.parameters())
    grads = autograd.grad(surrogate(0.1), parameters, create_graph=True)
    vector = [torch.randn_like(p) for p in parameters]
    product = autograd.grad(sum((g * v).sum() for g, v in zip(grads, vector, strict=True)), parameters)
    # Directional derivatives of the loss and of its gradient, by central differences.
    epsilon, values, slopes = 1e-5, [], []
    for sign in (1, -1):
        for p, v in zip(parameters, vector, strict=True):
            p.data.add_(sign * epsilon * v)
        loss = surrogate(0.1)
        values.append(loss.item())
        slopes.append(autograd.grad(loss, parameters))
        for p, v in zip(parameters, vector, strict=True):
            p.data.sub_(sign * epsilon * v)
    along = sum((g * v).sum() for g, v in zip(grads, vector, strict=True)).item()
    assert along == pytest.approx((values[0] - values[1]) / (2 * epsilon), rel=1e-6)
    for got, up, down in zip(product, *slopes, strict=True):
        assert_close("Hessian-vector product", got, (up - down) / (2 * epsilon), 1e-6)
