"""Masks of the operators: a task with all samples masked, and masks whose bytes are not 0 and 1.

The checks are functions, which test_masks_triton.py calls for Triton's kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from metakern.ops import inner_update, mlp_inner_loop, mlp_meta_loss
from metakern.ops.mlp_inner_loop.reference import LOSSES
from tests.conftest import assert_close, assert_same_bits
from tests.mlp_problems import F64, Case
from tests.update_problems import draw

EMPTY = 1  # the task that has no samples


def masks(tasks: int, samples: int = 5, queries: int = 4) -> dict[str, Tensor]:
    """Every task has a sample that does not count in each set."""
    support, query = torch.ones(tasks, samples, dtype=torch.bool), torch.ones(tasks, queries, dtype=torch.bool)
    support[:, -1] = query[:, 0] = False
    return {"support_mask": support, "query_mask": query}


def leaves(case: Case) -> list[Tensor]:
    return [p.detach().clone().requires_grad_() for p in case.params]


#: Tasks in lanes of a vector, and tasks one by one.
TASKS = pytest.mark.parametrize("tasks", [3, 17])
BACKENDS = pytest.mark.parametrize("backend", ["cpp", "reference"])


def check_without_samples(backend: str, loss: str, tasks: int) -> None:
    case = Case([2, 6, 3], tasks, loss=loss, own=True)
    mask = masks(tasks)["support_mask"]
    mask[EMPTY] = False
    params = leaves(case)
    found = mlp_inner_loop(params, *case.support, lr=0.1, steps=3, loss=loss, support_mask=mask, backend=backend)
    grads = torch.autograd.grad(sum(x.square().sum() for x in found), params)
    for p, new, grad in zip(params, found, grads, strict=True):
        assert_same_bits("parameters", new[EMPTY], p[EMPTY])
        assert_close("gradient", grad[EMPTY], 2 * p[EMPTY], 1e-15)  # of the square of what did not change
        assert not torch.equal(new[0], p[0])
        assert grad.isfinite().all()


@pytest.mark.sanitize
@TASKS
@pytest.mark.parametrize("loss", LOSSES)
@BACKENDS
def test_a_task_without_samples_keeps_its_parameters(backend: str, loss: str, tasks: int) -> None:
    check_without_samples(backend, loss, tasks)


def check_without_queries(backend: str, loss: str, tasks: int) -> None:
    case = Case([2, 6, 3], tasks, loss=loss, own=True)
    empty = masks(tasks)
    empty["query_mask"][EMPTY] = False
    params, rates = leaves(case), [torch.full((), 0.1, dtype=F64, requires_grad=True)]
    losses = mlp_meta_loss(params, case.support, case.query, lr=rates[0], steps=2, loss=loss, **empty, backend=backend)
    assert losses[EMPTY].item() == 0
    assert (losses[[0, 2]] > 0).all()
    grads = torch.autograd.grad(losses.sum(), [*params, *rates])
    for grad in grads[:-1]:
        assert not grad[EMPTY].any()
        assert grad[0].any()
        assert grad.isfinite().all()
    # What the other tasks give is not changed by the one that is empty.
    others = [i for i in range(tasks) if i != EMPTY]
    sets = [tuple(x[others] for x in s) for s in (case.support, case.query)]
    fewer = {name: mask[others] for name, mask in empty.items()}
    alone = mlp_meta_loss([p[others] for p in params], *sets, lr=0.1, steps=2, loss=loss, **fewer, backend=backend)
    assert_close("losses of the others", losses[others], alone, 1e-12)


@pytest.mark.sanitize
@TASKS
@pytest.mark.parametrize("loss", LOSSES)
@BACKENDS
def test_a_task_without_queries_has_a_loss_and_gradients_of_zero(backend: str, loss: str, tasks: int) -> None:
    check_without_queries(backend, loss, tasks)


def check_beside_shared_parameters(backend: str) -> None:
    case = Case([2, 6, 1], 3)
    empty = masks(3)
    for mask in empty.values():
        mask[EMPTY] = False
    fewer = [tuple(x[[0, 2]] for x in s) for s in (case.support, case.query)]
    others = {name: mask[[0, 2]] for name, mask in empty.items()}
    results = []
    for sets, own in (((case.support, case.query), empty), (fewer, others)):
        params = leaves(case)
        losses = mlp_meta_loss(params, *sets, lr=0.1, steps=2, **own, backend=backend)
        results.append([losses.sum().detach(), *torch.autograd.grad(losses.sum(), params)])
    for with_it, without in zip(*results, strict=True):
        assert_close("sum", with_it, without, 1e-12)


@BACKENDS
def test_a_task_without_any_samples_in_both_sets_beside_shared_parameters(backend: str) -> None:
    check_beside_shared_parameters(backend)


# ------------------------------------------------------------------------------------------- bytes other than 0 and 1


def odd_bytes(mask: Tensor) -> Tensor:
    """The same mask, True by bytes of 2, 3, 128 and 255."""
    values = torch.tensor([2, 3, 128, 255], dtype=torch.uint8).repeat(mask.numel() // 4 + 1)[: mask.numel()]
    return torch.where(mask, values.view(mask.shape), torch.zeros((), dtype=torch.uint8)).view(torch.bool)


def check_bytes_of_samples(backend: str, tasks: int) -> None:
    case = Case([2, 6, 3], tasks, own=True)
    results: list[Any] = []
    for change in (Tensor.clone, odd_bytes):
        params, own = leaves(case), {name: change(mask) for name, mask in masks(tasks).items()}
        losses = mlp_meta_loss(params, case.support, case.query, lr=0.1, steps=2, **own, backend=backend)
        results.append([losses, *torch.autograd.grad(losses.sum(), params)])
    for plain, odd in zip(*results, strict=True):
        assert_same_bits("result", odd, plain)


@pytest.mark.sanitize
@TASKS
@BACKENDS
def test_masks_of_samples_are_true_for_every_byte_but_0(backend: str, tasks: int) -> None:
    check_bytes_of_samples(backend, tasks)


def check_bytes_of_active(backend: str, clip_norm: float | None) -> None:
    params, grads = draw(3, torch.float32, 0), draw(3, torch.float32, 1)
    active = torch.tensor([True, False, True])
    results = [
        inner_update(params, grads, 0.1, clip_norm=clip_norm, active=mask, backend=backend)
        for mask in (active, odd_bytes(active))
    ]
    for plain, odd in zip(*results, strict=True):
        assert_same_bits("result", odd, plain)


@pytest.mark.sanitize
@pytest.mark.parametrize("clip_norm", [None, 1.0])
@BACKENDS
def test_tasks_are_active_for_every_byte_but_0(backend: str, clip_norm: float | None) -> None:
    check_bytes_of_active(backend, clip_norm)


def check_bytes_of_second_order(backend: str) -> None:
    case = Case([2, 6, 3], 3)
    suffix = "_triton" if backend == "triton" else ""
    weights = torch.tensor([0.0, 1.0], dtype=F64)
    results = []
    for second_order in (torch.tensor([True, False]), odd_bytes(torch.tensor([True, False]))):
        operator = getattr(torch.ops.metakern, f"mlp_meta_loss{suffix}")
        sets = (*case.support, None, *case.query, None)
        options = (0.1, 2, False, -1, 1, 0, 2)
        results.append(operator(case.params, *sets, [], *options, second_order, weights, True))
    for plain, odd in zip(*results, strict=True):
        assert_same_bits("result", odd, plain)


@pytest.mark.sanitize
@pytest.mark.parametrize("backend", ["cpp"])
def test_steps_are_of_second_order_for_every_byte_but_0(backend: str) -> None:
    check_bytes_of_second_order(backend)
