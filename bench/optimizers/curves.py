"""Loss curves of a task: of every baseline at every learning rate, and of a learned optimizer.

Axis legend: R rates, S seeds, G points of the curve.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bench.optimizers.baselines import BASELINES, Baseline
from bench.optimizers.tasks import Task
from metakern.evaluation.optimizers import LEARNING_RATES
from metakern.rules import Rule

#: Lengths of training, and number of seeds (starting points with their minibatches).
HORIZONS = (100, 500, 2000)
SEEDS = 5

#: Steps after which losses on all samples are taken.
GRID = tuple(sorted({0, 1, 2, 5, *range(10, 101, 10), *range(125, 501, 25), *range(600, 2001, 100)}))


def grid(steps: int) -> list[int]:
    """The points of a curve of so many steps."""
    return [point for point in GRID if point <= steps]


def problems(task: Task, copies: int) -> Any:
    """The task from every seed, ``copies`` times: T = copies · S, seeds fastest."""
    batch = task.make().sample(SEEDS, torch.Generator().manual_seed(1000))
    return batch.select(torch.arange(SEEDS).repeat(copies))


def baseline_curves(task: Task, name: str, steps: int) -> Tensor:
    """Losses [G, R, S] of a baseline."""
    rates = torch.tensor(LEARNING_RATES)
    batch = problems(task, len(rates))
    params: dict[str, Tensor] = batch.init_params()
    optimizer = Baseline(name, rates.repeat_interleave(SEEDS), steps)
    losses = []
    for step in range(steps + 1):
        if step in GRID:
            with torch.no_grad():
                losses.append(batch.full_loss(params))
        if step == steps:
            break
        leaves = [p.requires_grad_() for p in params.values()]
        grads = torch.autograd.grad(batch.loss(params).sum(), leaves)
        with torch.no_grad():
            new = optimizer.step([p.detach() for p in leaves], list(grads))
        params = dict(zip(params, new, strict=True))
    return torch.stack(losses).view(-1, len(rates), SEEDS)


def rule_curves(task: Task, rule: Rule, steps: int) -> Tensor:
    """Losses [G, S] of a rule."""
    batch = problems(task, 1)
    params: dict[str, Tensor] = batch.init_params()
    state = rule.init_state(params, tasks=True)
    losses = []
    for step in range(steps + 1):
        if step in GRID:
            with torch.no_grad():
                losses.append(batch.full_loss(params))
        if step == steps:
            break
        leaves = [p.requires_grad_() for p in params.values()]
        grads = torch.autograd.grad(batch.loss(params).sum(), leaves)
        with torch.no_grad():
            new, state = rule({n: p.detach() for n, p in params.items()}, dict(zip(params, grads, strict=True)), state)
        params = new
    return torch.stack(losses)


def all_baselines(task: Task) -> dict[str, list[Any]]:
    """Curves by "optimizer/horizon", [G, R, S] as lists; one without a schedule has one curve for all horizons."""
    found = {}
    for name, (_, decays) in BASELINES.items():
        longest = baseline_curves(task, name, HORIZONS[-1])
        for horizon in HORIZONS:
            short = decays and horizon < HORIZONS[-1]
            curves = baseline_curves(task, name, horizon) if short else longest[: len(grid(horizon))]
            found[f"{name}/{horizon}"] = _rounded(curves)
    return found


def all_of_rule(task: Task, plain: Rule, told: Mapping[int, Rule]) -> dict[str, list[Any]]:
    """Curves of a learned optimizer, "general/horizon", and of those that know the horizon, [G, S]."""
    longest = rule_curves(task, plain, HORIZONS[-1])
    found = {f"general/{horizon}": _rounded(longest[: len(grid(horizon))]) for horizon in HORIZONS}
    return found | {f"general, told/{h}": _rounded(rule_curves(task, rule, h)) for h, rule in told.items()}


def _rounded(curves: Tensor) -> list[Any]:
    """Five digits; what is not finite as null."""

    def of(x: Any) -> Any:
        if isinstance(x, list):
            return [of(y) for y in x]
        return float(f"{x:.5g}") if abs(x) < float("inf") else None

    found: list[Any] = of(curves.tolist())
    return found
