"""Clustered meta-learning: one learner per cluster of tasks, each copied from a shared learner.

Axis legend: T tasks, C clusters, Q query samples.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from metakern.core.trees import class_scores, flatten, map_output
from metakern.learners.clustering import EMBEDDINGS, Clusters, ClusterSampler, Describe, Embedding, responsibilities
from metakern.tasks import TaskDistribution

#: How tasks are assigned to clusters: by support loss after adaptation under each cluster's learner, by the clusters of
#: their embeddings, or by mode, which for problems to optimise is their kind.
ASSIGNMENTS = ("losses", "embedding", "modes")

#: Responsibility threshold: a learner skips tasks of which it has at most this share.
LEAST_RESPONSIBILITY = 0.01

#: Final temperature of annealing, as a fraction of the initial one.
COLD = 0.01

#: Fraction of the donor's tasks, those with the largest losses, that a restarted learner is moved towards.
WORST = 0.25

#: Stand-in for losses that are not finite: worse than any other.
DIVERGED = 1e30


class ClusteredLearner(nn.Module):
    """C copies of a meta-learner, each for the tasks that are assigned to it.

    :meth:`on_iteration` leads it through three stages. For ``warmup`` iterations the shared learner learns from all
    tasks. It is then frozen and copied for every cluster, and for ``begin`` iterations tasks are assigned by the
    clusters of their embeddings under the shared learner. From then on each task goes to the learner that adapts to it
    best. In every stage a task is assigned from its support set alone; ``assign="modes"``, the oracle to compare with,
    reads the modes of the batch instead. Batches with a ``to`` method are assigned on the learner's own device.

    Every ``refresh`` iterations ``pool`` tasks are drawn and assigned. While tasks are assigned by embedding, the
    pool's finite embeddings are clustered anew. Afterwards a learner with less than ``least_share`` of the pool
    restarts: it copies the learner with the largest sum of losses, and moves to where that one's inner steps lead on
    the tasks with its largest losses. This fills empty clusters and splits a cluster that took nearly all tasks.
    Negative losses are measured from the smallest one; a loss that is not finite counts as the largest.

    Optimizer state and weight averages of a restarted learner are stale.
    :class:`metakern.training.Trainer` drops them, and takes no step that is not finite. A training loop of your own
    must drop them for the parameters that :meth:`on_iteration` returns.

    Args:
        learner: the shared learner, a :class:`metakern.learners.MetaLearner`. Assignment by losses also needs
            ``support_losses(batch)`` and ``approach(batch)``, embeddings ``displacements(batch)`` or
            ``support_gradients(batch)``, averages ``predict(batch, steps)`` and ``measure(prediction, target)``,
            all as in :class:`metakern.learners.MAMLLearner`. Batches need ``select(indices)``.
        num_clusters: C; None: the number with the best silhouette when clusters begin, at most ``max_clusters``
        assign: one of :data:`ASSIGNMENTS`
        warmup: iterations that train the shared learner
        begin: iterations with assignment by embedding, at least 1, before assignment by losses
        refresh: iterations from one pool to the next
        pool: tasks of a pool, at least ``num_clusters``, and more than ``max_clusters`` where the number is chosen
        embedding: one of :data:`metakern.learners.clustering.EMBEDDINGS`, or a function of a batch; see
            :class:`metakern.learners.clustering.Embedding`. Not "losses": they cannot tell tasks apart while all
            learners are copies of one; pass ``assign="losses"`` for those
        method: "kmeans", "minibatch_kmeans" or "gmm"
        max_clusters: largest number of clusters where the number is chosen
        temperature: for training with assignment by losses: 0 gives each task to one learner; above 0, learners share
            it by the softmax of −loss/temperature
        anneal: iterations, at least 1, over which the temperature falls geometrically to a hundredth; None: it stays
        eval_temperature: for evaluation: 0 takes the prediction of the learner that the task is assigned to; above 0,
            predictions are averaged by the softmax of −support loss/temperature, class predictions as probabilities
        least_share: share of a pool, at most 1, below which a cluster counts as empty
        per_cluster: False: all clusters share one learner, and only shape the batches of a
            :class:`metakern.learners.clustering.ClusterSampler`
        dim: largest dimension of embeddings: longer ones are projected; a function must not return longer ones
        seed: seed of projection and clustering

    Attributes:
        shared: the shared learner
        learners: one a cluster
        num_active: clusters in use, 0 before they begin
        occupancy: [C], the clusters' shares of the last pool
        restarted: indices of the learners that restarted in the last :meth:`on_iteration`

    Raises:
        ValueError: for arguments out of range, and a learner without the methods that the options need.

    Example:
        >>> learner = ClusteredLearner(MAMLLearner(mlp(1, 40, 1), steps=5), 3, warmup=100, begin=100)
        >>> config = TrainerConfig(iterations=1, eval_tasks=32)
        >>> history = Trainer(learner, mixture(3), torch.optim.Adam(learner.parameters(), 1e-3), config).fit()
    """

    iteration: Tensor
    active: Tensor
    occupancy: Tensor

    def __init__(
        self,
        learner: nn.Module,
        num_clusters: int | None,
        *,
        assign: str = "losses",
        warmup: int = 0,
        begin: int = 100,
        refresh: int = 100,
        pool: int = 512,
        embedding: str | Describe = "gradient",
        method: str = "kmeans",
        max_clusters: int = 8,
        temperature: float = 0.0,
        anneal: int | None = None,
        eval_temperature: float = 0.0,
        least_share: float = 0.02,
        per_cluster: bool = True,
        dim: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.embedding = Embedding(embedding, dim, seed)
        self.clusters = Clusters(num_clusters, method=method, max_clusters=max_clusters, dim=dim, seed=seed)
        _check(learner, assign, per_cluster, embedding, eval_temperature)
        _check_least(0, warmup=warmup, temperature=temperature, eval_temperature=eval_temperature)
        _check_least(0, least_share=least_share)
        _check_least(1, begin=begin, refresh=refresh, anneal=1 if anneal is None else anneal)
        _check_least(1 if assign == "modes" else num_clusters or max_clusters + 1, pool=pool)
        if least_share > 1:
            raise ValueError(f"least_share must be at most 1, got {least_share}")
        self.assign_by, self.warmup, self.begin, self.refresh, self.pool = assign, warmup, begin, refresh, pool
        self.temperature, self.anneal, self.eval_temperature = temperature, anneal, eval_temperature
        self.least_share, self.per_cluster = least_share, per_cluster
        self.restarted: tuple[int, ...] = ()
        number = num_clusters or max_clusters
        self.shared = learner
        self.learners = nn.ModuleList(copy.deepcopy(learner) for _ in range(number if per_cluster else 0))
        self.register_buffer("iteration", torch.zeros((), dtype=torch.int64))
        self.register_buffer("active", torch.zeros((), dtype=torch.int64))
        self.register_buffer("occupancy", torch.zeros(number))

    def __repr__(self) -> str:
        clusters = f"{self.num_active} of {len(self.occupancy)} clusters in use"
        return f"ClusteredLearner({self.shared!r}, {clusters}, assign={self.assign_by!r})"

    # -------------------------------------------------------------------------------------------------- for the trainer

    def meta_losses(self, batch: Any) -> Iterator[Tensor]:
        """Losses [T] of every task under its learner, or averaged over learners by their shares of the task.

        Learners with several outer steps per batch take them side by side; one that has ended adds nothing to the
        later losses.
        """
        if not self.num_active or not self.per_cluster:
            yield from self.shared.meta_losses(batch)  # type: ignore[operator]
            return
        shares = self.responsibilities(batch, self._temperature())
        served, runs = [], []
        for learner, share in zip(self._used(), shares, strict=True):
            tasks = (share > LEAST_RESPONSIBILITY).nonzero().flatten()
            if len(tasks):
                served.append((tasks, share[tasks]))
                runs.append(learner.meta_losses(batch.select(tasks)))
        for losses in zip_longest(*runs):
            parts = [(*of, loss) for of, loss in zip(served, losses, strict=True) if loss is not None]
            total = parts[0][2].new_zeros(batch.num_tasks)
            for tasks, share, loss in parts:
                total = total.index_add(0, tasks, loss * share.to(loss))
            yield total

    @torch.no_grad()
    def evaluate(self, batch: Any) -> dict[str, Tensor]:
        """Query measures [T] of every task under its assigned learner, or of the averaged predictions."""
        if not self.num_active or not self.per_cluster:
            return self.shared.evaluate(batch)  # type: ignore[operator, no-any-return]
        if self._averages() or all(hasattr(self.shared, method) for method in ("predict", "measure")):
            return self.measure(self.predict(batch), batch.query_y)
        labels = self.assign(batch)
        measures: dict[str, Tensor] = {}
        for cluster, learner in enumerate(self._used()):
            tasks = (labels == cluster).nonzero().flatten()
            if len(tasks):
                for name, values in learner.evaluate(batch.select(tasks)).items():
                    measures.setdefault(name, values.new_zeros(batch.num_tasks))[tasks] = values
        return measures

    @torch.no_grad()
    def predict(self, batch: Any, steps: int | None = None) -> Any:
        """Predictions for the query sets after ``steps`` inner steps, ``eval_steps`` by default.

        A task's prediction comes from its assigned learner or, with ``eval_temperature`` above 0, is an average over
        learners; class predictions average to the logarithms of mean probabilities. The learners need ``predict``, as
        in :class:`metakern.learners.MAMLLearner`. Predictions are the model's outputs, with tensors [T, Q, ...].

        Raises:
            TypeError: if integers are averaged, or class predictions that are neither a tensor nor have ``logits``.
        """
        if not self.num_active or not self.per_cluster:
            return self.shared.predict(batch, steps)  # type: ignore[operator]
        if self._averages():
            return self._averaged_prediction(batch, steps)
        labels = self.assign(batch)
        rows = [(labels == cluster).nonzero().flatten() for cluster in range(self.num_active)]
        parts = [
            learner.predict(batch.select(tasks), steps)
            for learner, tasks in zip(self._used(), rows, strict=True)
            if len(tasks)
        ]
        order = torch.cat(rows).argsort()
        return map_output(lambda *tensors: torch.cat(tensors)[order], *parts)

    def measure(self, prediction: Any, target: Any) -> dict[str, Tensor]:
        """Measures [T] of predictions for targets [T, Q, ...], as the shared learner defines them."""
        return self.shared.measure(prediction, target)  # type: ignore[operator, no-any-return]

    @property
    def eval_steps(self) -> int:
        """Inner steps in evaluation, those of the shared learner."""
        return self.shared.eval_steps  # type: ignore[return-value]

    @torch.no_grad()
    def on_iteration(self, iteration: int, tasks: TaskDistribution, generator: torch.Generator) -> list[nn.Parameter]:
        """Advance the stages; call it before every iteration's batch. Draws a pool when one is due.

        Clusters begin with the first pool that has enough finite embeddings.

        Args:
            iteration: number of the iteration, from 0
            tasks: distribution to draw pools from; a :class:`metakern.learners.clustering.ClusterSampler` is unwrapped
            generator: random generator of the pool

        Returns:
            the parameters of learners that started or restarted
        """
        self.iteration.fill_(iteration)
        self.restarted = ()
        if iteration < self.warmup or (self.num_active and (iteration - self.warmup) % self.refresh):
            return []
        source = tasks.tasks if isinstance(tasks, ClusterSampler) else tasks
        pool = self._here(source.sample(self.pool, generator))
        starts = not self.num_active
        if starts:
            for learner in self.learners:
                learner.load_state_dict(self.shared.state_dict())
        if self.assign_by == "modes":
            self.active.fill_(len(self.occupancy))
        elif starts or self._begins():
            self._cluster(pool)
            if not self.num_active:
                return []
        labels = self.assign(pool)
        if self.assign_by == "losses" and not self._begins():
            labels = self._fill(pool, labels)
        self.occupancy.copy_(labels.bincount(minlength=len(self.occupancy)) / len(labels))
        begun = [learner for index, learner in enumerate(self.learners) if starts or index in self.restarted]
        return [p for learner in begun for p in learner.parameters()]

    # ------------------------------------------------------------------------------------------------------- assignment

    @property
    def num_active(self) -> int:
        """Clusters in use, 0 before they begin."""
        return int(self.active)

    def assign(self, batch: Any) -> Tensor:
        """Cluster labels [T] of a batch's tasks, 64-bit integers, on the learner's device.

        Only support sets are used, except with ``assign="modes"``. The batch may be on another device.
        """
        return self.responsibilities(self._here(batch), 0.0).argmax(0)

    @torch.no_grad()
    def responsibilities(self, batch: Any, temperature: float) -> Tensor:
        """The learners' shares of every task, [C, T]; columns sum to one.

        Raises:
            ValueError: with ``assign="modes"``, for a batch without modes or with modes beyond the clusters.
            RuntimeError: before there are clusters.
        """
        if not self.num_active:
            raise RuntimeError("there are no clusters yet; they begin at iteration warmup, in on_iteration")
        if self.assign_by == "modes":
            modes = getattr(batch, "modes", None)
            if modes is None or not 0 <= int(modes.min()) <= int(modes.max()) < self.num_active:
                raise ValueError(f"batch must have modes [T] from 0 to {self.num_active - 1}, got {modes}")
            return nn.functional.one_hot(modes, self.num_active).T.float()
        if self._begins():
            return responsibilities(-self.clusters.probabilities(self._embed(batch)))
        return responsibilities(self.support_losses(batch), temperature)

    def support_losses(self, batch: Any) -> Tensor:
        """Every learner's loss on every task's support set after adapting to it, [C, T]."""
        return torch.stack([learner.support_losses(batch) for learner in self._used()])

    def _used(self) -> list[Any]:
        return list(self.learners)[: self.num_active]

    def _here(self, batch: Any) -> Any:
        """The batch, moved to the learner's device: the trainer draws on the CPU."""
        return batch.to(self.active.device) if hasattr(batch, "to") else batch

    def _cluster(self, pool: Any) -> None:
        """Fit the clusters to the finite embeddings of a pool; with too few of them, keep the clusters as they are."""
        points = self._embed(pool)
        points = points[points.isfinite().all(1)]
        if len(points) >= self.clusters.least_points:
            self.clusters.fit(points)
            self.active.copy_(self.clusters.number)

    def _embed(self, batch: Any) -> Tensor:
        return self.embedding(self.shared, self._used(), batch)

    def _begins(self) -> bool:
        """Whether tasks are assigned by embedding."""
        begins = int(self.clusters.number) > 0 and int(self.iteration) < self.warmup + self.begin
        return self.assign_by == "embedding" or begins

    def _temperature(self) -> float:
        if self.anneal is None:
            return self.temperature
        return self.temperature * math.pow(COLD, min(1.0, int(self.iteration) / self.anneal))

    def _averages(self) -> bool:
        return self.eval_temperature > 0 and self.assign_by == "losses" and not self._begins()

    def _averaged_prediction(self, batch: Any, steps: int | None) -> Any:
        shares = responsibilities(self.support_losses(batch), self.eval_temperature)
        predictions = [learner.predict(batch, steps) for learner in self._used()]
        scores = None
        if isinstance(batch.query_y, Tensor) and not batch.query_y.is_floating_point():
            scores = class_scores(predictions[0])
            if scores is None:
                raise TypeError(
                    "averages of class predictions need a tensor of scores, or an output with logits, got a "
                    f"{type(predictions[0]).__name__}: return such from the model, or leave eval_temperature at 0"
                )
        positions = [tensor is scores for tensor in flatten(predictions[0])[0]]
        averaged = []
        for of_classes, *tensors in zip(positions, *(flatten(output)[0] for output in predictions), strict=True):
            averaged.append(_mean(tensors, shares, of_classes))
        return flatten(predictions[0])[1](averaged)

    # --------------------------------------------------------------------------------------------------- empty clusters

    def _fill(self, pool: Any, labels: Tensor) -> Tensor:
        """Restart every empty cluster from the largest-loss tasks of another; returns the new labels."""
        least = self.least_share * len(labels)
        for empty in (labels.bincount(minlength=self.num_active) < least).nonzero().flatten().tolist():
            counts = labels.bincount(minlength=self.num_active)  # again: an earlier restart may have changed it
            if counts[empty] >= least or bool((counts < least).all()):
                continue
            losses = self.support_losses(pool).gather(0, labels.unsqueeze(0)).squeeze(0).float()
            finite = losses.isfinite()
            losses = losses.where(finite, DIVERGED)
            sizes = losses - losses.min().clamp(max=0)  # negative losses count from the smallest
            sums = torch.zeros(self.num_active).index_add(0, labels.cpu(), sizes.cpu())
            donor = int(sums.masked_fill((counts < least).cpu(), -torch.inf).argmax())
            members = ((labels == donor) & finite).nonzero().flatten()  # inner steps on the others diverge
            worst = members[losses[members].argsort(descending=True)[: max(1, int(WORST * len(members)))]]
            self.learners[empty].load_state_dict(self.learners[donor].state_dict())
            if len(worst):
                self.learners[empty].approach(pool.select(worst.sort().values))  # mixtures take ascending indices
            self.restarted += (empty,)
            labels = self.assign(pool)
        return labels


def _mean(tensors: Sequence[Tensor], shares: Tensor, of_classes: bool) -> Tensor:
    """Mean of predictions [T, Q, ...] by shares [C, T]; for classes, in axis 2, log of the mean probabilities."""
    total: Any = 0
    for tensor, share in zip(tensors, shares, strict=True):
        if not tensor.is_floating_point() and not tensor.is_complex():
            raise TypeError(
                f"averages of predictions must be of numbers, got {tensor.dtype}; leave eval_temperature at 0"
            )
        part = tensor.softmax(2) if of_classes else tensor
        total = total + part * share.view(-1, *[1] * (part.dim() - 1)).to(part.dtype)
    averaged: Tensor = total.clamp(min=torch.finfo(total.dtype).tiny).log() if of_classes else total
    return averaged


def _check(learner: nn.Module, assign: str, per_cluster: bool, embedding: Any, eval_temperature: float) -> None:
    """Raise ValueError unless the learner has the methods that the options need."""
    if assign not in ASSIGNMENTS:
        raise ValueError(f"assign must be one of {', '.join(ASSIGNMENTS)}, got {assign!r}")
    if embedding == "losses":
        raise ValueError("embedding must tell tasks apart before the learners differ, which 'losses' cannot")
    needs: dict[str, str] = {}
    if assign == "losses":
        if not per_cluster:
            raise ValueError("assign must be 'embedding' or 'modes' where all clusters share one learner, got 'losses'")
        needs = dict.fromkeys(("support_losses(batch)", "approach(batch)"), "assign='losses'")
        if eval_temperature > 0:
            averages = ("predict(batch, steps)", "measure(prediction, target)")
            needs |= dict.fromkeys(averages, f"eval_temperature={eval_temperature:g}")
    if assign != "modes" and isinstance(embedding, str):
        needs[f"{EMBEDDINGS[embedding]}(batch)"] = f"embedding={embedding!r}"
    for method, use in needs.items():
        if not hasattr(learner, method.partition("(")[0]):
            raise ValueError(f"learner must have {method} for {use}, got {type(learner).__name__}")


def _check_least(least: int, **numbers: float) -> None:
    for name, value in numbers.items():
        if not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
