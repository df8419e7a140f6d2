"""Batch norm with running statistics per inner step, against one plain batch norm per step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metakern import MAML, adapt, meta_loss
from metakern.maml import PerStepBatchNorm, per_step_batch_norm
from metakern.rules import MetaLSTM, Momentum, Rule
from tests.conftest import assert_close, assert_same_bits
from tests.inner_loops import Episode, assert_same, regression

F64 = torch.float64
STEPS = 3
STATISTICS = ("running_mean", "running_var")

pytestmark = pytest.mark.usefixtures("one_thread")


def plain(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Tanh(), nn.Linear(4, 1)).double()


@pytest.fixture
def episode() -> Episode:
    return regression(3, 6, 5, 2, 1)


@pytest.fixture
def net() -> nn.Module:
    """A network whose statistics differ by step."""
    made = per_step_batch_norm(plain(), STEPS)
    made[1].running_mean.copy_(torch.randn(STEPS + 1, 4, dtype=F64))
    made[1].running_var.copy_(torch.rand(STEPS + 1, 4, dtype=F64) + 0.5)
    return made


def by_hand(
    net: nn.Module,
    episode: Episode,
    steps: int,
    rate: float = 0.1,
    weights: list[float] | None = None,
    rule: Rule | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Query losses [T], and what the running statistics [K+1, C] become, with one plain batch norm a step and task."""
    num_tasks, params = episode.support[0].shape[0], dict(net.named_parameters())
    rows = [{name: getattr(net[1], name)[k].clone() for name in STATISTICS} for k in range(STEPS + 1)]
    tasks, losses = [dict(params) for _ in range(num_tasks)], [torch.zeros((), dtype=F64)] * num_tasks
    twin = plain().train(net.training)
    twin[1].momentum = net[1].momentum
    states = [] if rule is None else [rule.init_state(params) for _ in tasks]

    def evaluate(step: int, sets: tuple[Tensor, Tensor]) -> list[Tensor]:
        own = [{f"1.{name}": row.clone() for name, row in rows[step].items()} for _ in tasks]
        found = [
            F.mse_loss(functional_call(twin, {**p, **b}, (x,)), y) for p, b, x, y in zip(tasks, own, *sets, strict=True)
        ]
        rows[step] = {name: torch.stack([b[f"1.{name}"] for b in own]).mean(0) for name in STATISTICS}
        return found

    for step in range(steps):
        for index, loss in enumerate(evaluate(step, episode.support)):
            grads = torch.autograd.grad(loss, list(tasks[index].values()), create_graph=True)
            named = dict(zip(tasks[index], grads, strict=True))
            if rule is None:
                tasks[index] = {name: p - rate * named[name] for name, p in tasks[index].items()}
            else:
                tasks[index], states[index] = rule(tasks[index], named, states[index], loss=loss)
        weight = float(step == steps - 1) if weights is None else weights[step]
        if weight:
            losses = [a + weight * b for a, b in zip(losses, evaluate(step + 1, episode.query), strict=True)]
    return torch.stack(losses), {name: torch.stack([row[name] for row in rows]) for name in STATISTICS}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vectorize": False},
        {"checkpoint_every": 2},
        {"checkpoint_every": 1, "vectorize": False},
        {"step_weights": [0.2, 0.3, 0.5]},
        {"step_weights": [0.5, 0.0, 0.5], "checkpoint_every": 1},
    ],
    ids=str,
)
def test_equals_one_batch_norm_a_step(
    net: nn.Module, episode: Episode, options: dict[str, Any], training: bool
) -> None:
    net.train(training)
    before = copy.deepcopy(net.state_dict())
    expected, statistics = by_hand(net, episode, STEPS, weights=options.get("step_weights"))
    losses = meta_loss(net, episode.support, episode.query, steps=STEPS, lr=0.1, **options)
    after = copy.deepcopy(net.state_dict())
    cancelled = net[0].bias if training else None  # its gradient is rounding noise: batch norm takes a bias away
    assert_same(losses, expected, [p for p in net.parameters() if p is not cancelled])
    for name in STATISTICS:
        assert_close(name, getattr(net[1], name), statistics[name], 1e-13)
        moved = (getattr(net[1], name) != before[f"1.{name}"]).all()
        assert bool(moved) is training
    for name, tensor in net.state_dict().items():  # which the backward does not move again
        assert_same_bits(name, tensor, after[name])
        if not training or "running" not in name:
            assert_same_bits(name, tensor, before[name])


@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 2, "step_weights": [0.2, 0.3, 0.5]}], ids=str)
@pytest.mark.parametrize(
    "make", [lambda: Momentum(0.1), lambda: MetaLSTM(hidden_size=3)], ids=["momentum", "Meta-LSTM"]
)
def test_a_rules_steps_have_their_own_statistics_too(
    net: nn.Module, episode: Episode, make: Callable[[], Rule], options: dict[str, Any]
) -> None:
    rule = make().double()
    before = copy.deepcopy(net.state_dict())
    expected, statistics = by_hand(net, episode, STEPS, weights=options.get("step_weights"), rule=rule)
    losses = meta_loss(net, episode.support, episode.query, steps=STEPS, rule=rule, **options)
    leaves = [p for p in net.parameters() if p is not net[0].bias]  # batch norm takes a bias away
    assert_same(losses, expected, [*leaves, *rule.parameters()])
    for name in STATISTICS:
        assert_close(name, getattr(net[1], name), statistics[name], 1e-13)
        assert (getattr(net[1], name) != before[f"1.{name}"]).all()


def test_fewer_steps_move_their_rows_alone(net: nn.Module, episode: Episode) -> None:
    """Unused rows stay bitwise the same, although the mean of three equal numbers may round differently."""
    before = copy.deepcopy(net[1].state_dict())
    _, statistics = by_hand(net, episode, 1)
    meta_loss(net, episode.support, episode.query, steps=1, lr=0.1)
    for name in STATISTICS:
        assert_close(name, getattr(net[1], name), statistics[name], 1e-13)
        assert (getattr(net[1], name)[:2] != before[name][:2]).all()
        assert_same_bits(name, getattr(net[1], name)[2:], before[name][2:])


def test_training_mode_normalises_as_plain_batch_norm_does(net: nn.Module, episode: Episode) -> None:
    """With the statistics of the current batch, whatever the running ones are."""
    losses = meta_loss(net, episode.support, episode.query, steps=STEPS, lr=0.1)
    expected = meta_loss(plain(), episode.support, episode.query, steps=STEPS, lr=0.1)
    assert_same_bits("losses", losses, expected)


def test_the_same_bits_in_every_run(net: nn.Module, episode: Episode) -> None:
    twin = copy.deepcopy(net)
    for model, every in ((net, None), (twin, 1)):
        with torch.no_grad():
            meta_loss(model, episode.support, episode.query, steps=STEPS, checkpoint_every=every)
        meta_loss(model, episode.support, episode.query, steps=STEPS, checkpoint_every=every).sum().backward()
    for name, tensor in net.state_dict().items():
        assert_same_bits(name, tensor, twin.state_dict()[name])


def test_adapt_moves_no_statistics_and_predicts_by_the_last_row(net: nn.Module, episode: Episode) -> None:
    before = copy.deepcopy(net.state_dict())
    adapted = adapt(net, *episode.support, steps=2, lr=0.1)
    adapted(episode.query[0])
    for name, tensor in net.state_dict().items():
        assert_same_bits(name, tensor, before[name])
    net.eval()
    together = adapted(episode.query[0])
    assert_close("one sample at a time", adapted(episode.query[0][:, :1]), together[:, :1], 1e-13)
    hidden = torch.baddbmm(
        adapted.parameters["0.bias"].unsqueeze(1), episode.query[0], adapted.parameters["0.weight"].mT
    )
    normalised = (hidden - net[1].running_mean[2]) / (net[1].running_var[2] + net[1].eps).sqrt()
    hidden = normalised * adapted.parameters["1.weight"].unsqueeze(1) + adapted.parameters["1.bias"].unsqueeze(1)
    expected = torch.baddbmm(
        adapted.parameters["3.bias"].unsqueeze(1), hidden.tanh(), adapted.parameters["3.weight"].mT
    )
    assert_close("prediction", together, expected, 1e-12)


def test_weights_of_each_step_receive_meta_gradients(episode: Episode) -> None:
    net = per_step_batch_norm(plain(), STEPS, affine_per_step=True)
    expected = meta_loss(per_step_batch_norm(plain(), STEPS), episode.support, episode.query, parameters=["0.*", "3.*"])
    losses = meta_loss(net, episode.support, episode.query, parameters=["0.*", "3.*"])
    assert_close("with equal rows", losses, expected, 1e-14)
    weight, bias = torch.autograd.grad(losses.sum(), [net[1].weight, net[1].bias])
    for gradient in (weight, bias):
        assert (gradient[:2] != 0).all()
        assert (gradient[2:] == 0).all()
    adapted = meta_loss(net, episode.support, episode.query)  # an inner step's own row is not used again
    assert_same_bits("adapted as well", adapted, losses)


def test_convolutions_tied_layers_and_frozen_statistics() -> None:
    class Twice(nn.Module):
        """One batch norm that is used twice, and one that stays in eval() mode."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
            self.again, self.frozen = self.norm, nn.BatchNorm2d(2).eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(self.again(self.conv(self.norm(x)))).mean((2, 3))

    torch.manual_seed(0)
    net = per_step_batch_norm(Twice().double(), 2)
    assert net.again is net.norm
    assert net.norm.training
    assert not net.frozen.training
    x, y = torch.randn(2, 3, 4, 2, 5, 5, dtype=F64) + 1, torch.randn(2, 3, 4, 2, dtype=F64)
    meta_loss(net, (x[0], y[0]), (x[1], y[1]), steps=1).sum().backward()
    assert (net.norm.running_mean[:2] != 0).all()
    assert (net.norm.running_mean[2] == 0).all()
    assert (net.frozen.running_mean == 0).all()


def test_torch_compile(net: nn.Module, episode: Episode) -> None:
    twin = copy.deepcopy(net)
    compiled = torch.compile(
        lambda *data: meta_loss(twin, data[:2], data[2:], steps=STEPS, lr=0.1), fullgraph=True, backend="aot_eager"
    )
    losses = compiled(*episode.support, *episode.query)
    assert_close("losses", losses, meta_loss(net, episode.support, episode.query, steps=STEPS, lr=0.1), 1e-12)
    for name, tensor in net.state_dict().items():
        assert_close(name, twin.state_dict()[name], tensor, 1e-12)


def test_torch_func_moves_no_statistics_and_says_so(net: nn.Module, episode: Episode) -> None:
    def total(lr: Tensor) -> Tensor:
        return meta_loss(net, episode.support, episode.query, lr=lr).sum()

    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match=r"torch.func cannot move the running statistics of PerStepBatchNorm: call"):
        torch.func.grad(total)(torch.tensor(0.1, dtype=F64))
    for name, tensor in net.state_dict().items():
        assert_same_bits(name, tensor, before[name])
    net.eval()
    lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
    (expected,) = torch.autograd.grad(total(lr), lr)
    assert_close("in eval() mode", torch.func.grad(total)(lr.detach()), expected, 1e-12)


@pytest.mark.parametrize("step", [0, 2])
def test_the_layer_by_itself(step: int) -> None:
    layer, twin = PerStepBatchNorm(3, 2, momentum=0.25), nn.BatchNorm1d(3, momentum=0.25)
    layer.step.fill_(step)
    for _ in range(2):
        x = torch.randn(5, 3, 4)
        assert_same_bits("in train() mode", layer(x), twin(x))
    for name in STATISTICS:
        assert_close(name, getattr(layer, name)[step], getattr(twin, name), 1e-6)
        others = [k for k in range(3) if k != step]
        assert_same_bits(name, getattr(layer, name)[others], getattr(PerStepBatchNorm(3, 2), name)[others])
    assert_close("in eval() mode", layer.eval()(x), twin.eval()(x), 1e-6)
    assert set(layer.state_dict()) == {"weight", "bias", *STATISTICS}
    assert list(PerStepBatchNorm(3, 2, affine=False).parameters()) == []
    assert "3, steps=2, eps=1e-05, momentum=0.25, affine=True, affine_per_step=False" in repr(layer)


def test_nan_stays_in_the_row_of_its_step(episode: Episode, net: nn.Module) -> None:
    episode.query[0][1, 2] = float("nan")
    losses = meta_loss(net, episode.support, episode.query, steps=1)
    assert losses.isnan().tolist() == [False, True, False]
    assert net[1].running_mean.isnan().all(1).tolist() == [False, True, False, False]
    assert net[1].running_mean[[0, 2, 3]].isfinite().all()


def test_half_precision_activations_gather_in_float32() -> None:
    net = per_step_batch_norm(plain(), 1).float()
    data = regression(2, 8, 8, 2, 1)
    support, query = (tuple(t.float() for t in part) for part in (data.support, data.query))
    with torch.autocast("cpu", torch.bfloat16):
        meta_loss(net, support, query).sum().backward()
    assert net[1].running_mean.dtype == torch.float32
    assert (net[1].running_mean != 0).all()


def test_learn2learns_calls(episode: Episode, net: nn.Module) -> None:
    """A learner stays at the layer's ``step``, which clones share; its loop may write it."""
    before = net[1].running_mean.clone()
    learner = MAML(net, 0.1).clone()
    for step in range(2):
        learner.module[1].step.fill_(step)
        learner.adapt(F.mse_loss(learner(episode.support[0][0]), episode.support[1][0]))
    assert (net[1].running_mean[:2] != before[:2]).all()
    assert_same_bits("other rows", net[1].running_mean[2:], before[2:])


def test_conversion() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2, eps=1e-3, momentum=0.2), nn.BatchNorm1d(2, track_running_stats=False))
    model[0].weight.requires_grad_(False).fill_(3)
    model[0].running_mean.fill_(2)
    net = per_step_batch_norm(model, 4)
    assert type(model[0]) is type(net[1]) is nn.BatchNorm1d
    assert (net[0].steps, net[0].eps, net[0].momentum, net[0].weight.requires_grad) == (4, 1e-3, 0.2, False)
    assert_same_bits("mean", net[0].running_mean, torch.full((5, 2), 2.0))
    assert_same_bits("weight", net[0].weight, torch.full((2,), 3.0))
    assert isinstance(per_step_batch_norm(nn.BatchNorm2d(2), 1), PerStepBatchNorm)
    assert_same_bits("weights", per_step_batch_norm(model, 4, True)[0].weight, torch.full((5, 2), 3.0))


def test_conversion_keeps_what_is_tied() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    model.append(model[0])
    net = per_step_batch_norm(model, 1)
    assert net[1].weight is net[0].weight
    assert net[1].weight is not model[1].weight
    assert net[2] is net[0]


def test_bad_arguments(net: nn.Module, episode: Episode) -> None:
    with pytest.raises(ValueError, match=r"steps must be at most 3, for which the model has batch norm, got 4"):
        meta_loss(net, episode.support, episode.query, steps=4)
    with pytest.raises(ValueError, match=r"steps must be at most 3"):
        adapt(net, *episode.support, steps=4)
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got int"):
        per_step_batch_norm(1, 2)
    with pytest.raises(ValueError, match=r"model must have an nn.BatchNorm1d, 2d or 3d .*, got none"):
        per_step_batch_norm(nn.Linear(1, 1), 2)
    with pytest.raises(ValueError, match=r"model: 0 must have a number as momentum, got None"):
        per_step_batch_norm(nn.Sequential(nn.BatchNorm1d(2, momentum=None)), 2)
    for steps, kind, message in ((0, ValueError, "at least 1, got 0"), (1.0, TypeError, "an integer, got 1.0")):
        with pytest.raises(kind, match=f"steps must be {message}"):
            per_step_batch_norm(plain(), steps)
    with pytest.raises(ValueError, match=r"num_features must be at least 1, got -1"):
        PerStepBatchNorm(-1, 1)
    with pytest.raises(ValueError, match=r"momentum must be 0 to 1, got 1.5"):
        PerStepBatchNorm(1, 1, momentum=1.5)
    with pytest.raises(TypeError, match=r"momentum must be a number, got None"):
        PerStepBatchNorm(1, 1, momentum=None)
    with pytest.raises(ValueError, match=r"eps must be positive and finite, got 0"):
        PerStepBatchNorm(1, 1, eps=0)
    for shape in ((4,), (2, 3), (2, 3, 4)):
        with pytest.raises(ValueError, match=r"input must be \[N, 4, ...\], got shape"):
            PerStepBatchNorm(4, 1)(torch.ones(shape))
