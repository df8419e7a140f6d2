"""Loss curves of a task: of every baseline at every learning rate, and of a learned optimizer.

Learning rates are chosen by the first two of five seeds; the other three then run at the rates that were chosen.

Axis legend: R rates, S seeds, G points of the curve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.optimizers.baselines import BASELINES, Baseline
from bench.optimizers.tasks import Task
from metakern.evaluation.optimizers import LEARNING_RATES
from metakern.rules import Rule

Params = dict[str, Tensor]

#: Lengths of training, number of seeds (starting points with their minibatches), and those that choose rates.
HORIZONS = (100, 500, 2000)
SEEDS = 5
TUNING_SEEDS = 2

#: Steps after which losses on all samples are taken.
GRID = tuple(sorted({0, 1, 2, 5, *range(10, 101, 10), *range(125, 501, 25), *range(600, 2001, 100)}))


def grid(steps: int) -> list[int]:
    """The points of a curve of so many steps."""
    return [point for point in GRID if point <= steps]


def problems(task: Task, copies: int, seeds: range = range(SEEDS)) -> Any:
    """The task from some of the seeds, ``copies`` times: T = copies · S, seeds fastest."""
    batch = task.make().sample(SEEDS, torch.Generator().manual_seed(1000))
    return batch.select(torch.tensor(seeds).repeat(copies))


def baseline_curves(task: Task, name: str, steps: int, seeds: range, rates: Sequence[float]) -> Tensor:
    """Losses [G, R, S] of a baseline."""
    number = len(seeds)
    optimizer = Baseline(name, torch.tensor(rates).repeat_interleave(number), steps)

    def step(params: Params, grads: Params) -> Params:
        return dict(zip(params, optimizer.step(list(params.values()), list(grads.values())), strict=True))

    batch = problems(task, len(rates), seeds)
    return _curves(batch, batch.init_params(), step, steps).view(-1, len(rates), number)


def rule_curves(task: Task, rule: Rule, steps: int) -> Tensor:
    """Losses [G, S] of a rule."""
    batch = problems(task, 1)
    start: Params = batch.init_params()
    state = rule.init_state(start, tasks=True)

    def step(params: Params, grads: Params) -> Params:
        nonlocal state
        new: Params
        new, state = rule(params, grads, state)
        return new

    return _curves(batch, start, step, steps)


def _curves(batch: Any, params: Params, take_step: Callable[[Params, Params], Params], steps: int) -> Tensor:
    """Losses [G, T] on all samples along a training of T problems."""
    losses = []
    for step in range(steps + 1):
        if step in GRID:
            with torch.no_grad():
                losses.append(batch.full_loss(params))
        if step < steps:
            leaves = [p.requires_grad_() for p in params.values()]
            grads = torch.autograd.grad(batch.loss(params).sum(), leaves)
            with torch.no_grad():
                detached = {name: p.detach() for name, p in params.items()}
                params = take_step(detached, dict(zip(params, grads, strict=True)))
    return torch.stack(losses)


def tuning_curves(task: Task) -> dict[str, list[Any]]:
    """Curves of baselines by "optimizer/horizon" at all rates, [G, R, 2] as lists."""
    return _of_baselines(task, range(TUNING_SEEDS), lambda key: range(len(LEARNING_RATES)))


def chosen_curves(task: Task, chosen: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
    """Curves of baselines from the seeds that did not choose, at the rates of these indices: [G, R, 3] as lists."""
    return _of_baselines(task, range(TUNING_SEEDS, SEEDS), chosen.__getitem__)


def _of_baselines(task: Task, seeds: range, rates_of: Callable[[str], Sequence[int]]) -> dict[str, list[Any]]:
    """One without a schedule trains once, for all horizons."""
    found = {}
    for name, (_, decays) in BASELINES.items():
        wanted = {horizon: list(rates_of(f"{name}/{horizon}")) for horizon in HORIZONS}
        for steps in HORIZONS if decays else HORIZONS[-1:]:
            served = (steps,) if decays else HORIZONS
            indices = sorted({index for horizon in served for index in wanted[horizon]})
            curves = baseline_curves(task, name, steps, seeds, [LEARNING_RATES[index] for index in indices])
            for horizon in served:
                places = [indices.index(index) for index in wanted[horizon]]
                found[f"{name}/{horizon}"] = _rounded(curves[: len(grid(horizon)), places])
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
