"""Calls of every raw operator torch.ops.metakern.*, past the Python functions that check their arguments first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from metakern.ops import pack_state
from metakern.ops.core.registry import operators
from tests.mlp_problems import Case
from tests.problems import make_problem
from tests.update_problems import make_update

#: Operators of the compiled library.
COMPILED = (
    "lstm_step",
    "lstm_step_",
    "lstm_step_backward",
    "inner_update",
    "mlp_inner_loop",
    "mlp_inner_loop_backward",
    "mlp_meta_loss",
    "mlp_meta_loss_backward",
)

#: Those of Triton's kernels, in the same order.
TRITON = (
    "lstm_step_triton",
    "lstm_step_triton_",
    "lstm_step_triton_backward",
    "inner_update_triton",
    "mlp_inner_loop_triton",
    "mlp_inner_loop_triton_backward",
    "mlp_meta_loss_triton",
    "mlp_meta_loss_triton_backward",
)


def operator(name: str) -> Callable[..., Any]:
    """torch.ops.metakern.``name``; Triton's are registered when they are first asked for."""
    if "_triton" in name:
        for found in operators().values():
            found.prepare("triton")
    overloads: Callable[..., Any] = getattr(torch.ops.metakern, name)
    return overloads


def arguments(name: str, seed: int = 0, tasks: int = 3, loss: int = 0) -> list[Any]:
    """What a call of an operator takes, in its order."""
    kind = name.replace("_triton", "")
    if kind == "inner_update":
        update = make_update(tasks, "per parameter", shapes=[(3, 2), (5,)], clip_norm=1.0, resting=(1,), seed=seed)
        return list(update.arguments())
    if kind.startswith("lstm_step"):
        problem = make_problem(37, 5, 2, seed=seed)
        options = [problem.weights, 1, 10.0, 0.1, 0]
        if not kind.endswith("backward"):
            return [problem.params, problem.grads, problem.state.data, *options]
        grads = problem.cotangents[0], pack_state(*problem.cotangents[1:]).data
        return [*grads, problem.grads, problem.state.data, *options]
    return _inner_loop_arguments(kind, seed, tasks, loss, "_triton" if kind != name else "")


def _inner_loop_arguments(kind: str, seed: int, tasks: int, loss: int, suffix: str) -> list[Any]:
    names = ("mse", "cross_entropy", "binary_cross_entropy_with_logits")
    case, steps = Case([2, 4, 3], tasks, 5, 4, names[loss], own=seed % 2 == 1, seed=seed), 2
    params = [p.float() for p in case.params]
    sets = zip(case.data(torch.float32), (5, 4), strict=True)
    support, query = ((*data, torch.ones(tasks, n, dtype=torch.bool)) for data, n in sets)
    lr = [torch.full(p.shape[-2 + i % 2 :], 0.1) for i, p in enumerate(params)]
    options = [lr, 0.0, steps, False, -1, 1, loss, 1]
    second_order, weights = torch.tensor([True, False]), torch.tensor([0.5, 1.0])
    # Of the activations, and of clipping; every third case does without.
    last: list[Any] = [[], None] if seed % 3 == 0 else [[0.1], 0.5]
    options[5] = 1 if seed % 3 == 0 else [4]  # a leaky ReLU has the slope
    if kind.startswith("mlp_inner_loop"):
        forward = [params, *support, *options, True, second_order, *last]
        if kind == "mlp_inner_loop":
            return forward
        results, trajectory = operator(f"mlp_inner_loop{suffix}")(*forward)
        return [[torch.ones_like(x) for x in results], trajectory, params, *support, *options, second_order, *last]
    forward = [params, *support, *query, *options, second_order, weights, True, *last]
    if kind == "mlp_meta_loss":
        return forward
    losses, task_grads = operator(f"mlp_meta_loss{suffix}")(*forward)
    return [torch.ones_like(losses), task_grads, params, *support[:2], lr, steps, False, loss]


def places(args: list[Any]) -> Iterator[tuple[int, int | None]]:
    """Where tensors stand: index of the argument, and index in it where that is a list."""
    for index, value in enumerate(args):
        if isinstance(value, Tensor):
            yield index, None
        elif isinstance(value, list):
            yield from ((index, inner) for inner, x in enumerate(value) if isinstance(x, Tensor))


def tensor_at(args: list[Any], place: tuple[int, int | None]) -> Tensor:
    index, inner = place
    found: Tensor = args[index] if inner is None else args[index][inner]
    return found


def replaced(args: list[Any], place: tuple[int, int | None], value: Any) -> list[Any]:
    """The arguments with another tensor at a place."""
    index, inner = place
    new = list(args)
    if inner is None:
        new[index] = value
    else:
        new[index] = [*args[index][:inner], value, *args[index][inner + 1 :]]
    return new
