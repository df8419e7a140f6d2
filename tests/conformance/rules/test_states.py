"""States of rules detached, moved, copied and selected; weights saved and loaded."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import metakern
from metakern.rules.protocol import detached, moved
from metakern.rules.registry import name_of
from tests.conformance.rules.rows import ROWS, Row, make_params, make_rule, run
from tests.conftest import assert_same_bits

every_rule = pytest.mark.parametrize("row", ROWS, ids=str)


@every_rule
def test_a_state_is_a_tree_of_tensors(row: Row) -> None:
    state = make_rule(row).init_state(make_params(row, 3), tasks=True)
    leaves, structure = pytree.tree_flatten(state)
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    rebuilt = pytree.tree_unflatten(leaves, structure)
    assert type(rebuilt) is type(state)
    assert pytree.tree_structure(rebuilt) == structure


@every_rule
def test_a_detached_state_goes_on_to_the_same_bits_without_the_graph_before(row: Row) -> None:
    rule = make_rule(row)
    start = {name: p.requires_grad_() for name, p in make_params(row, 3).items()}
    params, state = run(rule, start, 2, tasks=True)
    expected, _ = run(rule, params, 2, tasks=True, state=state, first=2)
    cut_params, cut = detached((params, state))
    assert not any(x.requires_grad for x in pytree.tree_leaves((cut_params, cut)))
    got, _ = run(rule, cut_params, 2, tasks=True, state=cut, first=2)
    for name, p in got.items():
        assert_same_bits(name, p.detach(), expected[name].detach())
    if any(p.requires_grad for p in got.values()):
        loss = sum(p.sum() for p in got.values())
        assert torch.autograd.grad(loss, list(start.values()), allow_unused=True) == (None,) * len(start)


@every_rule
def test_a_state_moves_to_float64_and_back_without_losing_a_bit(row: Row) -> None:
    rule = make_rule(row)
    params, state = detached(run(rule, make_params(row, 3), 2, tasks=True))
    there = moved(state, torch.float64)
    assert all(x.dtype == torch.float64 for x in pytree.tree_leaves(there) if x.is_floating_point())
    back = moved(there, torch.float32)
    expected, _ = run(rule, params, 1, tasks=True, state=state, first=2)
    got, _ = run(rule, params, 1, tasks=True, state=back, first=2)
    wide, _ = run(copy.deepcopy(rule).double(), moved(params, torch.float64), 1, tasks=True, state=there, first=2)
    for name, p in expected.items():
        assert_same_bits(name, got[name].detach(), p.detach())
        torch.testing.assert_close(wide[name].float(), p, rtol=1e-4, atol=1e-5)


@every_rule
def test_a_state_moves_to_another_device(row: Row) -> None:
    state = make_rule(row).init_state(make_params(row, 3), tasks=True)
    there = moved(state, device="meta")
    assert type(there) is type(state)
    assert all(x.is_meta for x in pytree.tree_leaves(there))
    made = make_rule(row).to("meta").init_state(moved(make_params(row, 3), device="meta"), tasks=True)
    for a, b in zip(pytree.tree_leaves(made), pytree.tree_leaves(state), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@every_rule
def test_selected_tasks_go_on_as_they_would_alone(row: Row) -> None:
    rule = make_rule(row)
    start = make_params(row, 40)  # several tiles, none of which ends with a task
    params, state = run(rule, start, 2, tasks=True)
    expected, _ = run(rule, params, 2, tasks=True, state=state, first=2)
    for index in (torch.tensor([37, 2, 3]), torch.arange(40) % 3 == 1, torch.tensor([], dtype=torch.int64)):
        some = rule.select_tasks(state, index, params)
        got, _ = run(rule, {name: p[index] for name, p in params.items()}, 2, tasks=True, state=some, first=2)
        for name, p in got.items():
            assert p.shape == expected[name][index].shape
            torch.testing.assert_close(p, expected[name][index], rtol=1e-6, atol=1e-6)


@every_rule
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_of_rule_and_state_go_on_to_the_same_bits(row: Row, duplicate) -> None:
    rule = make_rule(row)
    params, state = detached(run(rule, make_params(row, 3), 2, tasks=True))
    expected, _ = run(rule, params, 2, tasks=True, state=state, first=2)
    twin, twin_params, twin_state = duplicate((rule, params, state))
    got, _ = run(twin, twin_params, 2, tasks=True, state=twin_state, first=2)
    for name, p in got.items():
        assert_same_bits(name, p.detach(), expected[name].detach())


@every_rule
def test_the_state_dict_is_all_that_training_changes(row: Row) -> None:
    rule, other = make_rule(row), make_rule(row)
    with torch.no_grad():
        for p in rule.parameters():
            p.mul_(0.9)
    other.load_state_dict(rule.state_dict())
    expected, got = (run(each, make_params(row, 3), 3, tasks=True)[0] for each in (rule, other))
    for name, p in got.items():
        assert_same_bits(name, p.detach(), expected[name].detach())


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_saved_rule_loads_without_naming_its_class(row: Row, dtype: torch.dtype, tmp_path: Path) -> None:
    rule = make_rule(row, dtype)
    rule.save_pretrained(tmp_path)
    loaded = metakern.rules.load(tmp_path)
    assert type(loaded) is type(rule)
    assert metakern.rules.get(name_of(type(rule))) is type(rule)
    assert repr(loaded) == repr(rule)
    assert loaded.state_dict().keys() == rule.state_dict().keys()
    assert {n for n, _ in loaded.named_parameters()} == {n for n, _ in rule.named_parameters()}
    params = make_params(row, 3, dtype)
    expected, got = (run(each, params, 3, tasks=True)[0] for each in (rule, loaded))
    for name in row.shapes:
        assert_same_bits(name, got[name].detach(), expected[name].detach())
    card = (tmp_path / "README.md").read_text()
    assert "metakern.rules.load" in card
    assert rule.described() in card


@every_rule
def test_weights_of_another_rule_are_refused_by_name(row: Row, tmp_path: Path) -> None:
    rule = make_rule(row)
    rule.save_pretrained(tmp_path)
    others = {type(make_rule(other)) for other in ROWS} - {type(rule)}
    for other in others:
        with pytest.raises(ValueError, match="must h"):  # the options, or the rule
            other.from_pretrained(tmp_path)
