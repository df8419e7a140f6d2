"""Evaluation of adaptation to unseen tasks: loss and accuracy after every number of inner steps.

Axis legend: T tasks, Q query samples of a task, K inner steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metakern.core.requirements import required
from metakern.tasks import Episodes, TaskDistribution

#: Default seed of test tasks: constant, so that all learners are reported on the same tasks.
TEST_SEED = 2**31

#: Tasks adapted at once, to bound memory.
CHUNK = 100


@dataclass(frozen=True)
class Adaptation:
    """Measures of T unseen tasks after 0 to K inner steps.

    Attributes:
        name: of the learner
        measures: "loss", and "accuracy" where there are classes, [K + 1, T] each
        chance: accuracy of guessing; None if there are no classes
    """

    name: str
    measures: dict[str, Tensor]
    chance: float | None = None

    @property
    def num_tasks(self) -> int:
        """T."""
        return self.measures["loss"].shape[1]

    def summary(self) -> dict[str, list[dict[str, float]]]:
        """Mean and half-width of the 95 % interval of every measure by step, for JSON."""
        result = {}
        for name, values in self.measures.items():
            mean, half = mean_interval(values)
            result[name] = [
                {"steps": step, "mean": m, "interval": h}
                for step, (m, h) in enumerate(zip(mean.tolist(), half.tolist(), strict=True))
            ]
        return result


def mean_interval(sample: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of [..., T] over the last axis, and half-width of Student's 95 % interval; NaN for T = 1."""
    with required():
        from scipy import stats  # a dependency of scikit-learn; takes half a second to import

    count = sample.shape[-1]
    quantile = float(stats.t.ppf(0.975, max(count - 1, 1)))
    sample = sample.double()
    return sample.mean(-1), quantile * sample.std(-1) / count**0.5


def measure_adaptation(
    learner: Any,
    tasks: TaskDistribution,
    *,
    num_tasks: int = 600,
    steps: int | None = None,
    seed: int = TEST_SEED,
    name: str = "MAML",
    advance: Callable[[int], object] | None = None,
) -> Adaptation:
    """Adapt to tasks of the test split and measure their query sets after 0 to K inner steps.

    Args:
        learner: a :class:`metakern.learners.MAMLLearner`, or another with its ``predict`` and ``measure``
        tasks: the distribution, of which the test split is used
        num_tasks: T
        steps: K; default: the learner's ``eval_steps``
        seed: of the draws; use the same for all learners to compare
        name: name of the result
        advance: called with the number of finished tasks, after every :data:`CHUNK` of them

    Raises:
        ValueError: for fewer than 2 tasks, too few for an interval.
    """
    if num_tasks < 2:
        raise ValueError(f"num_tasks must be at least 2, got {num_tasks}")
    steps = learner.eval_steps if steps is None else steps
    device = next(learner.parameters()).device
    test, generator = tasks.split("test"), torch.Generator().manual_seed(seed)
    chunks: list[dict[str, Tensor]] = []
    for first in range(0, num_tasks, CHUNK):
        batch = test.sample(min(CHUNK, num_tasks - first), generator).to(device)
        by_step = []
        for count in range(steps + 1):
            with torch.no_grad():
                by_step.append(learner.measure(learner.predict(batch, count), batch.query_y))
        chunks.append({key: torch.stack([measures[key] for measures in by_step]).cpu() for key in by_step[0]})
        if advance is not None:
            advance(first + batch.num_tasks)
    measures = {key: torch.cat([chunk[key] for chunk in chunks], 1) for key in chunks[0]}
    return Adaptation(name, measures, chance_accuracy(batch.query_y) if "accuracy" in measures else None)


def chance_accuracy(labels: Any) -> float | None:
    """Accuracy of the best constant guess for labels [T, Q]: 1/N in N-way tasks.

    Negative labels, which cross entropy may ignore, do not count. None for targets that are not integers [T, Q], and
    if no label counts.
    """
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        return None
    counted = [row[row >= 0] for row in labels.cpu()]
    shares = [float(row.unique(return_counts=True)[1].max()) / len(row) for row in counted if len(row)]
    return sum(shares) / len(shares) if shares else None


#: Points per curve, and number of tasks searched for one of every mode.
POINTS, LOOKED_THROUGH = 200, 64


@dataclass(frozen=True)
class Fits:
    """How R learners fit M regression tasks of one input and one output.

    Attributes:
        batch: the tasks
        titles: of the tasks
        names: of the learners
        steps: inner steps of each learner
        x: inputs of the curves, [G]
        before: predictions [M, G] of each learner before adaptation to the support set
        after: predictions [M, G] of each learner after adaptation
        errors: mean squared errors on the query sets after adaptation, [M] each
    """

    batch: Any
    titles: Sequence[str]
    names: Sequence[str]
    steps: Sequence[int]
    x: Tensor
    before: Sequence[Tensor]
    after: Sequence[Tensor]
    errors: Sequence[Tensor]


def fit_tasks(
    learners: Mapping[str, Any], tasks: TaskDistribution, *, steps: int | None = None, seed: int = TEST_SEED
) -> Fits | None:
    """Fit learners to the first test task of every mode, or to the first 3 tasks if there are no modes.

    Args:
        learners: by name, see :func:`measure_adaptation`; clustered ones choose by the support set
        tasks: the distribution, of which the test split is used
        steps: inner steps; default: each learner's ``eval_steps``
        seed: of the draws

    Returns:
        the fits; None for tasks with more than one input or output
    """
    batch = tasks.split("test").sample(LOOKED_THROUGH, torch.Generator().manual_seed(seed))
    if not _is_curve(batch):
        return None
    if batch.modes is None:
        rows, titles = [0, 1, 2], ["task"] * 3
    else:
        modes = batch.modes.tolist()
        rows = [modes.index(mode) for mode in sorted(set(modes))]
        titles = [mode_name(tasks, mode) for mode in sorted(set(modes))]
    batch = batch.select(torch.tensor(rows))
    inputs = torch.cat([batch.support_x, batch.query_x], 1)
    x = torch.linspace(float(inputs.min()), float(inputs.max()), POINTS)
    grid = x.view(1, -1, 1).expand(len(rows), -1, -1)
    wide = replace(batch, query_x=torch.cat([batch.query_x, grid.to(batch.query_x)], 1))
    counts, before, after, errors = [], [], [], []
    queries = batch.query_x.shape[1]
    for learner in learners.values():
        count = learner.eval_steps if steps is None else steps
        device = next(learner.parameters()).device
        with torch.no_grad():
            start, end = (learner.predict(wide.to(device), k).squeeze(-1).cpu() for k in (0, count))
        counts.append(count)
        before.append(start[:, queries:])
        after.append(end[:, queries:])
        errors.append((end[:, :queries] - batch.query_y.squeeze(-1)).square().mean(1))
    return Fits(batch, titles, tuple(learners), counts, x, before, after, errors)


def _is_curve(batch: Any) -> bool:
    if not isinstance(batch, Episodes):
        return False
    sides = [batch.support_x, batch.support_y, batch.query_x, batch.query_y]
    return all(isinstance(side, Tensor) and side.dim() == 3 and side.shape[2] == 1 for side in sides)


def mode_name(tasks: Any, mode: int) -> str:
    """Name of a task mode, from the tasks' ``mode_names`` if they have them."""
    names: Sequence[str] = getattr(tasks, "mode_names", ())
    return names[mode] if mode < len(names) else f"mode {mode}"
