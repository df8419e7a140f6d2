"""MAML and MetaSGD: one learner for one task, with learn2learn's calls."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributions, nn, optim

import metakern as l2l
from metakern import MAML, MetaSGD
from tests.conftest import assert_close, assert_same_bits
from tests.inner_loops import Episode, Tied, hand_written, mlp, regression


@pytest.fixture
def episode() -> Episode:
    return regression(1, 5, 4, 2, 1)


def task(episode: Episode) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*(t[0] for t in episode.support), *(t[0] for t in episode.query))


def run(learner: MAML | MetaSGD, episode: Episode, steps: int = 2) -> Tensor:
    x, y, query_x, query_y = task(episode)
    for _ in range(steps):
        learner.adapt(F.mse_loss(learner(x), y))
    return F.mse_loss(learner(query_x), query_y)


def assert_same_gradients(a: Tensor, b: Tensor, parameters: list[Tensor], tolerance: float = 1e-13) -> None:
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    got, want = (torch.autograd.grad(loss, parameters, **options) for loss in (a, b))
    for index, (x, y) in enumerate(zip(got, want, strict=True)):
        assert_close(f"meta-gradient {index}", x, y, tolerance)


@pytest.mark.parametrize("kind", [MAML, MetaSGD])
@pytest.mark.parametrize("first_order", [False, True])
def test_meta_gradients_equal_a_hand_written_loop(episode: Episode, first_order: bool, kind: type) -> None:
    net = mlp(2, 5, 1)
    loss = run(kind(net, 0.1, first_order=first_order).clone(), episode)
    expected = hand_written(net, episode, 2, lambda *_: 0.1, first_order=first_order)[0]
    assert_close("query loss", loss, expected, 1e-14)
    assert_same_gradients(loss, expected, list(net.parameters()))


def test_the_model_stays_as_it_is_and_receives_the_meta_gradient(episode: Episode) -> None:
    net = mlp(2, 5, 1)
    before = copy.deepcopy(net.state_dict())
    maml = MAML(net, 0.1)
    run(maml.clone(), episode).backward()
    assert maml.module is net
    assert [id(p) for p in maml.parameters()] == [id(p) for p in net.parameters()]
    assert all(p.grad is not None for p in maml.parameters())
    for name, tensor in net.state_dict().items():
        assert_same_bits(name, tensor, before[name])


def test_learning_rate_that_is_learned(episode: Episode) -> None:
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    net = mlp(2, 5, 1)
    loss = run(MAML(net, lr).clone(), episode)
    assert_same_gradients(loss, hand_written(net, episode, 2, lambda *_: lr)[0], [lr, *net.parameters()])


def test_clones_of_clones(episode: Episode) -> None:
    net = mlp(2, 5, 1)
    maml = MAML(net, 0.1)
    expected = hand_written(net, episode, 2, lambda *_: 0.1)[0]
    first, second = maml.clone(), maml.clone()
    run(first, episode, 1)
    assert_same_gradients(run(second, episode), expected, list(net.parameters()))  # untouched by the first
    assert_same_gradients(run(second.clone(), episode, 0), run(second, episode, 0), list(net.parameters()))
    clone = maml.clone().clone()
    assert_same_gradients(run(clone, episode), expected, list(net.parameters()))
    assert_same_gradients(run(first.clone(), episode, 1), expected, list(net.parameters()))  # goes on where first is
    assert isinstance(clone, MAML)


@pytest.mark.parametrize("kind", [MAML, MetaSGD])
def test_a_clone_of_an_adapted_clone_goes_on_and_leaves_it(episode: Episode, kind: type) -> None:
    net = mlp(2, 5, 1)
    learner = kind(net, 0.1)
    leaves = list(learner.parameters())  # MetaSGD's learning rates among them
    names = [name for name, _ in net.named_parameters()]
    rates = dict(zip(names, learner.lrs if kind is MetaSGD else [0.1] * 4, strict=True))
    expected = [hand_written(net, episode, steps, lambda name, _: rates[name])[0] for steps in (1, 2, 3)]
    first = learner.clone()
    run(first, episode, 1)
    held = [p.clone() for p in first.module.parameters()]
    second = first.clone().clone()
    for steps, loss in (
        (2, run(second, episode, 1)),
        (3, run(second.clone(), episode, 1)),
        (1, run(first, episode, 0)),
    ):
        assert_close(f"after {steps} steps", loss, expected[steps - 1], 1e-14)
        assert_same_gradients(loss, expected[steps - 1], leaves)
    for a, b in zip(first.module.parameters(), held, strict=True):
        assert_same_bits("the first clone", a, b)


def test_options_of_clones_of_clones() -> None:
    clone = MAML(mlp(2, 1), 0.1).clone(first_order=True, allow_nograd=True)
    again = clone.clone()
    assert (again.first_order, again.allow_nograd, again.allow_unused) == (True, True, False)
    again = clone.clone(first_order=False)
    assert (again.first_order, clone.first_order) == (False, True)
    assert MetaSGD(mlp(2, 1), 0.1, first_order=True).clone().clone().first_order


def test_modes_of_a_clone_are_its_own() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    clone = MAML(net, 0.1).clone()
    clone.eval()
    assert not clone.module[1].training
    assert net[1].training
    assert not clone.clone().module[1].training


def test_an_adapted_learner_without_a_clone(episode: Episode) -> None:
    """learn2learn allows it: the parameters that the model had before are leaves, and receive the meta-gradient."""
    net = mlp(2, 5, 1)
    leaves = list(net.parameters())
    expected = hand_written(net, episode, 2, lambda *_: 0.1)[0]
    assert_same_gradients(run(MAML(net, 0.1), episode), expected, leaves)


def test_options_are_inherited_and_replaced() -> None:
    maml = MAML(mlp(2, 1), 0.1, first_order=True, allow_nograd=True)
    assert maml.allow_unused
    clone = maml.clone()
    assert (clone.first_order, clone.allow_unused, clone.allow_nograd, clone.lr) == (True, True, True, 0.1)
    clone = maml.clone(first_order=False, allow_unused=False, allow_nograd=False)
    assert (clone.first_order, clone.allow_unused, clone.allow_nograd) == (False, False, False)


def test_first_order_of_one_step(episode: Episode) -> None:
    net = mlp(2, 5, 1)
    learner = MAML(net, 0.1).clone()
    x, y, query_x, query_y = task(episode)
    learner.adapt(F.mse_loss(learner(x), y), first_order=True)
    learner.adapt(F.mse_loss(learner(x), y))
    expected = hand_written(net, episode, 2, lambda *_: 0.1, first_order=[True, False])[0]
    assert_same_gradients(F.mse_loss(learner(query_x), query_y), expected, list(net.parameters()))


def test_frozen_parameters(episode: Episode) -> None:
    net = mlp(2, 5, 1)
    net[0].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"\['0.weight'\] do not: try allow_nograd=True"):
        run(MAML(net, 0.1).clone(), episode)
    learner = MAML(net, 0.1, allow_nograd=True).clone()
    expected = hand_written(net, episode, 2, lambda *_: 0.1)[0]
    assert_same_gradients(run(learner, episode), expected, [p for p in net.parameters() if p.requires_grad])
    assert_same_bits("frozen weight", learner.module[0].weight, net[0].weight)


@pytest.mark.parametrize("kind", [MAML, MetaSGD])
def test_frozen_parameters_of_clones_of_clones(episode: Episode, kind: type) -> None:
    net = mlp(2, 5, 1)
    net[0].weight.requires_grad_(False)
    options = {"allow_nograd": True} if kind is MAML else {}
    clone = kind(net, 0.1, **options).clone()
    run(clone, episode, 1)
    clone = clone.clone()
    assert not clone.module[0].weight.requires_grad
    expected = hand_written(net, episode, 2, lambda *_: 0.1)[0]
    assert_same_gradients(run(clone, episode, 1), expected, [p for p in net.parameters() if p.requires_grad])
    assert_same_bits("frozen weight", clone.module[0].weight, net[0].weight)


def test_a_model_that_is_frozen_stays_as_it_is(episode: Episode) -> None:
    net = mlp(2, 5, 1).requires_grad_(False)
    learner = MAML(net, 0.1, allow_nograd=True).clone()
    x = episode.support[0][0].requires_grad_()
    learner.adapt(learner(x).sum())
    for a, b in zip(learner.module.parameters(), net.parameters(), strict=True):
        assert_same_bits("parameter", a, b)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(2, 1).double(), nn.Linear(2, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_unused_parameters(episode: Episode) -> None:
    net = Unused()
    for learner in (MAML(net, 0.1).clone(), MetaSGD(net, 0.1).clone()):
        with pytest.raises(RuntimeError, match=r"no use for \['unused.weight', 'unused.bias'\]"):
            run(learner, episode)
    learner = MAML(net, 0.1, allow_unused=True).clone()
    run(learner, episode).backward()
    assert_same_bits("unused weight", learner.module.unused.weight, net.unused.weight)


@pytest.mark.parametrize("kind", [MAML, MetaSGD])
@pytest.mark.parametrize("clones", [1, 2])
def test_tied_parameters_and_modules_stay_tied(episode: Episode, kind: type, clones: int) -> None:
    net = Tied()
    learner = kind(net, 0.1)
    for _ in range(clones):
        learner = learner.clone()
    loss = run(learner, episode)
    assert learner.module.a is learner.module.again
    assert learner.module.a.weight is learner.module.b.weight
    assert_same_gradients(loss, hand_written(net, episode, 2, lambda *_: 0.1)[0], list(net.parameters()))


class WithTensors(nn.Module):
    """A tensor inside a graph as attribute, a buffer that requires a gradient, and one that counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1).double()
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.double = self.factor * 2  # not a leaf, so deepcopy would refuse
        self.register_buffer("offset", torch.zeros((), dtype=torch.float64, requires_grad=True))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * self.double + self.offset


def test_buffers_of_clones_of_clones(episode: Episode) -> None:
    net = WithTensors()
    maml = MAML(net, 0.1, allow_unused=True)
    clone = maml.clone().clone()
    assert clone.module.calls is net.calls
    assert clone.module.offset is not net.offset
    expected, loss = run(maml.clone(), episode), run(clone, episode)
    assert net.calls == 6
    assert_same_gradients(loss, expected, [net.offset, net.linear.weight, net.linear.bias])
    clone.module.register_buffer("calls", torch.ones(()))
    assert net.calls == 6


def test_parameters_that_are_none(episode: Episode) -> None:
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1)).double()
    net.register_parameter("nothing", None)
    net.register_buffer("nothing_either", None)
    for learner in (MAML(net, 0.1).clone().clone(), MetaSGD(net, 0.1).clone().clone()):
        loss = run(learner, episode)
        assert_same_gradients(loss, hand_written(net, episode, 2, lambda *_: 0.1)[0], list(net.parameters()))
        assert learner.module.nothing is None


def test_buffers_and_tensors_that_are_no_leaves(episode: Episode) -> None:
    net = WithTensors()
    maml = MAML(net, 0.1, allow_unused=True)
    run(maml.clone(), episode).backward()
    assert net.factor.grad is not None
    assert net.offset.grad is not None
    assert net.calls == 3  # shared by the clones


@pytest.mark.parametrize("kind", [MAML, MetaSGD])
def test_batch_norm_statistics_are_shared(episode: Episode, kind: type) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    run(kind(net, 0.1).clone().clone(), episode).backward()
    assert net[1].num_batches_tracked == 3
    assert (net[1].running_mean != 0).all()


def test_recurrent_networks(episode: Episode) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(2, 3).double(), nn.Linear(3, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x.unsqueeze(0))[0][0])

    net = Recurrent()
    learner = MAML(net, 0.1).clone()
    before = learner(episode.support[0][0])
    loss = run(learner, episode)
    assert (learner(episode.support[0][0]) != before).all()
    assert_same_gradients(loss, hand_written(net, episode, 2, lambda *_: 0.1)[0], list(net.parameters()), 1e-12)


def test_attributes_of_the_module_are_lent() -> None:
    net = mlp(2, 3, 1)
    net.answer = 42
    maml = MAML(net, 0.1)
    assert maml.answer == maml.clone().answer == 42
    with pytest.raises(AttributeError, match="no_such"):
        _ = maml.no_such


@pytest.mark.parametrize("kind", [MAML, MetaSGD])
def test_state_dict_deepcopy_and_pickle(kind: type, episode: Episode) -> None:
    maml = kind(mlp(2, 5, 1, seed=1), 0.1)
    expected = run(maml.clone(), episode)
    fresh = kind(mlp(2, 5, 1, seed=2), 0.2 if kind is MetaSGD else 0.1)
    fresh.load_state_dict(maml.state_dict())
    for other in (fresh, copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        assert type(other) is kind
        assert_same_bits("query loss", run(other.clone(), episode), expected)
    assert "module.0.weight" in maml.state_dict()


def test_a_module_with_deepcopy_of_its_own() -> None:
    class Own(nn.Linear):
        def __deepcopy__(self, memo: dict) -> Own:
            return Own(2, 1)

    assert isinstance(copy.deepcopy(MAML(Own(2, 1), 0.1)), MAML)


def test_meta_sgd_equals_a_hand_written_loop(episode: Episode) -> None:
    net = mlp(2, 5, 1)
    learner = MetaSGD(net, lr=0.1)
    assert [rate.shape for rate in learner.lrs] == [p.shape for p in net.parameters()]
    assert len(list(learner.parameters())) == 2 * len(list(net.parameters()))
    with torch.no_grad():
        for rate in learner.lrs:
            rate.mul_(torch.rand_like(rate))
    rates = {name: rate for (name, _), rate in zip(net.named_parameters(), learner.lrs, strict=True)}
    expected = hand_written(net, episode, 2, lambda name, _: rates[name])[0]
    for clone in (learner.clone(), learner.clone().clone()):
        assert_same_gradients(run(clone, episode), expected, list(learner.parameters()))
    given = MetaSGD(net, lrs=list(learner.lrs)).clone()
    assert_same_gradients(run(given, episode), expected, list(learner.parameters()))


def test_meta_sgd_leaves_frozen_parameters(episode: Episode) -> None:
    net = mlp(2, 5, 1)
    net[0].bias.requires_grad_(False)
    learner = MetaSGD(net, 0.1).clone()
    run(learner, episode).backward()
    assert_same_bits("frozen bias", learner.module[0].bias, net[0].bias)


def test_bad_arguments() -> None:
    net = mlp(2, 1)
    learner = MAML(net, 0.1).clone()
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got int"):
        MAML(1, 0.1)
    with pytest.raises(TypeError, match=r"lr must be a number or a tensor, got str"):
        MAML(net, "0.1")
    with pytest.raises(ValueError, match=r"lr must be finite, got nan"):
        MAML(net, float("nan"))
    with pytest.raises(ValueError, match=r"lr must be a number or a tensor of 1 element, got shape \[2\]"):
        MAML(net, torch.ones(2))
    with pytest.raises(TypeError, match=r"loss must be a tensor, got float"):
        learner.adapt(1.0)
    with pytest.raises(ValueError, match=r"loss must be one number, got shape \[3\]"):
        learner.adapt(learner(torch.ones(3, 2).double()).squeeze(1))
    with pytest.raises(RuntimeError, match=r"loss must depend on the learner's parameters"):
        learner.adapt(torch.ones(()))
    with pytest.raises(TypeError, match=r"lrs\[1\] must be a tensor, got float"):
        MetaSGD(net, lrs=[torch.ones(1, 2), 0.1])
    with pytest.raises(ValueError, match=r"lr must be a number or a tensor of 1 element, got shape \[2\]"):
        MetaSGD(net, torch.ones(2))
    with pytest.raises(ValueError, match=r"lrs must have one tensor a parameter, 2, got 1"):
        MetaSGD(net, lrs=[torch.ones(1, 2)])
    with pytest.raises(ValueError, match=r"lrs\[1\] must have shape \[1\], got \[2\]"):
        MetaSGD(net, lrs=[torch.ones(1, 2), torch.ones(2)])


def test_a_script_in_the_way_of_learn2learns_examples() -> None:
    """A normal distribution whose mean and scale adapt to those of each task, written for ``learn2learn as l2l``."""

    class Normal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.scale = nn.Parameter(torch.randn(5)), nn.Parameter(torch.rand(5) + 0.5)

        def forward(self) -> distributions.Normal:
            return distributions.Normal(self.mean, self.scale)

    torch.manual_seed(0)
    maml = l2l.algorithms.MAML(Normal(), lr=0.05)
    opt = optim.Adam(maml.parameters(), 0.2)
    history = []
    for _ in range(30):
        opt.zero_grad()
        for mean in torch.linspace(2, 3, 4):
            learner = maml.clone()
            for _ in range(2):
                guess = learner()
                learner.adapt((guess.mean - mean).square().sum() + (guess.variance - 1).square().sum())
            guess = learner()
            loss = (guess.mean - mean).square().sum() + (guess.variance - 1).square().sum()
            loss.backward()
            history.append(loss.item())
        for p in maml.parameters():
            p.grad.mul_(1 / 4)
        opt.step()
    assert history[-1] < 0.2 * history[3]
