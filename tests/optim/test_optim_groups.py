"""LearnedOptimizer's parameter groups: weight decay, unknown options; and warnings about a rule's horizon."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from metakern.optim import FORMAT_VERSION, HEADER, LearnedOptimizer
from metakern.rules import CoordinatewiseLSTM
from metakern.tasks.digit_networks import load_digits
from tests.conftest import assert_close, assert_same_bits
from tests.optimizers import (
    ODD_SHAPES,
    assert_same,
    assert_state,
    by_hand,
    make_params,
    make_rule,
    roundtrip,
    run,
    seeded,  # noqa: F401  # a fixture
    set_grads,
    small_rule,  # noqa: F401  # a fixture
)

# -------------------------------------------------------------------------------------------------------- weight decay


def decayed_by_hand(
    rule: CoordinatewiseLSTM, params: list[nn.Parameter], steps: int, lr: float, decay: float
) -> list[Tensor]:
    """θ' = (1 − lr · decay) · θ + lr · rule(∇θ), every tensor on its own."""
    values = [p.detach().clone() for p in params]
    states = [rule.init_state(p) for p in params]
    with torch.no_grad():
        for step in range(steps):
            set_grads(params, step)
            for i, p in enumerate(params):
                new, states[i] = rule(values[i], p.grad, states[i])
                values[i] = (1 - lr * decay) * values[i] + lr * (new - values[i])
    return values


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(("lr", "decay"), [(1.0, 0.01), (0.5, 0.3), (0.1, 1.0)])
def test_weight_decay_is_decoupled(backend: str, lr: float, decay: float) -> None:
    params, rule = make_params(ODD_SHAPES, torch.float64), make_rule(backend=backend).double()
    expected = decayed_by_hand(rule, params, 5, lr, decay)
    run(LearnedOptimizer(params, rule, lr=lr, weight_decay=decay), [None] * 5)
    for index, (p, q) in enumerate(zip(params, expected, strict=True)):
        assert_close(f"parameter {index}", p, q, 1e-12)


def test_decay_is_what_adamw_takes_away() -> None:
    """A rule that proposes nothing leaves the decay alone, as AdamW does with a gradient of zero."""
    rule = make_rule().double()
    with torch.no_grad():
        for w in rule.head.parameters():
            w.zero_()
    params = make_params([(5, 7)], torch.float64)
    others = copy.deepcopy(params)
    optimizer, adamw = LearnedOptimizer(params, rule, 0.1, 0.2), torch.optim.AdamW(others, 0.1, weight_decay=0.2)
    for _ in range(4):
        for p in (*params, *others):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        adamw.step()
    assert_close("parameter", params[0], others[0], 1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_without_decay_the_bits_are_those_of_before(rule: CoordinatewiseLSTM, dtype: torch.dtype) -> None:
    params = make_params(ODD_SHAPES, dtype)
    expected, states = by_hand(rule, params, [None] * 3)
    optimizer = LearnedOptimizer(params, rule, weight_decay=0.0)
    run(optimizer, [None] * 3)
    assert_same(params, expected)
    assert_state(optimizer, params, states)


def test_groups_decay_by_themselves_and_schedulers_scale_it(rule: CoordinatewiseLSTM) -> None:
    rule = rule.double()
    params = make_params([(5,), (40,), (6,)], torch.float64)
    groups = [{"params": params[:1]}, {"params": params[1:2], "weight_decay": 0.0}, {"params": params[2:], "lr": 0.5}]
    starts = [p.detach().clone() for p in params]
    optimizer = LearnedOptimizer(groups, rule, weight_decay=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    expected, states = starts, [rule.init_state(p) for p in starts]
    for step in range(3):
        set_grads(params, step)
        with torch.no_grad():
            for i, (lr, decay) in enumerate(((1.0, 0.1), (1.0, 0.0), (0.5, 0.1))):
                lr *= 0.5**step
                new, states[i] = rule(expected[i], params[i].grad, states[i])
                expected[i] = (1 - lr * decay) * expected[i] + lr * (new - expected[i])
        optimizer.step()
        scheduler.step()
    for p, q in zip(params, expected, strict=True):
        assert_close("parameter", p, q, 1e-12)


def test_parameters_without_gradient_do_not_decay(rule: CoordinatewiseLSTM) -> None:
    params = make_params([(5,), (40,), (7,)])
    before = [p.detach().clone() for p in params]
    run(LearnedOptimizer(params, rule, weight_decay=0.5), [[True, False, True]])
    assert_same_bits("skipped", params[1], before[1])
    assert not torch.equal(params[0], before[0])


def test_weight_decay_is_in_checkpoints(rule: CoordinatewiseLSTM) -> None:
    params = make_params([(5,), (40,)])
    optimizer = LearnedOptimizer([{"params": params[:1], "weight_decay": 0.3}, {"params": params[1:]}], rule)
    run(optimizer, [None] * 2)
    saved, resumed = roundtrip(optimizer.state_dict()), [nn.Parameter(p.detach().clone()) for p in params]
    fresh = LearnedOptimizer([{"params": resumed[:1]}, {"params": resumed[1:]}], rule)
    fresh.load_state_dict(saved)
    assert [group["weight_decay"] for group in fresh.param_groups] == [0.3, 0.0]
    run(optimizer, [None] * 2, first=2)
    run(fresh, [None] * 2, first=2)
    assert_same(resumed, params)


def test_checkpoints_from_before_there_was_weight_decay(rule: CoordinatewiseLSTM) -> None:
    params = make_params([(5,)])
    optimizer = LearnedOptimizer(params, rule, weight_decay=0.5)
    run(optimizer, [None])
    old = roundtrip(optimizer.state_dict())
    assert old[HEADER]["format_version"] == FORMAT_VERSION
    del old["param_groups"][0]["weight_decay"]
    with pytest.raises(ValueError, match=r"group 0 of state_dict must be a dict with the keys .*'weight_decay'"):
        optimizer.load_state_dict(old)
    old[HEADER]["format_version"] = 1
    optimizer.load_state_dict(old)
    assert optimizer.param_groups[0]["weight_decay"] == 0.0
    run(optimizer, [None], first=1)


@pytest.mark.parametrize("decay", [-0.1, math.nan, math.inf])
def test_bad_weight_decays(rule: CoordinatewiseLSTM, decay: float) -> None:
    params = make_params([(3,), (4,)])
    with pytest.raises(ValueError, match=f"weight_decay must be finite and at least 0, got {decay}"):
        LearnedOptimizer(params, rule, weight_decay=decay)
    optimizer = LearnedOptimizer(params[:1], rule)
    with pytest.raises(ValueError, match="weight_decay of group 1 must be finite and at least 0"):
        optimizer.add_param_group({"params": params[1:], "weight_decay": decay})
    optimizer.param_groups[0]["weight_decay"] = decay
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match="weight_decay of group 0"):
        run(optimizer, [None])
    assert_same_bits("parameter", params[0], before)
    with pytest.raises(TypeError, match="weight_decay must be a number, got '0'"):
        LearnedOptimizer(params, rule, weight_decay="0")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ unknown options


@pytest.mark.parametrize("key", ["momentum", "betas", "weigth_decay", "maximize", "eps"])
def test_options_that_a_learned_optimizer_lacks_are_refused(rule: CoordinatewiseLSTM, key: str) -> None:
    params = make_params([(3,), (4,)])
    match = rf"group 0 must hold the options lr, weight_decay alone, got \['{key}'\]"
    with pytest.raises(ValueError, match=match):
        LearnedOptimizer([{"params": params, key: 0.9}], rule)
    optimizer = LearnedOptimizer(params, rule)
    saved = optimizer.state_dict()
    saved["param_groups"][0][key] = 0.9
    with pytest.raises(ValueError, match=rf"group 0 of state_dict must hold .* got \['{key}'\]"):
        optimizer.load_state_dict(saved)
    optimizer.param_groups[0][key] = 0.9
    with pytest.raises(ValueError, match=match):
        run(optimizer, [None])


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=10, cycle_momentum=False),
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, cycle_momentum=False),
        lambda o: lr_scheduler.ReduceLROnPlateau(o),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingWarmRestarts(o, 3)], milestones=[2]
        ),
        lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.PolynomialLR(o)]),
        lambda o: SWALR(o, swa_lr=0.05),
    ],
    ids=["OneCycleLR", "CyclicLR", "ReduceLROnPlateau", "SequentialLR", "ChainedScheduler", "SWALR"],
)
@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_what_schedulers_keep_in_a_group_is_theirs(rule: CoordinatewiseLSTM, make: Callable[[Any], Any]) -> None:
    params = make_params([(3,), (4,)])
    optimizer = LearnedOptimizer([{"params": params[:1], "name": "body"}, {"params": params[1:]}], rule)
    scheduler = make(optimizer)
    for step in range(4):
        run(optimizer, [None], first=step)
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    optimizer.load_state_dict(roundtrip(optimizer.state_dict()))
    run(optimizer, [None])


def test_groups_added_to_an_unpickled_optimizer(rule: CoordinatewiseLSTM) -> None:
    params = make_params([(3,)])
    optimizer = pickle.loads(pickle.dumps(LearnedOptimizer(params, rule, weight_decay=0.1)))
    optimizer.add_param_group({"params": make_params([(4,)])})
    run(optimizer, [None])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1]


# ------------------------------------------------------------------------------------------- closures, gradient scaling


def test_a_loss_in_place_of_a_closure(rule: CoordinatewiseLSTM) -> None:
    (p,) = make_params([(3,)])
    optimizer = LearnedOptimizer([p], rule)
    set_grads([p], 0)
    before = p.detach().clone()
    with pytest.raises(TypeError, match=r"closure must be a function .* got Tensor: for a loss call loss.backward\(\)"):
        optimizer.step(p.square().sum())  # type: ignore[arg-type]
    assert_same_bits("parameter", p, before)


def test_a_closure_that_raises_moves_nothing(rule: CoordinatewiseLSTM) -> None:
    (p,) = make_params([(3,)])
    optimizer = LearnedOptimizer([p], rule)
    before = p.detach().clone()

    def closure() -> Tensor:
        p.grad = torch.ones_like(p)
        raise KeyError("no data")

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert_same_bits("parameter", p, before)
    assert not optimizer.state


@pytest.mark.parametrize("overflow", [False, True])
def test_gradient_scaling(rule: CoordinatewiseLSTM, overflow: bool) -> None:
    params, others = make_params([(5,), (40,)]), make_params([(5,), (40,)])
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer, plain = LearnedOptimizer(params, rule), LearnedOptimizer(others, rule)
    for step in range(3):
        for one in (params, others):
            set_grads(one, step)
        scaler.scale(torch.ones(()))
        for p in params:
            p.grad.mul_(2.0**10)
        if overflow and step == 1:
            params[0].grad[0] = math.inf
        scaler.step(optimizer)
        scaler.update(2.0**10)
        if not (overflow and step == 1):
            plain.step()
    assert_same(params, others)  # a step whose gradients overflowed is skipped
    assert [optimizer.state[p]["step"] for p in params] == [2 if overflow else 3] * 2


def test_parameters_without_a_coordinate_alone(rule: CoordinatewiseLSTM) -> None:
    params = make_params([(0,), (3, 0)])
    optimizer = LearnedOptimizer(params, rule, weight_decay=0.1)
    run(optimizer, [None] * 2)
    optimizer.load_state_dict(roundtrip(optimizer.state_dict()))
    assert [optimizer.state[p]["step"] for p in params] == [2, 2]


def test_sparse_gradients_say_what_to_do(rule: CoordinatewiseLSTM) -> None:
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = LearnedOptimizer(table.named_parameters(), rule)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"'weight' \[10, 4\] must be dense.*sparse=False, or let p.grad = p.grad.to_d"):
        optimizer.step()
    dense = table.weight.grad.to_dense()
    expected, _ = rule(table.weight, dense, rule.init_state(table.weight))
    table.weight.grad = dense
    optimizer.step()
    assert_same([table.weight], [expected])


# ------------------------------------------------------------------------------------------------------------- horizon


def test_steps_beyond_the_horizon_warn_once_at_the_callers_line() -> None:
    rule = make_rule(horizon=3, trained_on="rings")
    params = make_params([(5,), (4,)])
    optimizer = LearnedOptimizer(params, rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        set_grads(params, 3, [False, False])
        optimizer.step()
    set_grads(params, 3)
    with pytest.warns(UserWarning, match="meta-trained for 3 steps, on rings; this is step 4, .* 0.03 to 0.3") as seen:
        optimizer.step()
    assert [w.filename for w in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_rules_without_a_horizon_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(LearnedOptimizer(make_params([(5,)]), make_rule()), [None] * 4)


def test_the_rule_that_ships_knows_its_horizon() -> None:
    rule = CoordinatewiseLSTM.pretrained("digits_lstm")
    assert rule.horizon == 100
    assert "64-20-10" in rule.trained_on
    (p,) = make_params([(5,)])
    optimizer = LearnedOptimizer([p], rule)
    set_grads([p], 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(100):
            optimizer.step()
    with pytest.warns(UserWarning, match="meta-trained for 100 steps, on classifiers 64-20-10"):
        optimizer.step()


def test_other_networks_want_a_smaller_lr() -> None:
    """Checks the advice for digits_lstm in the documentation, on a network unlike its training networks."""
    images, labels = load_digits("train")
    rule = CoordinatewiseLSTM.pretrained("digits_lstm")
    start = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    losses = {}
    for lr in (1.0, 0.1):
        model = copy.deepcopy(start)
        optimizer = LearnedOptimizer(model.parameters(), rule, lr=lr)
        generator = torch.Generator().manual_seed(0)
        for _ in range(100):
            batch = torch.randint(len(images), (128,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        losses[lr] = F.cross_entropy(model(images), labels).item()
    assert losses[0.1] < 0.1
    assert losses[0.1] < 0.2 * losses[1.0]
