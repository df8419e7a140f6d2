"""One rule for tasks of several kinds, whose update has a learned size for each kind.

A rule per cluster learns from that cluster's tasks alone. Here all tasks train one rule, and clusters differ by one
number each, so they need few tasks and one launch serves all of them. Axis legend: T tasks, C clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metakern.core.checks import check_count
from metakern.core.task_params import flat_params, task_groups
from metakern.inner_loop.updates import RuleUpdate
from metakern.learners.rule import RuleLearner
from metakern.rules.registry import make
from metakern.tasks import OptimizeeBatch

#: Number of clusters of :func:`kinds_by_shape`.
SHAPE_KINDS = 4


@torch.no_grad()
def kinds_by_shape(batch: OptimizeeBatch) -> Tensor:
    """Clusters [T] of problems by the shapes of their params alone, 64-bit integers from 0 to 3.

    At most one matrix (linear models, functions of a vector): 0. Two matrices: 1. Three or more: 2. Any tensor of more
    than two axes, as a convolution has: 3. The batch's draws stay where they were.
    """
    labels = []
    for tensors in task_groups(batch.select(slice(None)).init_params()):
        axes = [p.dim() - 1 for p in tensors]
        kind = SHAPE_KINDS - 1 if max(axes) > 2 else max(0, min(axes.count(2), 3) - 1)
        labels += [kind] * len(tensors[0])
    return torch.tensor(labels)


def one_cluster(batch: OptimizeeBatch) -> Tensor:
    """Clusters [T] of problems that all belong together: zeros."""
    return torch.zeros(batch.num_tasks, dtype=torch.int64)


class ScaledRule(nn.Module):
    """A rule whose update of a task is multiplied by the factor of the task's cluster.

    Args:
        rule: the rule that all clusters share
        num_clusters: C
        rate: see :class:`ScaledRuleLearner`

    Attributes:
        labels: clusters [T] of the tasks that it steps next
    """

    def __init__(self, rule: Any, num_clusters: int, rate: float) -> None:
        super().__init__()
        self.rule, self.rate = rule, rate
        self.offsets = nn.Parameter(torch.zeros(num_clusters))
        self.labels: Tensor | None = None
        self._update = RuleUpdate(rule, redraws=True)

    @property
    def title(self) -> str:
        """The rule's title."""
        return f"{self.rule.title}, scaled"

    def factors(self) -> Tensor:
        """Every cluster's factor, [C]."""
        return (self.rate * self.offsets).exp()

    def initialisation(self) -> Mapping[str, Tensor] | None:
        """The rule's."""
        found: Mapping[str, Tensor] | None = (
            self.rule.initialisation() if hasattr(self.rule, "initialisation") else None
        )
        return found

    def init_state(self, params: Any) -> Any:
        """The rule's initial state of T tasks."""
        return self._update.init_state(params)

    def forward(self, params: Any, grads: Any, state: Any, *, loss: Tensor) -> tuple[Any, Any]:
        """One step of T tasks, grouped or not; see :meth:`metakern.rules.Rule.forward`."""
        new, new_state = self._update.step(None, params, grads, state, loss, 0)
        if self.labels is None or len(self.labels) != len(loss):
            got = "none" if self.labels is None else str(len(self.labels))
            raise ValueError(f"labels must be set to one cluster for each of {len(loss)} tasks, got {got}")
        factors = self.factors()[self.labels.to(self.offsets.device)]
        leaves, rebuild = flat_params(new)
        groups = task_groups(params)
        of_group = factors.split([len(tensors[0]) for tensors in groups])
        old = [(p, of) for tensors, of in zip(groups, of_group, strict=True) for p in tensors]
        # p + f (p' - p) is p' itself for f = 1 up to rounding; lerp keeps a factor of 0 exact.
        scaled = [
            torch.lerp(p, q, of.to(p).view(-1, *[1] * (p.dim() - 1))) for (p, of), q in zip(old, leaves, strict=True)
        ]
        return rebuild(scaled), new_state


class ScaledRuleLearner(RuleLearner):
    """A :class:`RuleLearner` whose rule learns the size of its updates for each cluster of tasks.

    The clusters' factors start at 1. To use the rule on a task of cluster c, give ``LearnedOptimizer`` the rule,
    :attr:`shared`, and ``lr=learner.factors()[c].item()``.

    Args:
        rule: the rule, or its name; see :class:`RuleLearner`
        num_clusters: C
        label: a function of a batch that returns the clusters [T], 64-bit integers from 0 to C - 1, of its problems;
            default: :func:`kinds_by_shape`, which has four. The labels must not depend on the rule
        rate: the logarithms of the factors learn at this multiple of the outer learning rate
        options: ``steps``, ``unroll``, ``objective``, ``second_order`` and ``loss_on`` of :class:`RuleLearner`; its
            estimator is "tbptt"

    Attributes:
        shared: the rule that all clusters share

    Raises:
        TypeError, ValueError: for arguments out of range, for a rule that moves its gradients (attention), and for
            another estimator.

    Example:
        >>> learner = ScaledRuleLearner("coordinatewise-lstm", steps=20, unroll=20)
        >>> problems = MixedOptimizees([DigitsMLP(), DigitsCNN()]).sample(8, torch.Generator())
        >>> for losses in learner.meta_losses(problems):
        ...     losses.mean().backward()
        >>> learner.factors().shape
        torch.Size([4])
    """

    def __init__(
        self,
        rule: nn.Module | str,
        num_clusters: int = SHAPE_KINDS,
        *,
        label: Callable[[Any], Tensor] = kinds_by_shape,
        rate: float = 10.0,
        **options: Any,
    ) -> None:
        check_count("num_clusters", num_clusters)
        if not rate > 0:
            raise ValueError(f"rate must be above 0, got {rate}")
        if options.get("estimator", "tbptt") != "tbptt":
            raise ValueError(f"estimator must be 'tbptt' where clusters have factors, got {options['estimator']!r}")
        rule = make(rule, learned=True) if isinstance(rule, str) else rule
        if getattr(rule, "moves_gradients", False):
            raise ValueError(
                "rule must take gradients at the params where clusters have factors, got one with attention"
            )
        super().__init__(ScaledRule(rule, num_clusters, rate), **options)
        self.num_clusters, self.label = num_clusters, label

    @property
    def shared(self) -> Any:
        """The rule that all clusters share."""
        return self.rule.rule

    def factors(self) -> Tensor:
        """The clusters' factors [C], detached."""
        found: Tensor = self.rule.factors().detach()
        return found

    def meta_losses(self, batch: OptimizeeBatch) -> Iterator[Tensor]:
        """See :meth:`RuleLearner.meta_losses`."""
        labels, losses = self._labels(batch), super().meta_losses(batch)
        while True:
            self.rule.labels = labels  # parts of a meta-batch take their unrolls in turns
            try:
                found = next(losses)
            except StopIteration:
                return
            yield found

    def evaluate(self, batch: OptimizeeBatch) -> dict[str, Tensor]:
        """See :meth:`RuleLearner.evaluate`."""
        self.rule.labels = self._labels(batch)
        return super().evaluate(batch)

    def _labels(self, batch: OptimizeeBatch) -> Tensor:
        labels = self.label(batch)
        if labels.shape != (batch.num_tasks,) or not 0 <= int(labels.min()) <= int(labels.max()) < self.num_clusters:
            raise ValueError(
                f"label must return clusters [{batch.num_tasks}] from 0 to {self.num_clusters - 1}, got {labels}"
            )
        return labels
