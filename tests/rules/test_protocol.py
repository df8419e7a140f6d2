"""Helpers of the rule protocol: names, structure checks, coordinates of tasks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metakern.rules import Rule, RuleState
from metakern.rules.protocol import (
    coordinates_of_tasks,
    detached,
    flatten,
    loss_of_coordinates,
    matched_leaves,
    moved,
    named_leaves,
    tensor_leaves,
    unflatten,
)


def a_state() -> RuleState:
    per_tensor = ({"m": torch.arange(6.0).view(3, 2)}, {"m": torch.arange(3.0)})
    return RuleState(per_tensor, {"step": torch.tensor(7)}, tasks=True)


def test_tensors_are_named_by_the_way_to_them() -> None:
    x, y, z = torch.ones(1), torch.ones(2), torch.ones(3)
    assert named_leaves({"b": x, "a": y}) == {"b": x, "a": y}
    assert named_leaves(x) == {"params": x}
    assert list(named_leaves({"block": {"weight": x}, "heads": [y, (z,)]})) == ["block.weight", "heads.0", "heads.1.0"]


def test_coordinates_go_flat_and_back() -> None:
    leaves = [torch.randn(3, 2), torch.randn(()), torch.randn(0, 4), torch.randn(5).bfloat16()]
    flat = flatten(leaves)
    assert flat.shape == (12,)
    back = unflatten(flat, leaves)
    for got, expected in zip(back, leaves, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def test_coordinates_and_losses_of_tasks() -> None:
    leaves = [torch.arange(6.0).view(3, 2), torch.arange(6.0, 9.0)]
    index = torch.tensor([2, 0])
    expected = torch.cat([leaf[index].flatten() for leaf in leaves])
    assert torch.equal(flatten(leaves)[coordinates_of_tasks(index, leaves)], expected)
    losses = loss_of_coordinates(torch.tensor([10.0, 20.0, 30.0]), leaves)
    assert losses.tolist() == [10, 10, 20, 20, 30, 30, 10, 20, 30]
    assert loss_of_coordinates(torch.tensor(5.0), leaves).tolist() == [5] * 9


def test_a_state_is_a_tree_of_tensors() -> None:
    state = a_state()
    double = moved(state, torch.float64)
    assert isinstance(double, RuleState)
    assert double.tasks
    assert double.per_tensor[0]["m"].dtype == torch.float64
    assert double.shared["step"].dtype == torch.int64
    state.per_tensor[0]["m"].requires_grad_()
    assert not detached(state).per_tensor[0]["m"].requires_grad
    some = Rule().select_tasks(state, torch.tensor([True, False, True]), None)
    assert some.per_tensor[0]["m"].tolist() == [[0, 1], [4, 5]]
    assert some.per_tensor[1]["m"].tolist() == [0, 2]
    assert some.shared["step"] == 7


def test_a_step_in_place_is_a_step() -> None:
    class Halving(Rule):
        """θ' = θ/2 − g; counts its steps."""

        def forward(self, params, grads, state, *, loss=None):  # type: ignore[no-untyped-def]
            step = state.shared["step"] + 1
            return params / 2 - grads, RuleState((), {"step": step}, state.tasks)

    params, state = torch.tensor([4.0, 8.0]), RuleState((), {"step": torch.tensor(0)}, tasks=False)
    Halving().step_(params, torch.ones(2), state)
    assert params.tolist() == [1, 3]
    assert state.shared["step"] == 1
    Halving().step_(params, torch.ones(2), state, lr=0.5)
    assert params.tolist() == [1 - 0.75, 3 - 1.25]


@pytest.mark.parametrize(
    ("params", "grads", "error", "message"),
    [
        ({"a": torch.ones(1)}, {"b": torch.ones(1)}, ValueError, "grads must have the structure of params"),
        ([torch.ones(1)], [torch.ones(2)], ValueError, r"leaf 0 has \[2\], expected \[1\]"),
        ([torch.ones(1)], [torch.ones(1, device="meta")], ValueError, "must be on one device, cpu"),
        ([1.0], [torch.ones(1)], TypeError, "params must hold tensors only, got float as leaf 0"),
    ],
)
def test_gradients_that_do_not_fit(
    params: list[Tensor], grads: list[Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        matched_leaves(params, grads)


def test_tasks_need_one_axis() -> None:
    assert len(tensor_leaves([torch.ones(3, 2), torch.ones(3)], tasks=True)) == 2
    for params in ([torch.ones(3), torch.ones(2)], [torch.ones(())]):
        with pytest.raises(ValueError, match="params must have one leading axis of tasks for tasks=True"):
            tensor_leaves(params, tasks=True)
