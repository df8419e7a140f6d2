"""How well a meta-learner adapts to unseen tasks: loss and accuracy after every number of inner steps.

Axis legend: T tasks, Q query samples of a task, K inner steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metakern.tasks import TaskDistribution

#: The seed of test tasks: a constant, so that every learner is reported on the same; training and validation have other
#: splits.
TEST_SEED = 2**31

#: Tasks that adapt at once: memory for larger numbers would grow with them.
CHUNK = 100


@dataclass(frozen=True)
class Adaptation:
    """Measures of T unseen tasks after 0 to K inner steps.

    Attributes:
        name: of the learner
        measures: "loss", and "accuracy" where there are classes, [K + 1, T] each
    """

    name: str
    measures: dict[str, Tensor]

    @property
    def num_tasks(self) -> int:
        """T."""
        return self.measures["loss"].shape[1]

    def summary(self) -> dict[str, list[dict[str, float]]]:
        """For every measure mean and half of the 95 % interval by step, for JSON."""
        result = {}
        for name, values in self.measures.items():
            mean, half = mean_interval(values)
            result[name] = [
                {"steps": step, "mean": m, "interval": h}
                for step, (m, h) in enumerate(zip(mean.tolist(), half.tolist(), strict=True))
            ]
        return result


def mean_interval(sample: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of [..., T] over its last axis, and half of Student's 95 % interval around it; NaN for T = 1."""
    from scipy import stats  # scikit-learn brings it; half a second

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
) -> Adaptation:
    """Adapt to tasks of the test split and measure their query sets after 0 to K inner steps.

    Args:
        learner: a :class:`metakern.learners.MAMLLearner`, or another with its ``predict`` and ``measure``
        tasks: the distribution; its test split is drawn from
        num_tasks: T
        steps: K; default: the learner's ``eval_steps``
        seed: of the draws; the same for all learners that are compared
        name: what the result is called

    Raises:
        ValueError: for fewer than 2 tasks, which have no interval.
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
    return Adaptation(name, {key: torch.cat([chunk[key] for chunk in chunks], 1) for key in chunks[0]})
