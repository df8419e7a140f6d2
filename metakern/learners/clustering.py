"""Task clustering: embeddings of tasks, clusters of embeddings, and batches sampled by cluster.

The pipeline of arXiv 2110.14459 trains tasks in clusters; its criterion is not public, so this one is our own. Axis
legend: T tasks, C clusters, D dimensions of an embedding, P meta-parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from metakern.core.requirements import required
from metakern.tasks import TaskDistribution
from metakern.tasks.distribution import ShortRepr, check_num_tasks, check_split

__all__ = [
    "BATCHES",
    "EMBEDDINGS",
    "LOSSES",
    "MAX_CHUNKS",
    "METHODS",
    "Assigner",
    "ClusterSampler",
    "Clusters",
    "Describe",
    "Embedding",
    "choose_number",
    "normalised",
    "projected",
    "responsibilities",
]

#: Embeddings by one learner, and the learner's method for each: the displacement of the parameters by the inner loop,
#: and the support gradient at the initialisation.
EMBEDDINGS = {"displacement": "displacements", "gradient": "support_gradients"}

#: Embedding by several learners: the support losses after adaptation under each.
LOSSES = "losses"

#: Clustering algorithms, from scikit-learn.
METHODS = ("kmeans", "minibatch_kmeans", "gmm")

#: How batches are drawn: from one cluster each, the same number from every cluster, or without regard to clusters.
BATCHES = ("one", "balanced", "uniform")

#: A user's own embedding function: a batch to [T, D], from support sets alone.
Describe = Callable[[Any], Tensor]

#: Maximum draws when filling a batch, each twice as large as the last; a cluster that is still short of tasks is topped
#: up from the others.
MAX_CHUNKS = 4

_EPSILON = 1e-12


def normalised(vectors: Tensor) -> Tensor:
    """Rows [T, D] scaled to unit length; zero rows stay zero."""
    return nn.functional.normalize(vectors, dim=1, eps=_EPSILON)


def projected(vectors: Tensor, dim: int, seed: int = 0) -> Tensor:
    """Random projection of rows [T, P] by a Gaussian matrix [P, dim] from ``seed``; keeps distances up to 1/√dim.

    Johnson and Lindenstrauss 1984. Rows of at most ``dim`` numbers stay as they are.
    """
    size = vectors.shape[1]
    if size <= dim:
        return vectors
    matrix = torch.randn(size, dim, generator=torch.Generator().manual_seed(seed)) / math.sqrt(dim)
    return vectors @ matrix.to(vectors)


class Embedding:
    """Embeds tasks as points: tasks that are learned alike lie close together, whatever the scale of their losses.

    Args:
        kind: one of :data:`EMBEDDINGS`, "losses", or a function of a batch that returns embeddings [T, D] from support
            sets alone; they are used unchanged
        dim: largest D of displacements and gradients; longer ones are projected
        seed: seed of the projection

    Raises:
        ValueError: for an unknown kind, and ``dim`` below 1.
    """

    def __init__(self, kind: str | Describe = "gradient", dim: int = 32, seed: int = 0) -> None:
        if not callable(kind) and kind not in (*EMBEDDINGS, LOSSES):
            raise ValueError(f"embedding must be one of {', '.join(EMBEDDINGS)}, {LOSSES}, or a function, got {kind!r}")
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.kind, self.dim, self.seed = kind, dim, seed

    @torch.no_grad()
    def __call__(self, shared: Any, learners: Sequence[Any], batch: Any) -> Tensor:
        """Embeddings [T, D] of a batch's tasks.

        Args:
            shared: learner that gives displacements and gradients, at its initialisation
            learners: learners that give support losses, one per cluster
            batch: T tasks

        Raises:
            ValueError: if a user's function does not return [T, D].
        """
        if callable(self.kind):
            points = self.kind(batch)
            if not isinstance(points, Tensor) or points.dim() != 2 or points.shape[0] != batch.num_tasks:
                got = list(points.shape) if isinstance(points, Tensor) else type(points).__name__
                raise ValueError(f"embedding must give a tensor [{batch.num_tasks}, D], got {got}")
            return points.detach().float()
        if self.kind == LOSSES:
            losses = torch.stack([learner.support_losses(batch) for learner in learners], 1).clamp(min=_EPSILON).log()
            return losses - losses.mean(1, keepdim=True)
        vectors = getattr(shared, EMBEDDINGS[self.kind])(batch)
        return projected(normalised(vectors), self.dim, self.seed)


class Clusters(nn.Module):
    """A mixture of Gaussians with diagonal covariances, fitted by scikit-learn and kept in plain tensors.

    KMeans gives equal shares and one variance for all clusters.

    Args:
        num_clusters: C; None: the number from 2 to ``max_clusters`` with the best silhouette (Rousseeuw 1987), chosen
            at the first fit
        method: one of :data:`METHODS`
        max_clusters: largest C to choose
        dim: largest D; tensors are allocated at this width, so their shapes never change
        seed: seed of the starting points

    Attributes:
        means: [C, dim], zeros beyond D and before the first fit; ``max_clusters`` rows where C is chosen
        variances: [C, dim], ones beyond D and before the first fit
        shares: [C], each cluster's share of the tasks
        number: C, 0 before the first fit

    Raises:
        ValueError: for unknown methods and numbers below 1.
    """

    means: Tensor
    variances: Tensor
    shares: Tensor
    number: Tensor

    def __init__(
        self,
        num_clusters: int | None = None,
        *,
        method: str = "kmeans",
        max_clusters: int = 8,
        dim: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if num_clusters is not None and num_clusters < 1:
            raise ValueError(f"num_clusters must be at least 1, or None to choose it, got {num_clusters}")
        if num_clusters is None and max_clusters < 2:
            raise ValueError(f"max_clusters must be at least 2 where the number is chosen, got {max_clusters}")
        self.num_clusters, self.method, self.max_clusters, self.seed = num_clusters, method, max_clusters, seed
        room = num_clusters or max_clusters
        self.register_buffer("means", torch.zeros(room, dim))
        self.register_buffer("variances", torch.ones(room, dim))
        self.register_buffer("shares", torch.zeros(room))
        self.register_buffer("number", torch.zeros((), dtype=torch.int64))

    @property
    def least_points(self) -> int:
        """Minimum number of points of a fit."""
        return self.num_clusters or int(self.number) or 3

    @torch.no_grad()
    def fit(self, points: Tensor) -> Tensor:
        """Fit the clusters to ``points`` [T, D]; returns their labels [T].

        A cluster that a later fit finds again keeps its number: new clusters are matched to old ones by the number of
        points that they share.

        Raises:
            ValueError: for fewer points than clusters, points that are not finite, and D above ``dim``.
        """
        before = int(self.number)
        least = self.least_points
        if points.dim() != 2 or points.shape[0] < least or not bool(points.isfinite().all()):
            raise ValueError(f"points must be [T, D], finite, T at least {least}, got {list(points.shape)}")
        data, width = self._padded(points).double().cpu(), points.shape[1]
        number = self.num_clusters or before
        number = number or choose_number(data, self.max_clusters, self.method, self.seed, width)
        fitted = _fit(data, number, self.method, self.seed, width)
        if before:
            order = _matching(self.assign(points).cpu(), _log_densities(data, *fitted).argmax(1), number)
            fitted = (fitted[0][order], fitted[1][order], fitted[2][order])
        for buffer, tensor in zip((self.means, self.variances, self.shares), fitted, strict=True):
            buffer[:number] = tensor.to(buffer)
        self.number.fill_(number)
        return self.assign(points)

    def probabilities(self, points: Tensor) -> Tensor:
        """Posterior probability of each cluster given each point, [C, T]; columns sum to one."""
        number = int(self.number)
        if not number:
            raise RuntimeError("clusters must be fitted before points can be assigned; call fit")
        fitted = self.means[:number], self.variances[:number], self.shares[:number]
        return _log_densities(self._padded(points).to(self.means), *fitted).softmax(1).T

    def assign(self, points: Tensor) -> Tensor:
        """Labels [T], 64-bit integers: the likeliest cluster of each point."""
        return self.probabilities(points).argmax(0)

    def _padded(self, points: Tensor) -> Tensor:
        room = self.means.shape[1]
        if points.shape[1] > room:
            raise ValueError(f"points must have at most dim = {room} numbers each, got {list(points.shape)}")
        return nn.functional.pad(points.detach(), (0, room - points.shape[1]))


def choose_number(
    points: Tensor, max_clusters: int, method: str = "kmeans", seed: int = 0, width: int | None = None
) -> int:
    """The number of clusters, 2 to ``max_clusters``, whose labels have the largest mean silhouette on ``points``.

    Rousseeuw 1987, as scikit-learn computes it. Numbers that leave fewer than two clusters occupied are skipped; if all
    are, as when all points coincide, the result is 1. ``points`` are [T, D]; columns from ``width`` on are padding.
    """
    with required():
        from sklearn.metrics import silhouette_score

    scores: dict[int, float] = {}
    for number in range(2, min(max_clusters, points.shape[0] - 1) + 1):
        labels = _log_densities(points, *_fit(points, number, method, seed, width or points.shape[1])).argmax(1)
        if 2 <= len(labels.unique()) < points.shape[0]:
            scores[number] = float(silhouette_score(points.numpy(), labels.numpy()))
    return max(scores, key=scores.__getitem__, default=1)


def _fit(points: Tensor, number: int, method: str, seed: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fitted means and variances [C, D] and shares [C]; columns from ``width`` on are padding, of variance 1."""
    import warnings

    with required():
        from sklearn.cluster import KMeans, MiniBatchKMeans
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

    data = points.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # coinciding points leave clusters empty: those are handled
        if method == "gmm":
            floor = max(1e-6, 1e-3 * float(points[:, :width].var(0, unbiased=False).mean()))
            model = GaussianMixture(number, covariance_type="diag", reg_covar=floor, n_init=3, random_state=seed)
            model.fit(data)
            means, variances, shares = (torch.from_numpy(x) for x in (model.means_, model.covariances_, model.weights_))
            variances[:, width:] = 1
            return means, variances, shares
        kind = KMeans if method == "kmeans" else MiniBatchKMeans
        model = kind(number, n_init=5, random_state=seed).fit(data)
    means = torch.from_numpy(model.cluster_centers_)
    variances = torch.full_like(means, max(float(model.inertia_) / (len(points) * width), _EPSILON))
    variances[:, width:] = 1
    return means, variances, torch.full((number,), 1 / number, dtype=means.dtype)


def _log_densities(points: Tensor, means: Tensor, variances: Tensor, shares: Tensor) -> Tensor:
    """Log densities of points under each cluster, weighted by its share, [T, C], up to a constant."""
    distances = (points.unsqueeze(1) - means).square() / variances + variances.log()
    return shares.clamp(min=_EPSILON).log() - distances.sum(2) / 2


def _matching(old: Tensor, new: Tensor, number: int) -> Tensor:
    """The new cluster for each old number, matched so that as many points as possible keep their number."""
    with required():
        from scipy.optimize import linear_sum_assignment

    overlap = torch.zeros(number, number).index_put_((old, new), torch.ones(len(old)), accumulate=True)
    return torch.from_numpy(linear_sum_assignment(-overlap.numpy())[1])


def responsibilities(losses: Tensor, temperature: float = 0.0) -> Tensor:
    """Each cluster's share of each task from losses [C, T]: softmax of −loss/temperature; columns sum to one.

    At temperature 0 the cluster with the smallest loss takes the task. A cluster with a loss that is not finite gets no
    share, unless all losses of a task are such: the clusters then share it evenly.

    Raises:
        ValueError: for a negative temperature.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    scores = (-losses.double()).masked_fill(~losses.isfinite(), -torch.inf)
    scores = scores.masked_fill(~losses.isfinite().any(0), 0.0)
    if temperature == 0 and bool(losses.isfinite().any(0).all()):
        return nn.functional.one_hot(scores.argmax(0), len(losses)).T.to(losses)
    return (scores / max(temperature, _EPSILON)).softmax(0).to(losses)


class Assigner(Protocol):
    """The interface that a sampler needs of a learner: the cluster of every task."""

    num_active: int

    def assign(self, batch: Any) -> Tensor:
        """Labels [T] below ``num_active``."""
        ...


class ClusterSampler(ShortRepr):
    """Samples the tasks of another distribution in batches by cluster.

    Every batch is picked from tasks drawn for it alone, so ``generator`` determines it and a checkpoint need not store
    leftover tasks. Each draw has ``num_tasks`` times the number of clusters; unused tasks are dropped. If some cluster
    has too few, a new draw is twice as large. ``drawn`` counts all tasks drawn.

    Args:
        tasks: the distribution; its batches' ``select`` takes indices
        learner: assigns the clusters, a :class:`metakern.learners.ClusteredLearner`
        batches: one of :data:`BATCHES`. "one" draws the cluster by its share of the tasks.

    Raises:
        ValueError: for unknown ``batches``.
    """

    def __init__(self, tasks: TaskDistribution, learner: Assigner, batches: str = "balanced") -> None:
        if batches not in BATCHES:
            raise ValueError(f"batches must be one of {', '.join(BATCHES)}, got {batches!r}")
        self.tasks, self.learner, self.batches, self.drawn = tasks, learner, batches, 0

    def split(self, name: str) -> TaskDistribution:
        """The distribution's own split for "valid" and "test"; for "train", that split in batches by cluster."""
        check_split(name)
        split = self.tasks.split(name)
        return ClusterSampler(split, self.learner, self.batches) if name == "train" else split

    def sample(self, num_tasks: int, generator: torch.Generator) -> Any:
        """A batch of ``num_tasks`` tasks; drawn without regard to clusters while there are none."""
        check_num_tasks(num_tasks)
        number = self.learner.num_active
        if self.batches == "uniform" or number < 2:
            self.drawn += num_tasks
            return self.tasks.sample(num_tasks, generator)
        cluster = None
        for chunk in (num_tasks * number * 2**doubling for doubling in range(MAX_CHUNKS)):
            batch = self.tasks.sample(chunk, generator)
            labels = self.learner.assign(batch).cpu()
            self.drawn += chunk
            if cluster is None:
                cluster = labels[int(torch.randint(chunk, (), generator=generator))]
                wanted = self._wanted(cluster, num_tasks, number, generator)
            if bool((labels.bincount(minlength=number) >= wanted).all()):
                break
        return batch.select(_picked(labels, wanted, num_tasks))

    def _wanted(self, cluster: Tensor, num_tasks: int, number: int, generator: torch.Generator) -> Tensor:
        """Number of tasks to pick from each cluster, [C]."""
        if self.batches == "one":
            return num_tasks * nn.functional.one_hot(cluster, number)
        wanted = torch.full((number,), num_tasks // number)
        wanted[torch.randperm(number, generator=generator)[: num_tasks % number]] += 1
        return wanted


def _picked(labels: Tensor, wanted: Tensor, num_tasks: int) -> Tensor:
    """Indices of the first tasks of each cluster, in the order they came, topped up where a cluster has too few."""
    ranks = nn.functional.one_hot(labels, len(wanted)).cumsum(0).gather(1, labels.unsqueeze(1)).squeeze(1)
    chosen = ranks <= wanted[labels]
    rest = (~chosen).nonzero().flatten()[: num_tasks - int(chosen.sum())]
    return torch.cat([chosen.nonzero().flatten(), rest]).sort().values


def __dir__() -> list[str]:
    return list(__all__)
