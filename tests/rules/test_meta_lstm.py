"""Meta-LSTM: initial weights, losses, learned starts, arguments that do not fit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern import adapt, meta_backward, meta_loss
from metakern.learners import MAMLLearner
from metakern.optim import LearnedOptimizer
from metakern.rules import MetaLSTM
from tests.conftest import assert_close, assert_same_bits
from tests.inner_loops import mlp, regression

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:plain PyTorch serves this small MLP"),
]


def test_the_initial_weights_are_the_authors() -> None:
    rule = MetaLSTM()
    assert rule.head.weight.shape == (2, 22)
    assert rule.lstm.weight_ih_l0.shape == (80, 4)
    for name, weight in rule.named_parameters():
        if name != "head.bias":
            assert 0.005 < weight.abs().max() <= 0.01, name
    forget, admit = rule.head.bias.tolist()
    assert 4 <= forget <= 5
    assert -5 <= admit <= -4


def test_fresh_steps_are_almost_those_of_gradient_descent() -> None:
    rule = MetaLSTM()
    params, grads = torch.randn(50), torch.randn(50)
    new, _ = rule(params, grads, rule.init_state(params), loss=torch.tensor(3.0))
    forget, admit = rule.head.bias.sigmoid().tolist()
    torch.testing.assert_close(new.detach(), forget * params - admit * grads, rtol=2e-3, atol=2e-3)


def test_one_step_by_hand() -> None:
    """One unit, one coordinate, numbers worked out with the formulas of the paper."""
    rule = MetaLSTM(hidden_size=1).double()
    with torch.no_grad():
        for weight in rule.parameters():
            weight.zero_()
        gates_of_loss = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)  # i, f, g, o of log(loss)/10
        rule.lstm.weight_ih_l0[:, 0] = gates_of_loss
        rule.lstm.weight_ih_l0[2, 3] = 1.0  # g of the gradient's sign
        rule.head.weight.copy_(torch.tensor([[1.0, 0.5, 0.25], [2.0, -0.5, 0.125]]))
        rule.head.bias.copy_(torch.tensor([3.0, -3.0]))

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    theta, cell, hidden, gates = 2.0, 0.0, 0.0, [0.0, 0.0]
    params = torch.tensor([theta], dtype=torch.float64)
    state = rule.init_state(params)
    for loss, grad in ((math.exp(2), -0.5), (math.exp(-1), 0.25)):
        x = math.log(loss) / 10
        cell = sigmoid(0.2 * x) * cell + sigmoid(0.1 * x) * math.tanh(0.3 * x + math.copysign(1, grad))
        hidden = sigmoid(0.4 * x) * math.tanh(cell)
        gates = [hidden + 0.5 * theta + 0.25 * gates[0] + 3, 2 * hidden - 0.5 * theta + 0.125 * gates[1] - 3]
        theta = sigmoid(gates[0]) * theta - sigmoid(gates[1]) * grad
        of_step = torch.tensor([grad], dtype=torch.float64)
        params, state = rule(params, of_step, state, loss=torch.tensor(loss, dtype=torch.float64))
        assert params.item() == pytest.approx(theta, rel=1e-12)
        assert state["gates"][0, :, 0].tolist() == pytest.approx(gates, rel=1e-12)


def test_the_authors_division_divides_the_gradient() -> None:
    divided = MetaLSTM(gradient_divisor=25)
    rule = MetaLSTM()
    rule.load_state_dict(divided.state_dict())
    params, grads, loss = torch.randn(40), torch.randn(40), torch.tensor(0.3)
    expected, _ = rule(params, grads / 25, rule.init_state(params), loss=loss)
    got, _ = divided(params, grads, divided.init_state(params), loss=loss)
    assert_same_bits("params", got, expected)


# ------------------------------------------------------------------------------------------------------------ losses


def test_a_missing_or_unfit_loss_is_named_and_nothing_changes() -> None:
    rule, params = MetaLSTM(), {"a": torch.randn(3, 4), "b": torch.randn(3)}
    state = rule.init_state(params, tasks=True)
    cases: list[tuple[Any, type[Exception], str]] = [
        (None, ValueError, "loss must be given to MetaLSTM"),
        (1.0, TypeError, "loss must be a tensor .*, got float"),
        (torch.ones(2), ValueError, r"loss must be \[\] or have one entry per task, .* \[3, 4\], got \[2\]"),
        (torch.ones(3, 1), ValueError, r"one entry per task, .* \[3, 4\], got \[3, 1\]"),
    ]
    for loss, error, message in cases:
        with pytest.raises(error, match=message):
            rule(params, params, state, loss=loss)
    flat, flat_state = torch.randn(5), rule.init_state(torch.randn(5))
    before = flat.clone()
    with pytest.raises(ValueError, match="loss must be given to MetaLSTM"):
        rule.step_(flat, flat.cos(), flat_state)
    assert_same_bits("params", flat, before)
    assert not flat_state["gates"].any()


def test_the_optimizer_wants_a_closure_with_the_loss() -> None:
    model = nn.Linear(3, 1)
    optimizer = LearnedOptimizer(model.parameters(), MetaLSTM())
    x, y = torch.randn(8, 3), torch.randn(8, 1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    closure()
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="closure must return the loss, a tensor, as MetaLSTM needs it"):
        optimizer.step()
    assert_same_bits("weight", model.weight.detach(), before)
    first = optimizer.step(closure)
    for _ in range(30):
        last = optimizer.step(closure)
    assert last < first


# ------------------------------------------------------------------------------------------------------------ starts


def test_the_learned_start_replaces_the_models_parameters() -> None:
    model, episode = mlp(2, 4, 1), regression(3, 4, 5, 2, 1)
    rule = MetaLSTM.for_model(model, hidden_size=4).double()
    start = rule.initialisation()
    assert start is not None
    assert [(name, p.shape) for name, p in start.items()] == [(n, p.shape) for n, p in model.named_parameters()]
    with torch.no_grad():
        for p in start.values():
            p.add_(0.1)
    moved = mlp(2, 4, 1)
    moved.load_state_dict(start, strict=False)
    other = MetaLSTM(hidden_size=4).double()
    other.load_state_dict({name: w for name, w in rule.state_dict().items() if not name.startswith("initial")})
    expected = meta_loss(moved, episode.support, episode.query, steps=2, rule=other)
    losses = meta_backward(model, episode.support, episode.query, steps=2, rule=rule)
    assert_close("losses", losses, expected, 1e-14)
    expected.mean().backward()
    for p, q in zip(start.values(), moved.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert_close("gradient", p.grad, q.grad, 1e-12)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None and bool(p.grad.any()) for p in rule.parameters())
    for name, p in adapt(model, *episode.support, steps=0, rule=rule).parameters.items():
        assert_same_bits(name, p[1], start[name].detach())


def test_a_start_is_saved_and_loaded(tmp_path: Path) -> None:
    rule = MetaLSTM.for_model(mlp(2, 3, 1).float(), gradient_divisor=5)
    rule.save_pretrained(tmp_path)
    loaded = metakern.rules.load(tmp_path)
    assert isinstance(loaded, MetaLSTM)
    start, again = rule.initialisation(), loaded.initialisation()
    assert start is not None
    assert again is not None
    assert set(again) == set(start)
    for name, p in start.items():
        assert_same_bits(name, again[name].detach(), p.detach())
    assert loaded.gradient_divisor == 5
    MetaLSTM().save_pretrained(tmp_path / "without")
    assert metakern.rules.load(tmp_path / "without").initialisation() is None


def test_a_start_for_another_model_or_part_of_it_is_refused() -> None:
    episode = regression(3, 4, 5, 2, 1)
    rule = MetaLSTM.for_model(mlp(2, 4, 1)).double()
    for model, options in ((mlp(2, 5, 1), {}), (mlp(2, 4, 1), {"parameters": "2.*"})):
        with pytest.raises(ValueError, match=r"rule must learn initial values for the adapted parameters, .* has"):
            meta_loss(model, episode.support, episode.query, rule=rule, **options)


def test_a_start_and_the_gates_are_trained_together() -> None:
    model, episode = mlp(2, 8, 1).float(), regression(4, 8, 8, 2, 1)
    sets = [tuple(x.float() for x in part) for part in (episode.support, episode.query)]
    torch.manual_seed(0)
    learner = MAMLLearner(model, steps=3, rule=MetaLSTM.for_model(model))
    optimizer = torch.optim.Adam(learner.rule.parameters(), 1e-2)
    start = [p.detach().clone() for p in learner.rule.parameters()]
    found = []
    for _ in range(40):
        optimizer.zero_grad()
        losses = meta_loss(model, *sets, steps=3, rule=learner.rule)
        losses.mean().backward()
        optimizer.step()
        found.append(losses.mean().item())
    assert found[-1] < 0.9 * found[0]
    assert all(not torch.equal(p, old) for p, old in zip(learner.rule.parameters(), start, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gradient_divisor": 0}, ValueError, "gradient_divisor must be positive and finite, got 0"),
        ({"gradient_divisor": float("inf")}, ValueError, "gradient_divisor must be positive and finite, got inf"),
        ({"gradient_divisor": "5"}, TypeError, "gradient_divisor must be a number, got '5'"),
        ({"preprocess_scale": 0.0}, ValueError, "preprocess_scale must be 1e-06 to 88.0, got 0.0"),
        ({"hidden_size": 0}, ValueError, "hidden_size must be 1 to 64, got 0"),
        ({"initial": [torch.zeros(2)]}, TypeError, "initial must be a dict of tensors by name, got list"),
        ({"initial": {"w": 1.0}}, TypeError, r"initial\['w'\] must be a floating tensor, got float"),
        ({"initial": {"w": torch.zeros(2, dtype=torch.int64)}}, TypeError, r"initial\['w'\] must be a floating tensor"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MetaLSTM(**options)


def test_the_rules_have_names() -> None:
    assert {"meta-lstm", "meta-lstm-with-start"} <= set(metakern.rules.names())
    assert isinstance(metakern.rules.make("meta-lstm", {"hidden_size": 4}), MetaLSTM)
    learned = metakern.rules.make("meta-lstm-with-start", {"hidden_size": 4}, params={"w": torch.ones(2)})
    start = learned.initialisation()
    assert start is not None
    assert start["w"].tolist() == [1, 1]
