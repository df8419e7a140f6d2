"""Further contract of problems to optimise: named tensors, consistent losses, gradients."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metakern.core.task_params import num_tasks
from metakern.learners import RuleLearner
from metakern.rules import Adam, CoordinatewiseLSTM, Rule
from metakern.tasks.variants import VariantBatch
from metakern.training.checkpoints import to_bytes
from tests.conformance.tasks.contents import gradients, rows_of
from tests.conformance.tasks.rows import PROBLEMS
from tests.tasks.draws import generator

#: One rule with a single launch for all coordinates, one that works tensor by tensor.
RULES: dict[str, Callable[[], Rule]] = {
    "lstm": lambda: CoordinatewiseLSTM(4),
    "adam": lambda: Adam(nn.Parameter(torch.tensor(0.01))),
}

every_row = pytest.mark.parametrize("row", PROBLEMS, ids=lambda row: row.name)
every_own_row = pytest.mark.parametrize("row", [row for row in PROBLEMS if not row.own], ids=lambda row: row.name)


def groups_with_params(batch: Any, params: Any) -> list[tuple[Any, Any]]:
    """Groups of a mixture, nested ones included, with their params; otherwise the batch and its params."""
    if not hasattr(batch, "groups"):
        return [(batch, params)]
    return [pair for part in zip(batch.groups, params, strict=True) for pair in groups_with_params(*part)]


@every_own_row
def test_params_are_tensors_by_name_with_the_task_axis_first(tasks: Any) -> None:
    batch = tasks.sample(5, generator())
    for group, params in groups_with_params(batch, batch.init_params()):
        assert isinstance(params, dict)
        for name, tensor in params.items():
            assert isinstance(name, str)
            assert len(tensor) == group.num_tasks
            assert tensor.dtype == torch.float32
            assert tensor.is_contiguous()
            assert not tensor.requires_grad


@every_row
def test_every_problem_has_a_loss(tasks: Any) -> None:
    batch = tasks.sample(5, generator())
    params = batch.init_params()
    assert num_tasks(params) == 5
    assert batch.loss(params).shape == batch.full_loss(params).shape == (5,)


@every_own_row
def test_every_start_is_drawn_anew(tasks: Any) -> None:
    batch = tasks.sample(4, generator())
    rows = [row for _ in range(2) for row in rows_of(batch.init_params())]
    assert not any(torch.equal(rows[i], rows[j]) for i in range(8) for j in range(i) if len(rows[i]) == len(rows[j]))


@every_row
def test_losses_of_minibatches_average_to_the_full_loss(tasks: Any) -> None:
    """To within five standard errors; equal if every loss is on all data."""
    batch = tasks.sample(4, generator())
    params = batch.init_params()
    drawn = torch.stack([batch.loss(params) for _ in range(100)]).double()
    error = 5 * drawn.std(0) / 10 + 1e-5 * drawn.mean(0).abs()
    assert ((drawn.mean(0) - batch.full_loss(params)).abs() <= error).all()


@every_row
@pytest.mark.parametrize("loss", ["loss", "full_loss"])
def test_gradients_are_finite_and_shaped_as_params(tasks: Any, loss: str) -> None:
    batch = tasks.sample(4, generator())
    params = batch.init_params()
    for seed in range(3):
        losses, grads = gradients(batch, params, loss)
        assert losses.isfinite().all()
        for p, g in zip(pytree.tree_leaves(params), pytree.tree_leaves(grads), strict=True):
            assert g.shape == p.shape
            assert g.isfinite().all()
        params = pytree.tree_map(lambda p, s=seed: p + 0.1 * torch.randn(p.shape, generator=generator(s)), params)


@every_row
def test_full_gradients_are_those_of_finite_differences(tasks: Any) -> None:
    """Along the gradient, with a step suited to float32."""
    batch = tasks.sample(4, generator())
    params = batch.init_params()
    losses, grads = gradients(batch, params, "full_loss")
    squares = torch.stack([row.square().sum() for row in rows_of(grads)])
    step = 1e-3 / squares.max().sqrt()
    ends = [batch.full_loss(pytree.tree_map(lambda p, g, s=sign: p + s * step * g, params, grads)) for sign in (1, -1)]
    slope = (ends[0].double() - ends[1].double()) / (2 * step)
    noise = 4 * torch.finfo(torch.float32).eps * losses.detach().abs() / step
    assert ((slope - squares).abs() <= 0.01 * squares + noise).all()


@every_row
def test_problems_of_a_batch_do_not_touch_each_other(tasks: Any) -> None:
    batch = tasks.sample(4, generator())
    leaves, structure = pytree.tree_flatten(batch.init_params())
    points = [leaf.requires_grad_() for leaf in leaves]
    chosen = batch.loss(pytree.tree_unflatten(points, structure))[1]
    grads = torch.autograd.grad(chosen, points, materialize_grads=True)
    touched = [bool(row.any()) for row in rows_of(pytree.tree_unflatten(list(grads), structure))]
    assert touched == [False, True, False, False]


@every_row
def test_second_derivatives_go_through(tasks: Any) -> None:
    """A rule may differentiate through its gradients; along the ones vector they are differences of first ones."""
    batch = tasks.sample(3, generator())
    params = pytree.tree_map(lambda p: p.double(), batch.init_params())
    batch = in_double(batch)

    def gradient(shift: float) -> tuple[Tensor, Any]:
        leaves, structure = pytree.tree_flatten(pytree.tree_map(lambda p: p + shift, params))
        points = [leaf.requires_grad_() for leaf in leaves]
        losses = batch.full_loss(pytree.tree_unflatten(points, structure))
        grads = torch.autograd.grad(losses.sum(), points, create_graph=True)
        return torch.cat([g.flatten() for g in grads]), points

    grads, points = gradient(0.0)
    second = torch.autograd.grad(grads.square().sum(), points)
    ends = [gradient(sign * 1e-7)[0].detach().square().sum() for sign in (1, -1)]  # steps cross no ReLU kink
    slope = (ends[0] - ends[1]) / 2e-7
    assert sum(s.sum() for s in second).item() == pytest.approx(slope.item(), rel=1e-3, abs=1e-6)


def in_double(batch: Any) -> Any:
    """The batch with its numbers in float64."""
    for group, _ in groups_with_params(batch, batch.init_params()):
        for inner in group.parts if isinstance(group, VariantBatch) else (group,):
            for name in ("weight", "target", "inputs", "targets", "factor"):
                if isinstance(data := getattr(inner, name, None), Tensor) and data.is_floating_point():
                    setattr(inner, name, data.double())
    return batch


@every_row
@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_rules_train_on_them(tasks: Any, make: Callable[[], Rule]) -> None:
    """Through RuleLearner: losses of every problem, and a gradient for every weight."""
    torch.manual_seed(0)
    learner = RuleLearner(make(), steps=4, unroll=2)
    for losses in learner.meta_losses(tasks.sample(5, generator())):
        assert losses.shape == (5,)
        losses.mean().backward()
    for weight in learner.parameters():
        assert weight.grad is not None
        assert weight.grad.isfinite().all()
    assert learner.evaluate(tasks.sample(5, generator()))["loss"].shape == (5,)


@every_own_row
def test_problems_in_flight_are_saved_and_replaced(tasks: Any) -> None:
    """A learner that keeps problems between meta-batches does both, and selects each problem twice."""
    drawn = tasks.sample(4, generator())
    for group in getattr(drawn, "groups", (drawn,)):
        if hasattr(group, "groups"):
            continue  # groups of a nested mixture are kept one by one
        twice = torch.arange(group.num_tasks).repeat_interleave(2)
        batch = group.select(twice)
        params = batch.init_params()
        assert torch.equal(*(torch.cat([row.flatten() for row in rows_of(params)[k::2]]) for k in (0, 1)))
        saved = torch.load(io.BytesIO(to_bytes({"format": 1, "batch": batch.export_state()})), weights_only=True)
        batch.loss(params)
        other = group.select(twice.flip(0)[:1])
        restored = other.import_state(copy.deepcopy(saved["batch"]))
        again = group.select(twice)
        again.init_params()
        for _ in range(2):
            assert torch.equal(restored.loss(params), again.loss(params))
        assert torch.equal(restored.full_loss(params), again.full_loss(params))
        last = group.num_tasks - 1
        merged = group.select(torch.tensor([0, 0])).replaced(torch.tensor([1]), group.select(torch.tensor([last])))
        start = {name: torch.stack([p[0], p[2 * last]]) for name, p in params.items()}
        expected = [group.full_loss({name: p[::2] for name, p in params.items()})[task] for task in (0, last)]
        torch.testing.assert_close(merged.full_loss(start), torch.stack(expected))


@every_own_row
def test_a_selection_of_nothing_is_an_error(tasks: Any) -> None:
    with pytest.raises(
        ValueError, match=r"tasks must select at least one of the 3 problems, .*got slice\(3, 5, None\)"
    ):
        tasks.sample(3, generator()).select(slice(3, 5))


@every_own_row
@pytest.mark.parametrize("loss", ["loss", "full_loss"])
def test_params_of_other_names_are_refused(tasks: Any, loss: str) -> None:
    batch = tasks.sample(3, generator())
    for group, params in groups_with_params(batch, batch.init_params()):
        expected = rf"params must be a dict of {', '.join(params)}, as init_params returns it"
        with pytest.raises(TypeError, match=f"{expected}, got Tensor"):
            getattr(group, loss)(torch.zeros(group.num_tasks, 3))
        first, *others = params
        with pytest.raises(ValueError, match=f"{expected}, got {', '.join([*others, 'own'])}"):
            getattr(group, loss)({**{name: params[name] for name in others}, "own": params[first]})
