"""Trees of parameters of many tasks: which tensors belong together, and as one tensor."""

from __future__ import annotations

import pytest
import torch

from metakern.core.task_params import join_tasks, num_tasks, task_groups


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
