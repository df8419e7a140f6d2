"""Steps of every rule: against its formula and torch's optimizers, on trees of tensors, tasks, broken gradients."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree as pytree

from metakern.rules.coordinatewise import CoordinatewiseRule
from metakern.rules.protocol import named_leaves, with_copies
from tests.conformance.rules.rows import RANKED, ROWS, Row, given, grads_at, has_rates, make_params, make_rule, run
from tests.conftest import assert_close, assert_same_bits

every_rule = pytest.mark.parametrize("row", ROWS, ids=str)
with_and_without_tasks = pytest.mark.parametrize("num_tasks", [None, 4], ids=["alone", "tasks"])


def loss_of(params: Any) -> Tensor:
    """Loss of one task, or summed over several; its gradient is always exactly 0 at one coordinate of ``bias``."""
    kept = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    curved = (params["bias"] * kept).sin() * params["bias"]
    return curved.sum() + (0.3 * params["weight"] ** 3 - params["weight"]).sum() + params["scale"].cosh().sum()


def unrolled(step: Any, params: Any, steps: int = 3) -> Any:
    """Several steps along the gradients of :func:`loss_of`, in one graph."""
    for index in range(steps):
        grads = torch.autograd.grad(loss_of(params), list(params.values()), create_graph=True)
        params = step(params, dict(zip(params, grads, strict=True)), index)
    return params


@every_rule
@with_and_without_tasks
def test_values_and_second_order_are_those_of_the_formula(row: Row, num_tasks: int | None) -> None:
    """K steps, differentiated by initial params and rule weights, through the gradients given to the rule."""
    rule = make_rule(row, torch.float64)
    weights = {name: w.detach().clone().requires_grad_() for name, w in rule.named_parameters()}
    start = [{n: p.requires_grad_() for n, p in make_params(row, num_tasks, torch.float64).items()} for _ in range(2)]
    state: Any = rule.init_state(start[0], tasks=num_tasks is not None)
    memory: dict[str, Any] = {}

    def by_rule(params: Any, grads: Any, index: int) -> Any:
        nonlocal state
        new, state = rule(params, grads, state, **given(rule, params, num_tasks is not None))
        return new

    def by_formula(params: Any, grads: Any, index: int) -> Any:
        return row.formula(rule, weights, params, grads, memory, index, num_tasks is not None)

    found, expected = unrolled(by_rule, start[0]), unrolled(by_formula, start[1])
    outer = []
    for params, at, by in ((found, start[0], list(rule.parameters())), (expected, start[1], list(weights.values()))):
        loss = sum((p.sin() * torch.arange(1, p.numel() + 1, dtype=p.dtype).view_as(p)).sum() for p in params.values())
        outer.append(torch.autograd.grad(loss, [*at.values(), *by], allow_unused=True))
    for name in row.shapes:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, a, b in zip([*row.shapes, *weights], *outer, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.isfinite().all(), f"derivative by {name} is not finite"
            scale = 1 + b.abs().max().item()
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10 * scale, msg=lambda m, n=name: f"by {n}: {m}")


@pytest.mark.parametrize("row", [row for row in ROWS if row.optimizer], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_steps_are_those_of_torchs_optimizer(row: Row, dtype: torch.dtype) -> None:
    assert row.optimizer is not None
    rule, params = make_rule(row, dtype), make_params(row, None, dtype)
    theirs = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer, state = row.optimizer(list(theirs.values())), rule.init_state(params)
    for step in range(20):
        grads = grads_at(params, step)
        for name, p in theirs.items():
            p.grad = grads[name].clone()
        optimizer.step()
        params, state = rule(params, grads, state)
    for name, p in theirs.items():
        torch.testing.assert_close(params[name], p.detach(), rtol=1e-5 if dtype == torch.float32 else 1e-13, atol=1e-6)


@every_rule
def test_tasks_side_by_side_are_tasks_alone(row: Row) -> None:
    rule, params = make_rule(row, torch.float64), make_params(row, 5, torch.float64)
    together, _ = run(rule, params, 3, tasks=True)
    for task in range(5):
        alone, _ = run(rule, {name: p[task] for name, p in params.items()}, 3, tasks=False)
        for name in row.shapes:
            torch.testing.assert_close(together[name][task], alone[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("row", [row for row in ROWS if make_rule(row).can_take_copies()], ids=str)
@pytest.mark.parametrize("backend", [None, "reference"], ids=["own", "reference"])
@torch.no_grad()
def test_tasks_with_weights_of_their_own_are_tasks_alone(row: Row, backend: str | None) -> None:
    rule, tasks = make_rule(row, torch.float64), 3
    if backend is not None and hasattr(rule, "backend"):
        rule.backend = backend
    together, rules = with_copies(rule, tasks), [copy.deepcopy(rule) for _ in range(tasks)]
    for stack, *own in zip(together.parameters(), *(each.parameters() for each in rules), strict=True):
        for task, p in enumerate(own):
            stack[task] *= 1 - 0.1 * task
            p.copy_(stack[task])
    params: Any = make_params(row, tasks, torch.float64)
    if isinstance(rule, CoordinatewiseRule):  # one tensor of whole units
        params = {"x": torch.randn(tasks, 2 * rule.unit, dtype=torch.float64)}
    alone = [{name: p[task : task + 1] for name, p in params.items()} for task in range(tasks)]
    states = [each.init_state(p, tasks=True) for each, p in zip(rules, alone, strict=True)]
    state: Any = together.init_state(params, tasks=True)
    for step in range(3):
        grads, loss = grads_at(params, step), torch.arange(1.0, tasks + 1, dtype=torch.float64)
        params, state = together(params, grads, state, loss=loss)
        for task, each in enumerate(rules):
            one = slice(task, task + 1)
            own_grads = {name: g[one] for name, g in grads.items()}
            alone[task], states[task] = each(alone[task], own_grads, states[task], loss=loss[one])
    for name, p in params.items():
        torch.testing.assert_close(p, torch.cat([own[name] for own in alone]), rtol=1e-12, atol=1e-14)
    assert len(list(rule.parameters())) == 0 or not torch.allclose(p[0] - alone[0][name], p[1] - alone[0][name])


@every_rule
@with_and_without_tasks
def test_a_step_changes_none_of_its_arguments(row: Row, num_tasks: int | None) -> None:
    rule, params = make_rule(row), make_params(row, num_tasks)
    params, state = run(rule, params, 1, tasks=num_tasks is not None)
    params, state = pytree.tree_map(Tensor.detach, (params, state))
    grads = grads_at(params, 1)
    before = copy.deepcopy((params, grads, state))
    new, new_state = rule(params, grads, state, **given(rule, params, num_tasks is not None))
    for got, kept in zip(pytree.tree_leaves((params, grads, state)), pytree.tree_leaves(before), strict=True):
        assert_same_bits("arguments", got, kept)
    assert pytree.tree_structure(new) == pytree.tree_structure(params)
    assert pytree.tree_structure(new_state) == pytree.tree_structure(state)
    for name, p in params.items():
        assert (new[name].shape, new[name].dtype) == (p.shape, p.dtype)
        assert not torch.equal(new[name], p)


#: Params by the kind of tree; the rule of each is made for their names.
TREES: dict[str, Any] = {
    "dict": {"b": torch.randn(4, 2), "a": torch.randn(4)},
    "list": [torch.randn(3, 2), torch.randn(())],
    "tuple": (torch.randn(0, 3), torch.randn(33)),
    "nested": {"layers": [torch.randn(7), (torch.randn(2, 2, 2),)], "head": torch.randn(1)},
    "tensor": torch.randn(5, 13),
    "no coordinate": {"a": torch.randn(0)},
    "nothing": {},
}


@every_rule
@pytest.mark.parametrize("kind", TREES)
def test_any_tree_of_tensors(row: Row, kind: str) -> None:
    params = TREES[kind]
    if row.shapes is RANKED:  # such rules refuse single numbers
        params = pytree.tree_map(lambda p: p if p.dim() else p.view(1), params)
    rule = row.make(named_leaves(params))
    grads, loss = pytree.tree_map(torch.sin, params), torch.tensor(0.7)
    new, state = rule(params, grads, rule.init_state(params), loss=loss)
    new, state = rule(new, grads, state, loss=loss)
    assert pytree.tree_structure(new) == pytree.tree_structure(params)
    for (name, got), p in zip(named_leaves(new).items(), pytree.tree_leaves(params), strict=True):
        assert got.shape == p.shape, name
        if row.spreads == "coordinate":  # each tensor alone takes the same steps
            one = {name: p}
            alone = row.make(named_leaves(params)) if not list(rule.parameters()) else rule
            other, own = alone(one, pytree.tree_map(torch.sin, one), alone.init_state(one), loss=loss)
            other, _ = alone(other, pytree.tree_map(torch.sin, one), own, loss=loss)
            assert_close(name, got.detach(), other[name].detach(), 1e-6)


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_params_keep_their_dtype_and_a_float32_state(row: Row, dtype: torch.dtype) -> None:
    rule, params = make_rule(row), make_params(row, 3, dtype)
    if has_rates(rule):
        rule.rates.to(dtype)
    exact = {name: p.float() for name, p in params.items()}
    new, state = run(rule, params, 1, tasks=True)
    expected, _ = run(make_rule(row), exact, 1, tasks=True)
    for name, p in new.items():
        assert p.dtype == dtype
        torch.testing.assert_close(p.float(), expected[name], rtol=0.02, atol=0.02)
    assert all(x.dtype == torch.float32 for x in pytree.tree_leaves(state) if x.is_floating_point())


@every_rule
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_gradient_stays_where_it_is(row: Row, bad: float) -> None:
    rule, params = make_rule(row), make_params(row, 4)
    params, state = run(rule, params, 2, tasks=True)
    grads, loss = grads_at(params, 2), torch.arange(1.0, 5.0)
    expected, after = rule(params, grads, state, loss=loss)
    expected, _ = rule(expected, grads, after, loss=loss)
    broken = {name: g.clone() for name, g in grads.items()}
    broken["weight"][2, 1, 0] = bad
    got, after = rule(params, broken, state, loss=loss)
    got, _ = rule(got, grads, after, loss=loss)
    touched = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in params.items()}
    if row.spreads == "task":
        for mask in touched.values():
            mask[2] = True
    touched["weight"][2, 1, 0] = True
    assert not got["weight"][2, 1, 0].isfinite()
    for name, mask in touched.items():
        assert_same_bits(name, got[name][~mask].detach(), expected[name][~mask].detach())


@every_rule
def test_a_step_in_place_is_a_step(row: Row) -> None:
    """LearnedOptimizer's call of a coordinatewise rule, on one tensor [N]."""
    rule = make_rule(row)
    flat = isinstance(rule, CoordinatewiseRule)
    num_tasks = None if flat else 4
    params: Any = torch.randn(37) if flat else make_params(row, num_tasks)
    grads = pytree.tree_map(torch.sin, params)
    with torch.no_grad():  # a learned initial state has a graph of its own
        states = [rule.init_state(params, tasks=num_tasks is not None) for _ in range(3)]
    loss = given(rule, params, num_tasks is not None)
    expected, expected_state = rule(params, grads, states[0], **loss)
    got = pytree.tree_map(Tensor.clone, params)
    rule.step_(got, grads, states[1], **loss)
    half = pytree.tree_map(Tensor.clone, params)
    rule.step_(half, grads, states[2], lr=0.5, **loss)
    trees = ((got, expected), (states[1], expected_state))
    for ours, theirs in trees:
        for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True):
            assert_same_bits("in place", a, b.detach())
            assert not a.requires_grad
    for a, b, p in zip(*map(pytree.tree_leaves, (half, expected, params)), strict=True):
        torch.testing.assert_close(a, p + (b.detach() - p) / 2, rtol=1e-5, atol=1e-6)


@every_rule
def test_torch_func_sees_through_a_step(row: Row) -> None:
    """The gradient by the rule's weights, and vmap over tasks without a task axis for the rule."""
    rule, params = make_rule(row, torch.float64), make_params(row, 3, torch.float64)
    weights = {name: w.detach() for name, w in rule.named_parameters()}

    def loss(weights: Any, params: Any) -> Tensor:
        state = rule.init_state(params)
        for step in range(2):
            loss = given(rule, params, False)
            params, state = functional_call(rule, weights, (params, grads_at(params, step), state), loss)
        return sum(p.square().sum() for p in params.values())  # type: ignore[return-value]

    by_weights, by_params = vmap(grad(loss, (0, 1)), in_dims=(None, 0))(weights, params)
    for task in range(3):
        own = {name: p[task].clone().requires_grad_() for name, p in params.items()}
        at = {name: w.clone().requires_grad_() for name, w in weights.items()}
        # A learned initial state is no input of functional_call: its gradient is zero in both.
        leaves = [*at.values(), *own.values()]
        expected = torch.autograd.grad(loss(at, own), leaves, allow_unused=True, materialize_grads=True)
        for name, a, b in zip([*at, *own], [*by_weights.values(), *by_params.values()], expected, strict=True):
            torch.testing.assert_close(a[task], b, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("row", [row for row in ROWS if row.compiled], ids=str)
def test_a_compiled_step_is_a_step(row: Row) -> None:
    torch._dynamo.reset()
    rule, params = make_rule(row), make_params(row, 3)

    def steps(params: Any) -> Any:
        return run(rule, params, 2, tasks=True)[0]

    with torch._dynamo.config.patch(allow_rnn=True):
        got = torch.compile(steps, fullgraph=True, backend="eager")(params)
    for name, p in steps(params).items():
        assert_close(name, got[name], p, 1e-6)


@every_rule
@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        (lambda _: {"weight": torch.zeros(3, 2)}, ValueError, "grads must have the structure of params"),
        (
            lambda shapes: {n: torch.zeros(*s, 1) for n, s in shapes.items()},
            ValueError,
            "grads must have the shapes of params",
        ),
        (lambda shapes: dict.fromkeys(shapes, 1.0), TypeError, "grads must hold tensors only, got float"),
    ],
    ids=["structure", "shapes", "numbers"],
)
def test_gradients_that_do_not_fit(row: Row, grads: Any, error: type[Exception], message: str) -> None:
    rule, params = make_rule(row), make_params(row, None)
    with pytest.raises(error, match=message):
        rule(params, grads(row.shapes), rule.init_state(params), **given(rule, params, False))
