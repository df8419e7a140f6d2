"""Clustering of tasks: embeddings, clusters of embeddings, soft assignment, and batches by cluster."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from metakern.learners.clustering import (
    BATCHES,
    EMBEDDINGS,
    LOSSES,
    METHODS,
    Clusters,
    ClusterSampler,
    Embedding,
    choose_number,
    normalised,
    projected,
    responsibilities,
)
from metakern.tasks import Episodes
from tests.conftest import assert_same_bits
from tests.planted import TwoFamilies, agreement, generator, linear_learner

pytestmark = pytest.mark.usefixtures("one_thread")


def blobs(number: int, size: int = 40, spread: float = 0.1, dim: int = 4) -> tuple[Tensor, Tensor]:
    """Points around ``number`` corners of a cube, and which corner each is of."""
    corners = torch.tensor([[float(corner >> bit & 1) for bit in range(dim)] for corner in range(number)])
    labels = torch.arange(number).repeat_interleave(size)[torch.randperm(number * size, generator=generator(1))]
    return corners[labels] + spread * torch.randn(number * size, dim, generator=generator(2)), labels


def same_partition(a: Tensor, b: Tensor) -> bool:
    return bool(((a.unsqueeze(0) == a.unsqueeze(1)) == (b.unsqueeze(0) == b.unsqueeze(1))).all())


# ------------------------------------------------------------------------------------------------------- descriptions


@pytest.mark.parametrize("kind", [*EMBEDDINGS, LOSSES])
def test_an_embedding_looks_at_support_sets_alone(kind: str) -> None:
    batch = TwoFamilies().sample(6, generator())
    learners = [linear_learner(seed=seed) for seed in (0, 1, 2)]
    points = Embedding(kind)(learners[0], learners, batch)
    other = replace(batch, query_x=batch.query_x + 1, query_y=batch.query_y * torch.nan)
    assert points.shape == (6, {"displacement": 2, "gradient": 2, "losses": 3}[kind])
    assert not points.requires_grad
    assert_same_bits(kind, Embedding(kind)(learners[0], learners, other), points)


def test_embeddings_do_not_depend_on_the_size_of_the_losses() -> None:
    """A learner from zero: targets times 1,000 multiply its gradients by 1,000, and say the same of the tasks."""
    learner, batch = linear_learner(), TwoFamilies().sample(6, generator())
    for parameter in learner.parameters():
        parameter.data.zero_()
    large = replace(batch, support_y=1000 * batch.support_y)
    for kind in ("displacement", "gradient"):
        points = Embedding(kind)(learner, [], batch)
        torch.testing.assert_close(Embedding(kind)(learner, [], large), points)
        torch.testing.assert_close(points.norm(dim=1), torch.ones(6))
    scaled = [0.0, 0.1]
    learners = [linear_learner(lr=lr) for lr in scaled]
    for other in learners:
        for parameter in other.parameters():
            parameter.data.zero_()
    losses = Embedding("losses")
    torch.testing.assert_close(losses(None, learners, large), losses(None, learners, batch), rtol=1e-4, atol=1e-4)


def test_displacement_and_gradient_are_those_of_the_inner_loop() -> None:
    learner, batch = linear_learner(steps=1, lr=0.1), TwoFamilies().sample(4, generator())
    gradients = []
    for x, y in zip(*batch.support, strict=True):
        loss = learner.loss(learner.model(x), y)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*learner.model.parameters()])]))
    expected = torch.stack(gradients)
    torch.testing.assert_close(learner.support_gradients(batch), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(learner.displacements(batch), -0.1 * expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(Embedding("gradient")(learner, [], batch), normalised(expected), rtol=1e-4, atol=1e-5)


def test_a_users_own_embedding_is_used_as_it_is() -> None:
    batch = TwoFamilies().sample(5, generator())
    points = Embedding(lambda tasks: tasks.support_y.flatten(1))(None, [], batch)
    assert_same_bits("points", points, batch.support_y.flatten(1))
    for wrong in (torch.zeros(4, 2), torch.zeros(5), [1.0]):
        with pytest.raises(ValueError, match=r"embedding must give a tensor \[5, D\], got"):
            Embedding(lambda _, wrong=wrong: wrong)(None, [], batch)


def test_projection_keeps_distances_and_is_the_same_at_every_call() -> None:
    points = normalised(torch.randn(50, 2000, generator=generator()))
    short = projected(points, 256, seed=3)
    assert short.shape == (50, 256)
    assert_same_bits("projection", projected(points, 256, seed=3), short)
    ratios = torch.pdist(short) / torch.pdist(points)
    assert 0.75 < ratios.min() < ratios.max() < 1.25
    assert projected(points, 2000) is points


@pytest.mark.parametrize("method", METHODS)
def test_descriptions_of_a_planted_problem_separate_its_families(method: str) -> None:
    """Steep lines push the weight up or down, whatever their offset."""
    learner, batch = linear_learner(), TwoFamilies().sample(200, generator())
    labels = Clusters(2, method=method).fit(Embedding("gradient")(learner, [learner], batch))
    assert agreement(labels, batch.modes) > 0.97


# ------------------------------------------------------------------------------------------------------------ clusters


@pytest.mark.parametrize("method", METHODS)
def test_clusters_are_found_and_assign_new_points(method: str) -> None:
    points, labels = blobs(3)
    clusters = Clusters(3, method=method)
    assert same_partition(clusters.fit(points), labels)
    assert same_partition(clusters.assign(points + 0.05), labels)
    probabilities = clusters.probabilities(points)
    torch.testing.assert_close(probabilities.sum(0), torch.ones(len(points)))
    assert probabilities.max(0).values.min() > 0.9
    torch.testing.assert_close(clusters.shares.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("method", METHODS)
def test_room_for_more_numbers_makes_no_cluster_surer(method: str) -> None:
    """Kept tensors have room for ``dim`` numbers; what is behind those of the points says nothing."""
    points, _ = blobs(2, spread=0.4, dim=2)
    exact, roomy = Clusters(2, method=method, dim=2), Clusters(2, method=method, dim=32)
    assert torch.equal(roomy.fit(points), exact.fit(points))
    between = torch.tensor([[0.45, 0.0], [0.5, 0.2], [0.6, 0.0]])
    torch.testing.assert_close(roomy.probabilities(between), exact.probabilities(between), rtol=1e-4, atol=1e-5)
    assert exact.probabilities(between).min() > 0.01
    torch.testing.assert_close(roomy.variances[:, :2], exact.variances)
    assert (roomy.variances[:, 2:] == 1).all()
    assert (roomy.means[:, 2:] == 0).all()


@pytest.mark.parametrize("number", [2, 3, 5])
def test_silhouette_chooses_the_number_of_separated_clusters(number: int) -> None:
    points, labels = blobs(number)
    assert choose_number(points.double(), 8) == number
    clusters = Clusters(None, max_clusters=8)
    assert same_partition(clusters.fit(points), labels)
    assert int(clusters.number) == number
    clusters.fit(points[labels == 0])
    assert int(clusters.number) == number  # chosen once


def test_points_that_are_all_the_same_make_one_cluster() -> None:
    points = torch.ones(20, 3)
    assert choose_number(points.double(), 4) == 1
    for method in METHODS:
        labels = Clusters(3, method=method).fit(points)
        assert labels.shape == (20,)
        assert 0 <= labels.min() <= labels.max() < 3


def test_a_later_fit_keeps_the_clusters_numbers() -> None:
    points, _ = blobs(4)
    clusters = Clusters(4)
    before = clusters.fit(points)
    for seed in range(1, 6):  # other starting points number the same clusters in another order
        clusters.seed = seed
        assert torch.equal(clusters.fit(points + 0.02), before)


@pytest.mark.parametrize("method", METHODS)
def test_the_state_goes_round_a_checkpoint_to_the_same_bits(method: str) -> None:
    points, _ = blobs(3)
    clusters = Clusters(None, method=method)
    clusters.fit(points)
    file = io.BytesIO()
    torch.save(clusters.state_dict(), file)
    file.seek(0)
    other = Clusters(None, method=method)
    other.load_state_dict(torch.load(file, weights_only=True))
    for name, tensor in clusters.state_dict().items():
        assert_same_bits(name, other.state_dict()[name], tensor)
    assert_same_bits("probabilities", other.probabilities(points), clusters.probabilities(points))
    other.load_state_dict(Clusters(None).state_dict())
    assert int(other.number) == 0


def test_what_clusters_refuse() -> None:
    with pytest.raises(ValueError, match="embedding must be one of displacement, gradient, losses, or a function"):
        Embedding("weights")
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        Embedding(dim=0)
    with pytest.raises(ValueError, match="method must be one of kmeans, minibatch_kmeans, gmm, got 'dbscan'"):
        Clusters(2, method="dbscan")
    with pytest.raises(ValueError, match="num_clusters must be at least 1, or None to choose it, got 0"):
        Clusters(0)
    with pytest.raises(ValueError, match="max_clusters must be at least 2 where the number is chosen, got 1"):
        Clusters(None, max_clusters=1)
    with pytest.raises(ValueError, match=r"points must be \[T, D\], finite, T at least 3, got \[2, 4\]"):
        Clusters(3).fit(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="finite"):
        Clusters(3).fit(torch.full((9, 4), torch.nan))
    with pytest.raises(ValueError, match=r"points must have at most dim = 4 numbers each, got \[9, 5\]"):
        Clusters(3, dim=4).fit(torch.zeros(9, 5))
    with pytest.raises(RuntimeError, match="clusters must be fitted before points can be assigned"):
        Clusters(3).assign(torch.zeros(2, 4))


# ----------------------------------------------------------------------------------------------------- shares of a task


def test_soft_shares_sum_to_one_and_harden_as_they_cool() -> None:
    losses = torch.tensor([[1.0, 0.2, 5.0], [1.1, 0.1, 0.0]])
    for temperature in (10.0, 1.0, 0.1, 0.0):
        torch.testing.assert_close(responsibilities(losses, temperature).sum(0), torch.ones(3))
    torch.testing.assert_close(responsibilities(losses, 0.5), (-losses / 0.5).softmax(0))
    assert responsibilities(losses).tolist() == [[1, 0, 0], [0, 1, 1]]
    torch.testing.assert_close(responsibilities(losses, 1e-4), responsibilities(losses))
    with pytest.raises(ValueError, match="temperature must not be negative, got -1"):
        responsibilities(losses, -1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_learner_that_diverges_gets_no_task_while_another_does_not(temperature: float) -> None:
    losses = torch.tensor([[torch.nan, torch.inf, torch.nan], [3.0, 4.0, torch.inf]])
    shares = responsibilities(losses, temperature)
    assert shares[:, :2].tolist() == [[0, 0], [1, 1]]
    torch.testing.assert_close(shares[:, 2], torch.tensor([0.5, 0.5]))


# ------------------------------------------------------------------------------------------------------------- batches


class ByMode:
    """Assigns by the true family."""

    num_active = 2

    def assign(self, batch: Episodes) -> Tensor:
        assert batch.modes is not None
        return batch.modes


def test_balanced_batches_hold_as_many_tasks_of_every_cluster() -> None:
    sampler = ClusterSampler(TwoFamilies(rising=0.2), ByMode(), "balanced")
    for seed in range(5):
        assert sampler.sample(16, generator(seed)).modes.bincount().tolist() == [8, 8]
    odd = {tuple(sampler.sample(5, generator(seed)).modes.bincount().tolist()) for seed in range(9)}
    assert odd == {(2, 3), (3, 2)}


def test_a_batch_of_one_cluster_is_of_one_and_clusters_come_by_their_shares() -> None:
    sampler = ClusterSampler(TwoFamilies(rising=0.25), ByMode(), "one")
    batches = [sampler.sample(8, generator(seed)) for seed in range(100)]
    assert all(len(batch.modes.unique()) == 1 and batch.num_tasks == 8 for batch in batches)
    assert 10 < sum(int(batch.modes[0] == 0) for batch in batches) < 40


def test_a_uniform_batch_is_the_distributions_own() -> None:
    sampler = ClusterSampler(TwoFamilies(), ByMode(), "uniform")
    assert_same_bits("x", sampler.sample(8, generator()).support_x, TwoFamilies().sample(8, generator()).support_x)
    assert sampler.drawn == 8


@pytest.mark.parametrize("batches", BATCHES)
def test_the_generator_decides_a_batch(batches: str) -> None:
    a, b = (ClusterSampler(TwoFamilies(), ByMode(), batches).sample(8, generator(3)) for _ in range(2))
    assert_same_bits("y", a.query_y, b.query_y)


def test_a_cluster_that_is_not_found_is_topped_up_from_the_others() -> None:
    sampler = ClusterSampler(TwoFamilies(rising=0.0), ByMode(), "balanced")
    batch = sampler.sample(8, generator())
    assert batch.modes.tolist() == [1] * 8
    assert sampler.drawn == 16 * (1 + 2 + 4 + 8)


def test_tasks_come_as_they_are_before_there_are_clusters_and_in_evaluation() -> None:
    early = ByMode()
    early.num_active = 0
    sampler = ClusterSampler(TwoFamilies(), early, "one")
    assert_same_bits("x", sampler.sample(8, generator()).support_x, TwoFamilies().sample(8, generator()).support_x)
    assert isinstance(sampler.split("train"), ClusterSampler)
    assert isinstance(sampler.split("valid"), TwoFamilies)
    with pytest.raises(ValueError, match="batches must be one of one, balanced, uniform, got 'some'"):
        ClusterSampler(TwoFamilies(), early, "some")
