"""Every rule as a torch.optim.Optimizer: LearnedOptimizer against a handwritten loop, checkpoints, warnings."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils import _pytree as pytree

from metakern.optim import HEADER, LearnedOptimizer
from tests.conformance.rules.rows import ROWS, Row, has_rates, make_params, make_rule
from tests.conftest import assert_same_bits

every_rule = pytest.mark.parametrize("row", ROWS, ids=str)

#: Which of the three parameters have a gradient, step by step.
PATTERNS: list[Sequence[bool]] = [(True,) * 3, (True, False, True), (False, True, True), (True,) * 3]


def named(row: Row, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(p) for name, p in make_params(row, None, dtype).items()}


def optimizer_of(rule: Any, params: dict[str, nn.Parameter], **options: Any) -> LearnedOptimizer:
    return LearnedOptimizer(list(params.items()), rule, **options)


def grad_of(p: Tensor, name: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + len(name))
    return torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def closure_of(optimizer: LearnedOptimizer, step: int = 0) -> Any:
    """A closure for rules that need one; it leaves the gradients as they are."""
    return (lambda: loss_at(step)) if optimizer.rule.needs_loss or optimizer.rule.moves_gradients else None


def train(optimizer: LearnedOptimizer, patterns: Sequence[Sequence[bool]], first: int = 0) -> None:
    (group,) = optimizer.param_groups
    for step, pattern in enumerate(patterns, first):
        for name, p, active in zip(group["param_names"], group["params"], pattern, strict=True):
            p.grad = grad_of(p, name, step) if active else None
        take_step(optimizer, step)


def take_step(optimizer: LearnedOptimizer, step: int = 0) -> None:
    optimizer.step(closure_of(optimizer, step))


def loss_at(step: int) -> Tensor:
    return torch.tensor(1.5 - 0.3 * step)


def by_hand(
    rule: Any, params: dict[str, Tensor], patterns: Sequence[Sequence[bool]], lr: float = 1.0, decay: float = 0.0
) -> dict[str, Tensor]:
    """Apply the rule to each parameter separately, or to all if it counts calls or combines tensors."""
    params = {name: p.detach().clone() for name, p in params.items()}
    states = {name: rule.init_state({name: p}) for name, p in params.items()}
    shared = next((s.shared for s in states.values() if getattr(s, "shared", None)), None)
    for step, pattern in enumerate(patterns):
        active = [name for name, on in zip(params, pattern, strict=True) if on]
        for name in active:
            if shared is not None:
                states[name].shared.update({"count": torch.tensor(step)})
            p, grad = params[name] * (1 - lr * decay), grad_of(params[name], name, step)
            with torch.no_grad():
                new, states[name] = rule({name: p}, {name: grad}, states[name], loss=loss_at(step))
            params[name] = p + lr * (new[name] - p)
    return params


def assert_close(params: dict[str, nn.Parameter], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    for name, p in params.items():
        torch.testing.assert_close(p.detach(), expected[name], rtol=tolerance, atol=tolerance)


def assert_same_content(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare two state_dicts, tensors bitwise."""
    assert got["param_groups"] == expected["param_groups"]
    assert pytree.tree_structure(got[HEADER]) == pytree.tree_structure(expected[HEADER])
    assert got["state"].keys() == expected["state"].keys()
    pairs = [(got[HEADER], expected[HEADER]), *((got["state"][key], expected["state"][key]) for key in got["state"])]
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True):
            if isinstance(b, Tensor):
                assert_same_bits("state", a, b)
            else:
                assert a == b


def resaved(state_dict: dict[str, Any]) -> Any:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@every_rule
@pytest.mark.parametrize(("lr", "decay"), [(1.0, 0.0), (0.5, 0.1)])
def test_the_optimizer_takes_the_rules_steps(row: Row, lr: float, decay: float) -> None:
    rule, params = make_rule(row), named(row)
    patterns = [(True,) * 3] * 3 if row.spreads == "task" else PATTERNS
    if row.spreads == "task":  # clipping uses the gradient of all parameters together
        expected = {name: p.detach().clone() for name, p in params.items()}
        state = rule.init_state(expected)
        for step in range(3):
            start = {name: p * (1 - lr * decay) for name, p in expected.items()}
            new, state = rule(start, {name: grad_of(p, name, step) for name, p in start.items()}, state)
            expected = {name: p + lr * (new[name] - p) for name, p in start.items()}
    else:
        expected = by_hand(rule, params, patterns, lr, decay)
    train(optimizer_of(rule, params, lr=lr, weight_decay=decay), patterns)
    assert_close(params, expected)


@every_rule
def test_a_parameter_without_a_gradient_stays_with_its_state(row: Row) -> None:
    rule, params = make_rule(row), named(row)
    optimizer = optimizer_of(rule, params, weight_decay=0.1)
    train(optimizer, [(True,) * 3])
    kept = copy.deepcopy((params["bias"].detach(), optimizer.state_dict()["state"][1]))
    train(optimizer, [(True, False, True)] * 2, first=1)
    assert_same_bits("bias", params["bias"].detach(), kept[0])
    now = optimizer.state_dict()["state"][1]
    assert now["step"] == kept[1]["step"] == 1
    for name, x in kept[1].items():
        if isinstance(x, Tensor):
            assert_same_bits(name, now[name], x)


@every_rule
@pytest.mark.parametrize("copied", ["state_dict", "deepcopy", "pickle"])
def test_it_resumes_to_the_same_bits(row: Row, copied: str) -> None:
    rule, params = make_rule(row), named(row)
    optimizer = optimizer_of(rule, params, lr=0.7)
    train(optimizer, PATTERNS)
    if copied == "state_dict":
        twins = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
        twin = optimizer_of(make_rule(row), twins)
        saved = resaved(optimizer.state_dict())
        kept = copy.deepcopy(saved)
        twin.load_state_dict(saved)
    elif copied == "deepcopy":
        twins, twin = copy.deepcopy((params, optimizer))
    else:
        twins, twin = pickle.loads(pickle.dumps((params, optimizer)))
    live = optimizer.state_dict()
    before = copy.deepcopy(live)
    for each in (optimizer, twin):
        train(each, PATTERNS, first=len(PATTERNS))
    assert_same_content(live, before)  # a state_dict is a copy
    for name, p in params.items():
        assert_same_bits(name, twins[name].detach(), p.detach())
    assert_same_content(twin.state_dict(), optimizer.state_dict())
    if copied == "state_dict":
        assert_same_content(saved, kept)  # steps do not change the loaded checkpoint


@every_rule
def test_a_fresh_optimizer_saves_and_loads(row: Row) -> None:
    params = named(row)
    optimizer = optimizer_of(make_rule(row), params)
    saved = resaved(optimizer.state_dict())
    train(optimizer, PATTERNS[:1])
    optimizer.load_state_dict(saved)
    assert not optimizer.state
    train(optimizer, PATTERNS[:1])
    assert optimizer.state[params["weight"]]["step"] == 1


@every_rule
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_it_resumes_in_another_dtype(row: Row, dtype: torch.dtype) -> None:
    rule, params = make_rule(row), named(row)
    optimizer = optimizer_of(rule, params)
    train(optimizer, PATTERNS)
    other_rule, others = make_rule(row), {name: nn.Parameter(p.detach().to(dtype)) for name, p in params.items()}
    if has_rates(other_rule):
        other_rule.rates.to(dtype)
    other = optimizer_of(other_rule, others)
    other.load_state_dict(optimizer.state_dict())
    for each in (optimizer, other):
        train(each, [(True,) * 3] * 2, first=len(PATTERNS))
    for name, p in others.items():
        assert p.dtype == dtype
        coarse = 0.1 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(p.detach().float(), params[name].detach(), rtol=coarse, atol=coarse)


@pytest.mark.parametrize("row", [row for row in ROWS if not has_rates(make_rule(row))], ids=str)
def test_module_to_in_mid_run_keeps_the_state(row: Row) -> None:
    rule, model = make_rule(row), nn.Linear(3, 2)
    optimizer = LearnedOptimizer(model.parameters(), rule)
    for step in range(4):
        if step == 2:
            model.double()
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1 * (step + 1))
        take_step(optimizer, step)
    assert [entry["step"] for entry in optimizer.state.values()] == [4, 4]
    assert all(p.dtype == torch.float64 for p in model.parameters())


@every_rule
def test_checkpoints_of_another_rule_or_size_are_refused_and_change_nothing(row: Row) -> None:
    params = named(row)
    optimizer = optimizer_of(make_rule(row), params)
    train(optimizer, PATTERNS)
    good = copy.deepcopy(optimizer.state_dict())
    foreign = copy.deepcopy(good)
    foreign[HEADER] = {"format_version": good[HEADER]["format_version"], "rule": "Nobody's"}
    broken = [foreign]
    for name, x in good["state"][0].items():
        spoilt = copy.deepcopy(good)
        spoilt["state"][0][name] = torch.cat([x, x], -1) if isinstance(x, Tensor) and x.dim() else "x"
        broken.append(spoilt)
        lost = copy.deepcopy(good)
        del lost["state"][0][name]
        broken.append(lost)
    for each in broken:
        with pytest.raises(ValueError, match=r"state_dict must have|of parameter 'weight'"):
            optimizer.load_state_dict(each)
    assert_same_content(optimizer.state_dict(), good)


@pytest.mark.parametrize("row", [row for row in ROWS if make_rule(row).title != "Gradient descent"], ids=str)
def test_the_state_of_another_rule_is_refused_before_anything_moves(row: Row) -> None:
    params = named(row)
    optimizer = optimizer_of(make_rule(row), params)
    train(optimizer, PATTERNS[:1])
    optimizer.rule = next(
        rule for other in ROWS if (rule := make_rule(other)).title not in (optimizer.rule.title, "Gradient descent")
    )
    before = {name: p.detach().clone() for name, p in params.items()}
    with pytest.raises(ValueError, match="rule must be of the kind and sizes of the state of parameter 'weight'"):
        train(optimizer, PATTERNS[:1])
    for name, p in params.items():
        assert_same_bits(name, p.detach(), before[name])


@every_rule
def test_schedulers_and_the_closure_are_those_of_torch(row: Row) -> None:
    rule, params = make_rule(row), named(row)
    optimizer = optimizer_of(rule, params, lr=0.1)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p - 1).square().sum() for p in params.values())
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(2)]
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert losses[0] != losses[1]


@every_rule
def test_the_warning_beyond_the_horizon_points_at_the_users_line(row: Row) -> None:
    rule = make_rule(row)
    rule.horizon = 2
    optimizer = optimizer_of(rule, named(row))
    train(optimizer, PATTERNS[:1] * 2)
    (group,) = optimizer.param_groups
    for p in group["params"]:
        p.grad = torch.zeros_like(p)
    with pytest.warns(UserWarning, match=rf"meta-trained for 2 steps; .* {rule.advice_beyond_horizon}") as seen:
        optimizer.step(closure_of(optimizer, 2))  # the line
    assert len(seen) == 1
    assert Path(seen[0].filename) == Path(__file__)
    assert Path(__file__).read_text().splitlines()[seen[0].lineno - 1].endswith("# the line")


@every_rule
def test_unnamed_parameters_in_two_groups(row: Row) -> None:
    """The rule sees them named by position."""
    if has_rates(make_rule(row)):
        shapes = {str(index): torch.zeros(shape) for index, shape in enumerate(row.shapes.values())}
        rule: Any = row.make(shapes)
    else:
        rule = make_rule(row)
    params = list(named(row).values())
    optimizer = LearnedOptimizer([{"params": params[:1]}, {"params": params[1:], "lr": 0.0}], rule)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    take_step(optimizer)
    assert not torch.equal(params[0], before[0])
    for p, old in zip(params[1:], before[1:], strict=True):
        assert_same_bits("lr 0", p.detach(), old)
