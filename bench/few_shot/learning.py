"""One run of the few-shot benchmark: its curve on validation tasks, its final accuracy on test tasks."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.few_shot.cases import Case, Plan
from bench.runs import Advance
from metakern.core.files import write_whole
from metakern.learners import ClusteredLearner
from metakern.runs.fewshot import make_learner, make_tasks, sampler
from metakern.tasks import TaskDistribution
from metakern.training.averaging import start_anew

#: Seeds of the generators of validation and test tasks.
HELD_OUT_SEEDS = {"valid": 10**6, "test": 2 * 10**6}


def accuracy(learner: Any, tasks: TaskDistribution, split: str, number: int) -> float:
    """Mean accuracy on the query sets of held-out tasks after adaptation to their support sets."""
    batch = tasks.split(split).sample(number, torch.Generator().manual_seed(HELD_OUT_SEEDS[split]))
    return float(learner.evaluate(batch)["accuracy"].mean())


def train(case: Case, seed: int, plan: Plan, advance: Advance, *, test: bool = True) -> dict[str, Any]:
    """Train one run.

    Returns:
        "curve", by tasks and processor seconds of the training alone; "seconds", those of all of it; with ``test``, the
        final "test" accuracy
    """
    settings = case.settings(seed, plan)
    with torch.random.fork_rng(devices=[]):
        tasks = make_tasks(settings)
        learner: Any = make_learner(settings, tasks)
    source, optimizer = sampler(settings, tasks, learner), settings.make_optimizer(learner)
    scheduler = settings.make_scheduler(optimizer, plan.iterations)
    generator = torch.Generator().manual_seed(seed)
    points = {round(point * plan.iterations / plan.points) for point in range(plan.points + 1)}
    curve, seconds = [], 0.0
    for iteration in range(plan.iterations + 1):
        if iteration in points:
            valid = accuracy(learner, tasks, "valid", plan.valid)
            curve.append({"tasks": iteration * plan.num_tasks, "seconds": seconds, "accuracy": valid})
            advance(iteration / plan.iterations)
        if iteration < plan.iterations:
            began = time.thread_time()
            if isinstance(learner, ClusteredLearner):
                start_anew(learner.on_iteration(iteration, source, generator), optimizer, None)
            for losses in learner.meta_losses(source.sample(plan.num_tasks, generator)):
                optimizer.zero_grad()
                losses.mean().backward()
                _step(optimizer, learner, settings.max_grad_norm)
            if scheduler is not None:
                scheduler.step()
            seconds += time.thread_time() - began
    found = {"seed": seed, "iterations": plan.iterations, "seconds": seconds, "curve": curve}
    return found | ({"test": accuracy(learner, tasks, "test", plan.test)} if test else {})


def _step(optimizer: torch.optim.Optimizer, learner: torch.nn.Module, max_grad_norm: float) -> None:
    """An outer step, left out if the meta-gradient is not finite, as the trainer does."""
    norm = torch.nn.utils.clip_grad_norm_(learner.parameters(), max_grad_norm or float("inf"))
    if bool(norm.isfinite()):
        optimizer.step()


def kept(folder: Path | None, case: Case, seed: int, plan: Plan, advance: Advance) -> dict[str, Any]:
    """A run, from its file if it was made with the same settings."""
    name = f"{case.method}-{case.shots}-shot-{case.sampler}-{plan.iterations}-{seed}.json"
    settings = json.loads(json.dumps(case.described(replace(plan, seeds=0))))
    path = None if folder is None else folder / name
    if path is not None and path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        if found["described"] == settings:
            return found
    found = train(case, seed, plan, advance) | {"described": settings}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(found).encode())
    return found
