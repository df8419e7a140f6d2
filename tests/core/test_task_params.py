"""Parameter trees with a task axis: matching of tensors, and packing into one tensor."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

from metakern.core.task_params import aligned_leaves, flat_params, join_tasks, num_tasks, task_groups


def test_a_tree_is_one_group_and_a_tuple_several():
    x, y, z = torch.zeros(4, 2), torch.zeros(4), torch.zeros(3, 5)
    for tree, expected in [
        (x, [[x]]),
        ({"x": x, "y": y}, [[x, y]]),
        ([x, {"y": y}], [[x, y]]),
        (({"x": x, "y": y}, z), [[x, y], [z]]),
        (((x,), ({"y": y}, z)), [[x], [y], [z]]),
    ]:
        found = task_groups(tree)
        assert [[id(tensor) for tensor in group] for group in found] == [[id(t) for t in group] for group in expected]
        assert num_tasks(tree) == sum(len(group[0]) for group in expected)


def test_what_has_no_common_task_axis_is_named():
    with pytest.raises(ValueError, match=r"the same task axis first, got shapes \[4, 2\], \[3\]; groups .* of a tuple"):
        task_groups({"x": torch.zeros(4, 2), "y": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"the same task axis first, got shapes \[\]"):
        task_groups(torch.zeros(()))
    with pytest.raises(TypeError, match="params must hold tensors only, got float among them"):
        task_groups({"x": torch.zeros(4, 2), "y": 1.0})


def test_the_tensors_of_a_group_are_joined_task_by_task():
    x, y, z = torch.arange(12.0).view(2, 3, 2), torch.tensor([20.0, 21.0]), torch.tensor([[30.0], [31.0]])
    assert join_tasks([x, y, z]).tolist() == [[*range(6), 20, 30], [*range(6, 12), 21, 31]]
    assert join_tasks([x]).data_ptr() == x.data_ptr()
    assert join_tasks([x]).shape == (2, 6)


TREES = [
    torch.zeros(4, 2),
    {"x": torch.zeros(4, 2), "y": torch.zeros(4)},
    ({"x": torch.zeros(4, 2)}, torch.zeros(3), ({"y": torch.zeros(2)},)),
    [torch.zeros(1), {"a": {"b": torch.zeros(2)}, "c": (torch.zeros(3),)}],
    {"a": {"b": torch.zeros(2)}, "c": 1.0},
    ({}, torch.zeros(3)),
    {},
    (),
]


@pytest.mark.parametrize("tree", TREES, ids=range(len(TREES)))
def test_trees_are_taken_apart_as_pytree_does(tree):
    leaves, rebuild = flat_params(tree)
    expected, structure = pytree.tree_flatten(tree)
    assert list(map(id, leaves)) == list(map(id, expected))
    others = [object() for _ in leaves]
    rebuilt, again = pytree.tree_flatten(rebuild(others))
    assert again == structure
    assert list(map(id, rebuilt)) == list(map(id, others))
    if leaves:
        with pytest.raises((ValueError, StopIteration, TypeError)):
            rebuild(others[:-1])


def test_trees_of_tensors_are_aligned_only_where_their_structures_are_the_same():
    for tree in TREES[:3]:
        twin = pytree.tree_map(torch.ones_like, tree)
        found = aligned_leaves(tree, twin)
        assert list(map(id, found)) == list(map(id, pytree.tree_leaves(twin)))
    x, y = torch.zeros(2), torch.zeros(2)
    for one, other in [
        (x, {"x": x}),
        ({"x": x}, {"y": x}),
        ({"x": x, "y": y}, {"y": y, "x": x}),
        ({"x": x}, {"x": 1.0}),
        ((x, y), (x,)),
        ((x, y), [x, y]),
        ([x], [x]),  # known to pytree alone
    ]:
        assert aligned_leaves(one, other) is None
