"""The hierarchical RNN: formulas, by hand and on awkward gradients; its weights and draws; attention; bad input."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.core.counter_draws import key_of, uniform
from metakern.core.torch_private import pytree
from metakern.inner_loop.updates import RuleUpdate
from metakern.learners import RuleLearner
from metakern.maml import adapt, meta_loss
from metakern.optim import LearnedOptimizer
from metakern.rules import Adam, HierarchicalRNN, RuleState
from metakern.rules.protocol import Rule, detached, with_copies
from metakern.tasks import Quadratics
from tests.conftest import assert_same_bits
from tests.rules import hrnn_by_hand, hrnn_formula

F64 = torch.float64


def make_rule(*sizes: int, **options: Any) -> HierarchicalRNN:
    """A rule with the same weights every time, in float64, whose learning rates matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rule = HierarchicalRNN(*sizes, **options).double()
        with torch.no_grad():
            rule.readouts[1] = 0.3 * torch.randn(rule.hidden_size, dtype=F64)
    return rule


# ------------------------------------------------------------------------------------------------------- formulas


def test_two_steps_by_hand() -> None:
    rule = HierarchicalRNN(1, 1, 1, attention=True, backend="reference").double()
    rule.load_state_dict({name: torch.tensor(value, dtype=F64) for name, value in hrnn_by_hand.WEIGHTS.items()})
    params = {name: torch.tensor(value, dtype=F64) for name, value in hrnn_by_hand.PARAMS.items()}
    state = rule.init_state(params)
    rates = {"a": [-3.0, -4.5], "b": [-2.0]}
    for name, entry in zip(params, state.per_tensor, strict=True):
        entry["coordinates"] = entry["coordinates"].detach().clone()
        entry["coordinates"][-3] = torch.tensor(rates[name], dtype=F64)
        entry["mean_rate"] = entry["coordinates"][-3].mean()
    values, memory = dict(hrnn_by_hand.PARAMS), hrnn_by_hand.fresh(rates)
    for grads in hrnn_by_hand.GRADS:
        found = hrnn_by_hand.step(values, grads, memory)
        values = found["params"]
        params, state = rule(params, {name: torch.tensor(g, dtype=F64) for name, g in grads.items()}, state)
        points = rule.gradient_points(params, state)
        for name in params:
            assert params[name].tolist() == pytest.approx(values[name], rel=1e-13)
            assert points[name].tolist() == pytest.approx(found["attended"][name], rel=1e-13)
    assert values == {
        "a": pytest.approx([1.444758476551, -0.7437812293607], rel=1e-12),
        "b": pytest.approx([0.2511550137227], rel=1e-12),
    }


def sparse(generator: torch.Generator, *shape: int) -> Tensor:
    """Gradients of which 99 % are zero."""
    g = torch.randn(shape, generator=generator, dtype=F64)
    return g * (torch.rand(shape, generator=generator) < 0.01)


@pytest.mark.parametrize("kind", ["dense", "zero", "sparse", "tiny", "huge", "first zero"])
def test_awkward_gradients_follow_the_formulas(kind: str) -> None:
    """Tensors from 1 to 300 coordinates; ms counts as fresh per tensor and scale in the formulas, per number here."""
    rule, generator = make_rule(attention=True), torch.Generator().manual_seed(1)
    shapes = {"large": (300,), "matrix": (4, 5), "one": ()}
    params = {name: torch.randn(shape, generator=generator, dtype=F64) for name, shape in shapes.items()}
    weights = {name: w.detach() for name, w in rule.named_parameters()}
    state, flat = rule.init_state(params), {name: p.reshape(-1) for name, p in params.items()}
    rates = hrnn_formula.log_rates(rule, shapes)
    memory = hrnn_formula.fresh(weights, {name: p.numel() for name, p in flat.items()}, rates)
    for index in range(6):
        draw = sparse if kind == "sparse" else lambda g, *s: torch.randn(s, generator=g, dtype=F64)
        factor = {"zero": 0.0, "tiny": 1e-30, "huge": 1e12, "first zero": float(index > 2)}.get(kind, 1.0)
        grads = {name: draw(generator, *shape) * factor for name, shape in shapes.items()}
        with torch.no_grad():
            params, state = rule(params, grads, state)
            own = {name: g.reshape(-1) for name, g in grads.items()}
            flat, memory = hrnn_formula.step(weights, flat, own, memory)
            points = rule.gradient_points(params, state)
        for name, p in params.items():
            torch.testing.assert_close(p.reshape(-1), flat[name], rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(points[name].reshape(-1), memory[name]["attended"], rtol=1e-11, atol=1e-13)
    assert all(entry["coordinates"].isfinite().all() for entry in state.per_tensor)


def test_a_rate_beyond_its_bounds_is_clipped_with_the_gradient_of_the_identity() -> None:
    rule, params = make_rule(), {"w": torch.zeros(3, dtype=F64)}
    with torch.no_grad():
        rule.scalars[0] = 100.0
    state = rule.init_state(params)
    new, after = rule(params, {"w": torch.ones(3, dtype=F64)}, state)
    assert (new["w"].detach().abs() <= math.exp(33 - 1) * 3**0.5).all()
    rate, old = after.per_tensor[0]["coordinates"][-3], state.per_tensor[0]["coordinates"][-3]
    keep = torch.sigmoid(rule.scalars[4])
    torch.testing.assert_close(rate, keep * old + (1 - keep) * 33.0)
    (slope,) = torch.autograd.grad(rate[0], rule.scalars)
    torch.testing.assert_close(slope[0], 1 - keep.detach())  # of b, as without the clip


def test_an_empty_tensor_changes_nothing_for_the_others() -> None:
    rule = make_rule()
    params = {"a": torch.ones(2, 3, dtype=F64), "empty": torch.zeros(2, 0, dtype=F64), "b": torch.ones(2, dtype=F64)}
    some = {name: p for name, p in params.items() if name != "empty"}
    states = [rule.init_state(each, tasks=True) for each in (params, some)]
    for _ in range(3):
        params, states[0] = rule(params, {name: p.cos() for name, p in params.items()}, states[0])
        some, states[1] = rule(some, {name: p.cos() for name, p in some.items()}, states[1])
    for name, p in some.items():
        assert_same_bits(name, params[name].detach(), p.detach())


def test_a_non_finite_gradient_reaches_its_tensor_at_once_and_its_task_in_the_next_step() -> None:
    rule, params = make_rule(), {"a": torch.ones(3, 4, dtype=F64), "b": torch.ones(3, 2, dtype=F64)}
    state = rule.init_state(params, tasks=True)
    grads = {name: p.sin() for name, p in params.items()}
    grads["a"][1, 2] = math.nan
    new, state = rule(params, grads, state)
    assert not new["a"][1].isfinite().any()
    assert new["b"].isfinite().all()
    new, state = rule(new, {name: torch.ones_like(p) for name, p in params.items()}, state)
    assert not new["b"][1].isfinite().any()
    assert all(p[[0, 2]].isfinite().all() for p in new.values())


def test_mixed_dtypes_keep_their_own_and_autocast_changes_nothing() -> None:
    rule = make_rule().float()
    params = {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.ones(2, dtype=F64)}
    new, _ = rule(params, params, rule.init_state(params))
    assert [p.dtype for p in new.values()] == [p.dtype for p in params.values()]
    double, _ = rule(params, {name: p.double() for name, p in params.items()}, rule.init_state(params))
    for name, p in new.items():
        torch.testing.assert_close(double[name], p)
    params = {"a": torch.ones(3), "b": torch.ones(2)}
    expected, _ = rule(params, params, rule.init_state(params))
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = rule(params, params, rule.init_state(params))
    for name, p in got.items():
        assert_same_bits(name, p.detach(), expected[name].detach())


# ----------------------------------------------------------------------------------------------- weights and draws


def test_the_weights_are_those_of_the_paper() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rule = HierarchicalRNN(attention=True)
    number = sum(p.numel() for p in rule.parameters())
    assert number - rule.hidden_size == sum(p.numel() for p in HierarchicalRNN().parameters()) == 8349
    for gru in (rule.parameter_gru, rule.tensor_gru, rule.global_gru):
        assert (gru.gates_bias == 2.2).all()
        assert (gru.candidate_bias == 0).all()
        assert (gru.initial.abs() <= 1).all()
        assert gru.initial.std() > 0.2
        deviation = 0.5 / math.sqrt(gru.input_size + gru.hidden_size)
        assert gru.gates_weight.std().item() == pytest.approx(deviation, rel=0.15)
    for affine in (rule.tensor_to_parameter, rule.global_to_parameter, rule.global_to_tensor):
        assert affine.weight.std().item() == pytest.approx(0.5 / math.sqrt(20), rel=0.15)
        assert (affine.bias == 0).all()
    direction, rate, scale_decay, input_decay, attention = rule.readouts
    assert torch.equal(direction, attention)
    assert (rate == 0).all()
    assert all(0 < row.std() < 0.5 for row in (direction, scale_decay, input_decay))
    assert rule.scalars.tolist() == pytest.approx([0.0, 3.2, 2.2, -1.0, 3.2])
    draws = torch.stack([HierarchicalRNN(1, 1, 1).scales.detach() for _ in range(100)])
    assert draws.mean().item() == pytest.approx(0.25, abs=0.02)
    assert draws.std().item() == pytest.approx(0.05, rel=0.2)


def test_draws_are_splitmix64_and_uniform() -> None:
    mask, z = 2**64 - 1, (1234567 + 0x9E3779B97F4A7C15) & (2**64 - 1)  # the first number of splitmix64(1234567)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    assert z == 6457827717110365317
    assert uniform([1234567], 1).item() == (z >> 11) / 2**53
    many, others = uniform([key_of(0, "weight"), key_of(1, "weight")], 100_000)
    assert many.min() >= 0
    assert many.max() < 1
    assert many.mean().item() == pytest.approx(0.5, abs=0.005)
    assert many.var().item() == pytest.approx(1 / 12, rel=0.02)
    assert abs(torch.corrcoef(torch.stack([many, others]))[0, 1]) < 0.02
    assert abs(torch.corrcoef(torch.stack([many[1:], many[:-1]]))[0, 1]) < 0.02


def test_initial_rates_depend_on_seed_and_name_alone() -> None:
    params = {"a": torch.zeros(2, 50), "b": torch.zeros(2, 50)}

    def rates(rule: HierarchicalRNN, tasks: bool = True) -> list[Tensor]:
        given = params if tasks else {name: p[0] for name, p in params.items()}
        return [entry["coordinates"].detach()[..., -3, :] for entry in rule.init_state(given, tasks=tasks).per_tensor]

    first, second = rates(HierarchicalRNN())
    assert hrnn_formula.in_range(torch.stack([first, second]))
    assert first[0].std() > 1
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    torch.rand(3)  # torch's generator has no part in it
    assert torch.equal(rates(HierarchicalRNN(), tasks=False)[0], first[0])
    assert not torch.equal(rates(HierarchicalRNN(seed=1))[0], first)


def test_meta_training_draws_anew_for_other_problems() -> None:
    rule = HierarchicalRNN(seed=3)
    update = RuleUpdate(rule, redraws=True)
    params = {"w": torch.tensor([1.0, 1.0, 2.0]).view(3, 1).expand(3, 5)}
    state = update.init_state(params)
    first, same, other = (x.detach() for x in state.per_tensor[0]["coordinates"])
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    alone = update.init_state({"w": params["w"][2:]})
    assert torch.equal(alone.per_tensor[0]["coordinates"][0], other)
    assert state.shared["global"].shape == (3, 20)
    assert state.tasks
    assert rule.seed == 3
    fixed = RuleUpdate(rule).init_state(params).per_tensor[0]["coordinates"]
    assert torch.equal(fixed, rule.init_state(params, tasks=True).per_tensor[0]["coordinates"])


# -------------------------------------------------------------------------------------------------------- attention


def test_the_inner_loop_takes_gradients_at_the_attended_points() -> None:
    """Also with second derivatives: against a loop by hand."""
    rule, model = make_rule(attention=True), nn.Linear(2, 1).double()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 4, 2, generator=generator, dtype=F64), torch.randn(3, 4, 1, generator=generator, dtype=F64)
    inputs = [*rule.parameters(), *model.parameters()]
    options: dict[str, Any] = {"rule": rule, "steps": 3, "backend": "reference"}
    losses = meta_loss(model, (x, y), (x, y), **options)
    found = torch.autograd.grad(losses.sum(), inputs)

    params = {name: p.expand(3, *p.shape) for name, p in model.named_parameters()}
    state = rule.init_state(params, tasks=True)

    def loss(params: dict[str, Tensor]) -> Tensor:
        predicted = torch.einsum("tsi,toi->tso", x, params["weight"]) + params["bias"].unsqueeze(1)
        return (predicted - y).square().mean((1, 2))

    for _ in range(3):
        points = rule.gradient_points(params, state)
        grads = torch.autograd.grad(loss(points).sum(), list(points.values()), create_graph=True)
        params, state = rule(params, dict(zip(points, grads, strict=True)), state)
    torch.testing.assert_close(losses, loss(params))
    for a, b in zip(found, torch.autograd.grad(loss(params).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    adapted = adapt(model, x, y, **options).parameters
    for name, p in params.items():
        torch.testing.assert_close(adapted[name], p)
    points = rule.gradient_points(params, state)
    assert not torch.allclose(points["weight"], params["weight"])


def test_rule_learner_trains_every_weight() -> None:
    for attention in (False, True):
        learner = RuleLearner(make_rule(attention=attention).float(), steps=4, unroll=4, second_order=True)
        batch = Quadratics(dim=3).sample(2, torch.Generator().manual_seed(0))
        for losses in learner.meta_losses(batch):
            losses.mean().backward()
        for name, w in learner.named_parameters():
            assert w.grad is not None, name
            assert w.grad.isfinite().all(), name
            assert w.grad.any(), name


def test_learned_optimizer_calls_the_closure_at_the_attended_points() -> None:
    rule = make_rule(attention=True)
    params = {"w": nn.Parameter(torch.ones(3, dtype=F64)), "b": nn.Parameter(torch.zeros(2, dtype=F64))}
    embedding = nn.Parameter(torch.ones(4, dtype=F64))
    groups = [{"params": list(params.items())}, {"params": [("embedding", embedding)], "rule": None}]
    optimizer = LearnedOptimizer(groups, rule, lr=0.5)
    seen: list[dict[str, Tensor]] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append({name: p.detach().clone() for name, p in params.items()})
        loss: Tensor = sum(((p - 2) ** 2).sum() for p in params.values())  # type: ignore[assignment]
        (loss + embedding.sum()).backward()
        return loss

    expected = {name: p.detach().clone() for name, p in params.items()}
    with torch.no_grad():
        state = rule.init_state(expected)
        for step in range(4):
            points = rule.gradient_points(expected, state)
            optimizer.step(closure)
            for name, p in points.items():
                torch.testing.assert_close(seen[-1][name], p)
            old = expected
            expected, state = rule(expected, {name: 2 * (p - 2) for name, p in points.items()}, state)
            expected = {name: torch.lerp(old[name], p, 0.5) for name, p in expected.items()}
            for (name, p), entry in zip(expected.items(), state.per_tensor, strict=True):
                entry["attended"] = torch.lerp(old[name], entry["attended"], 0.5)
                torch.testing.assert_close(params[name].detach(), p)
            if step == 1:  # a loaded checkpoint holds the points
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    assert (embedding < 1).all()  # stepped by AdamW, where it is

    def broken() -> Tensor:
        raise KeyError("mine")

    before = {name: p.detach().clone() for name, p in params.items()}
    with pytest.raises(KeyError, match="mine"):
        optimizer.step(broken)
    for p in params.values():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"closure must be given, as HierarchicalRNN with attention"):
        optimizer.step()
    for name, p in params.items():
        assert_same_bits(name, p.detach(), before[name])


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size must be 1 to 32, got 0"),
        ({"hidden_size": 33}, ValueError, "hidden_size must be 1 to 32, got 33"),
        ({"tensor_hidden_size": 513}, ValueError, "tensor_hidden_size must be 1 to 512, got 513"),
        ({"global_hidden_size": 2.0}, TypeError, "global_hidden_size must be an integer, got 2.0 of type float"),
        ({"seed": -1}, ValueError, "seed must be 0 to 9223372036854775807, got -1"),
        ({"attention": 1}, TypeError, "attention must be a bool, got 1"),
        ({"horizon": 0}, ValueError, "horizon must be at least 1, got 0"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HierarchicalRNN(**options)


def test_a_state_that_does_not_fit_is_named() -> None:
    rule, params = make_rule(), {"w": torch.ones(2, 3, dtype=F64), "b": torch.ones(2, dtype=F64)}
    grads = {name: torch.ones_like(p) for name, p in params.items()}
    state = detached(rule.init_state(params, tasks=True))
    other_tasks = detached(rule.init_state({name: p[:1] for name, p in params.items()}, tasks=True))
    other_tree = detached(rule.init_state({"w": params["w"]}, tasks=True))
    for wrong, error, message in (
        (Adam().init_state(params, tasks=True), ValueError, "state must be one of HierarchicalRNN for 2 tensors"),
        ({"w": 1}, TypeError, "state must be a RuleState as init_state makes it, got dict"),
        (other_tree, ValueError, "state must be one of HierarchicalRNN for 2 tensors, got one for 1"),
        (other_tasks, ValueError, r"state must be of HierarchicalRNN for these params, .*\[2, 20\].* got .*\[1, 20\]"),
        (
            RuleState(state.per_tensor[::-1], state.shared, tasks=True),
            ValueError,
            r"state of tensor 0 must be .*\[2, 21, 3\].* got .*\[2, 21, 1\]",
        ),
        (make_rule(attention=True).init_state(params, tasks=True), ValueError, "state of tensor 0 .*attended"),
        (make_rule(9).init_state(params, tasks=True), ValueError, r"state of tensor 0 must be .* got .*\[2, 20, 3\]"),
    ):
        with pytest.raises(error, match=message):
            rule(params, grads, wrong)


def test_a_checkpoint_of_other_sizes_or_another_version_is_refused() -> None:
    def trained(rule: Any) -> LearnedOptimizer:
        p = nn.Parameter(torch.ones(3))
        optimizer = LearnedOptimizer([p], rule)
        p.grad = torch.ones(3)
        optimizer.step()
        return optimizer

    rule = make_rule().float()
    saved = trained(rule).state_dict()
    for key, value in (("hidden_size", 9), ("state_version", 0), ("rule", "Adam")):
        spoiled = copy.deepcopy(saved)
        spoiled["learned_optimizer"][key] = value
        optimizer = trained(rule)
        with pytest.raises(ValueError, match=f"state_dict must have {key}"):
            optimizer.load_state_dict(spoiled)


def test_it_is_made_by_name() -> None:
    rule = metakern.rules.make("hierarchical-rnn", {"attention": True, "seed": 3})
    assert isinstance(rule, HierarchicalRNN)
    assert rule.attention
    assert rule.seed == 3


@pytest.mark.parametrize("attention", [False, True])
def test_groups_step_together_as_one_after_another(attention: bool) -> None:
    torch.manual_seed(0)
    rule = HierarchicalRNN(attention=attention).double()
    shapes: list[dict[str, list[int]]] = [{"a": [3, 4, 2], "b": [3, 5]}, {"c": [2, 6]}, {"d": [1, 0]}]
    params = tuple({k: torch.randn(shape, dtype=torch.float64) for k, shape in group.items()} for group in shapes)
    grads = tuple({name: torch.randn_like(p) for name, p in group.items()} for group in params)
    states = tuple(rule.init_state(group, tasks=True) for group in params)
    found = []
    for step in (rule.step_groups, functools.partial(Rule.step_groups, rule)):
        middle, middle_states = step(params, grads, states)
        new, new_states = step(middle, grads, middle_states)
        leaves = [x for x in pytree.tree_leaves((new, new_states)) if x.numel()]
        number = len(leaves)
        weights = torch.autograd.grad(sum(x.square().sum() for x in leaves), list(rule.parameters()), allow_unused=True)
        found.append([*leaves, *(x for x in weights if x is not None)])
    assert len(found[0]) > number + 10
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("attention", [False, True])
@torch.no_grad()
def test_groups_with_copies_of_the_weights_step_as_each_task_alone(attention: bool) -> None:
    torch.manual_seed(0)
    rule = HierarchicalRNN(attention=attention).double()
    together, rules = with_copies(rule, 6), [copy.deepcopy(rule) for _ in range(6)]
    for stack, *own in zip(together.parameters(), *(each.parameters() for each in rules), strict=True):
        stack *= torch.linspace(0.5, 1.5, 6, dtype=torch.float64).view(-1, *[1] * (stack.dim() - 1))
        for p, value in zip(own, stack, strict=True):
            p.copy_(value)
    shapes: list[dict[str, list[int]]] = [{"a": [3, 4, 2], "b": [3, 5]}, {"c": [2, 6]}, {"d": [1, 3], "e": [1, 0]}]
    params = tuple({k: torch.randn(shape, dtype=torch.float64) for k, shape in group.items()} for group in shapes)
    grads = tuple({name: torch.randn_like(p) for name, p in group.items()} for group in params)
    tasks = [
        ({name: p[at : at + 1] for name, p in own.items()}, {name: g[at : at + 1] for name, g in of_own.items()})
        for own, of_own in zip(params, grads, strict=True)
        for at in range(len(next(iter(own.values()))))
    ]
    alone = [each.init_state(p, tasks=True) for each, (p, _) in zip(rules, tasks, strict=True)]
    flat = iter(alone)
    states: Any = []
    for own in params:
        of_group = [next(flat) for _ in range(len(next(iter(own.values()))))]
        columns = zip(*map(pytree.tree_leaves, of_group), strict=True)
        states.append(pytree.tree_unflatten([torch.cat(x) for x in columns], pytree.tree_structure(of_group[0])))
    for _ in range(2):
        params, states = together.step_groups(params, grads, states)
        stepped = [each(p, g, state) for each, (p, g), state in zip(rules, tasks, alone, strict=True)]
        tasks = [(p, g) for (p, _), (_, g) in zip(stepped, tasks, strict=True)]
        alone = [state for _, state in stepped]
    rest = iter(zip(tasks, alone, strict=True))
    for own, state in zip(params, states, strict=True):
        for at in range(len(next(iter(own.values())))):
            (expected, _), expected_state = next(rest)
            for name, p in own.items():
                torch.testing.assert_close(p[at : at + 1], expected[name], rtol=1e-12, atol=1e-14)
            pairs = zip(pytree.tree_leaves(state), pytree.tree_leaves(expected_state), strict=True)
            for x, y in pairs:
                torch.testing.assert_close(x[at : at + 1], y, rtol=1e-12, atol=1e-14)


def test_groups_of_two_dtypes_step_apart() -> None:
    rule = HierarchicalRNN()
    params = ({"a": torch.randn(2, 3)}, {"a": torch.randn(2, 3, dtype=torch.float64)})
    states = tuple(rule.init_state(group, tasks=True) for group in params)
    new, _ = rule.step_groups(params, params, states)
    assert [group["a"].dtype for group in new] == [torch.float32, torch.float64]
