"""ClusteredLearner: stages, assignment from the support set alone, empty clusters, shares, state."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metakern.learners import ClusteredLearner, MAMLLearner, MetaLearner
from metakern.learners.clustered import ASSIGNMENTS
from metakern.learners.clustering import EMBEDDINGS, METHODS, Clusters, ClusterSampler
from metakern.tasks import Episodes
from tests.conftest import assert_same_bits
from tests.planted import TwoFamilies, agreement, generator, linear_learner

pytestmark = pytest.mark.usefixtures("one_thread")


def clustered(num_clusters: int | None = 2, **options: Any) -> ClusteredLearner:
    options = {"begin": 5, "refresh": 5, "pool": 64} | options
    return ClusteredLearner(linear_learner(), num_clusters, **options)


def train(learner: ClusteredLearner, iterations: int, tasks: Any = None, *, first: int = 0, seed: int = 0) -> None:
    """Meta-iterations of 16 tasks, as a trainer does them."""
    tasks, draws = tasks or TwoFamilies(), generator(seed)
    optimizer = torch.optim.Adam(learner.parameters(), 0.1)
    for iteration in range(first, first + iterations):
        learner.on_iteration(iteration, tasks, draws)
        for losses in learner.meta_losses(tasks.sample(16, draws)):
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()


@pytest.fixture(scope="module")
def trained() -> ClusteredLearner:
    learner = clustered()
    train(learner, 150)
    return learner


# --------------------------------------------------------------------------------------- what clusters are good for


def test_two_families_that_no_single_learner_serves_are_separated(trained: ClusteredLearner) -> None:
    single = linear_learner()
    train(ClusteredLearner(single, 2, per_cluster=False, assign="embedding", pool=64), 150)
    batch = TwoFamilies().sample(200, generator(9))
    assert isinstance(trained, MetaLearner)
    assert agreement(trained.assign(batch), batch.modes) > 0.99
    assert trained.evaluate(batch)["loss"].mean() < 0.1 * single.evaluate(batch)["loss"].mean()
    assert trained.occupancy.min() > 0.3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("embedding", [*EMBEDDINGS, lambda batch: (batch.support_x * batch.support_y).mean(1)])
def test_every_way_to_begin_separates_them(method: str, embedding: Any) -> None:
    learner = clustered(embedding=embedding, method=method, warmup=5)
    train(learner, 6)
    batch = TwoFamilies().sample(100, generator(9))
    assert agreement(learner.assign(batch), batch.modes) > 0.95


def test_the_number_of_clusters_is_chosen_by_silhouette() -> None:
    learner = clustered(None, max_clusters=4, embedding=lambda batch: (batch.support_x * batch.support_y).mean(1))
    assert len(learner.learners) == 4
    train(learner, 20)
    assert learner.num_active == 2
    assert learner.occupancy[2:].tolist() == [0, 0]
    assert learner.support_losses(TwoFamilies().sample(3, generator())).shape == (2, 3)


def test_assignment_by_embedding_stays() -> None:
    learner = clustered(assign="embedding", begin=1)
    train(learner, 20)
    batch = TwoFamilies().sample(50, generator(9))
    torch.testing.assert_close(learner.assign(batch), learner.clusters.assign(learner._embed(batch)))
    assert agreement(learner.assign(batch), batch.modes) > 0.95


def test_assignment_by_mode_is_the_oracle() -> None:
    learner = clustered(assign="modes")
    train(learner, 3)
    batch = TwoFamilies().sample(20, generator(9))
    assert torch.equal(learner.assign(batch), batch.modes)
    for wrong in (None, batch.modes + 1, batch.modes - 1):
        with pytest.raises(ValueError, match=r"batch must have modes \[T\] from 0 to 1, got"):
            learner.assign(replace(batch, modes=wrong))


# --------------------------------------------------------------------------------------- from the support set alone


@pytest.mark.parametrize("options", [{}, {"assign": "embedding"}, {"eval_temperature": 0.3}])
def test_tasks_are_assigned_from_their_support_sets_alone(options: dict[str, Any]) -> None:
    learner = clustered(**options)
    train(learner, 10)
    batch = TwoFamilies().sample(30, generator(9))
    blind = replace(batch, query_x=batch.query_x.flip(0), query_y=-batch.query_y, modes=None)
    assert_same_bits("labels", learner.assign(blind), learner.assign(batch))
    for temperature in (0.0, 0.5):
        shares = learner.responsibilities(batch, temperature)
        assert_same_bits("shares", learner.responsibilities(blind, temperature), shares)
        torch.testing.assert_close(shares.sum(0), torch.ones(30))
    one_by_one = [learner.evaluate(batch.select(slice(task, task + 1)))["loss"] for task in range(30)]
    torch.testing.assert_close(learner.evaluate(batch)["loss"], torch.cat(one_by_one))


def test_evaluation_is_by_the_learner_with_the_least_support_loss(trained: ClusteredLearner) -> None:
    batch = TwoFamilies().sample(40, generator(9))
    support = torch.stack([learner.support_losses(batch) for learner in trained.learners])
    query = torch.stack([learner.evaluate(batch)["loss"] for learner in trained.learners])
    assert torch.equal(trained.assign(batch), support.argmin(0))
    expected = query.gather(0, support.argmin(0).unsqueeze(0)).squeeze(0)
    torch.testing.assert_close(trained.evaluate(batch)["loss"], expected)
    for cluster, learner in enumerate(trained.learners):  # to the bit what the learners say of their own
        own = trained.assign(batch) == cluster
        assert_same_bits("loss", trained.evaluate(batch)["loss"][own], learner.evaluate(batch.select(own))["loss"])


def test_averaged_predictions_of_numbers(trained: ClusteredLearner) -> None:
    batch = TwoFamilies().sample(40, generator(9))
    shares = (-trained.support_losses(batch) / 3.0).softmax(0).view(2, 40, 1, 1)
    predictions = torch.stack([learner.adapt_to(batch)(batch.query_x) for learner in trained.learners])
    expected = ((shares * predictions).sum(0) - batch.query_y).square().mean((1, 2))
    trained.eval_temperature = 3.0
    torch.testing.assert_close(trained.evaluate(batch)["loss"], expected)
    trained.eval_temperature = 1e-6
    averaged = trained.evaluate(batch)["loss"]
    trained.eval_temperature = 0.0
    torch.testing.assert_close(averaged, trained.evaluate(batch)["loss"])


def classes(num_tasks: int = 12) -> Episodes:
    """Three classes; half of the tasks have permuted labels."""
    y = torch.arange(6).remainder(3).expand(num_tasks, 6) + torch.arange(num_tasks).remainder(2).unsqueeze(1)
    x = F.one_hot(torch.arange(6).remainder(3), 3).float() + 0.1 * torch.randn(num_tasks, 6, 3, generator=generator())
    return Episodes(x, y % 3, x + 0.05, y % 3)


def test_averaged_predictions_of_classes_are_probabilities() -> None:
    batch = classes()
    single = MAMLLearner(nn.Sequential(nn.Linear(3, 3)), loss=F.cross_entropy, inner_lr=0.5)
    learner = ClusteredLearner(single, 2, begin=1, eval_temperature=1.0)

    class Tasks(TwoFamilies):
        def sample(self, num_tasks: int, generator: torch.Generator) -> Episodes:
            return batch

    for iteration in range(3):
        learner.on_iteration(iteration, Tasks(), generator())
    with torch.no_grad():
        next(iter(learner.learners[1].model.parameters())).add_(0.3)
    shares = (-learner.support_losses(batch)).softmax(0).view(2, 12, 1, 1)
    logits = torch.stack([one.adapt(batch)(batch.query_x) for one in learner.learners])
    expected = (shares * logits.softmax(3)).sum(0)
    measures = learner.evaluate(batch)
    nll = -expected.gather(2, batch.query_y.unsqueeze(2)).log().mean((1, 2))
    torch.testing.assert_close(measures["loss"], nll)
    torch.testing.assert_close(measures["accuracy"], (expected.argmax(2) == batch.query_y).float().mean(1))


# --------------------------------------------------------------------------------------- stages


def test_the_shared_learner_learns_first_and_is_what_clusters_start_from() -> None:
    learner, tasks = clustered(warmup=3), TwoFamilies()
    copies = [tensor.clone() for tensor in learner.learners.parameters()]
    train(learner, 3)
    assert learner.num_active == 0
    batch = tasks.sample(4, generator())
    torch.testing.assert_close(learner.evaluate(batch), learner.shared.evaluate(batch))
    with pytest.raises(RuntimeError, match="there are no clusters yet; they begin at iteration warmup"):
        learner.assign(batch)
    for copy, tensor in zip(copies, learner.learners.parameters(), strict=True):
        assert torch.equal(copy, tensor)
    learner.on_iteration(3, tasks, generator())
    assert learner.num_active == 2
    shared = {name: tensor.clone() for name, tensor in learner.shared.state_dict().items()}
    for one in learner.learners:
        for name, tensor in one.state_dict().items():
            assert_same_bits(name, tensor, shared[name])
    train(learner, 5, first=4)
    assert all(torch.equal(tensor, shared[name]) for name, tensor in learner.shared.state_dict().items())
    assert not torch.equal(learner.learners[0].model[0].weight, learner.learners[1].model[0].weight)


def test_a_pool_is_drawn_every_r_iterations_from_the_distribution_itself() -> None:
    drawn = []

    class Counting(TwoFamilies):
        def sample(self, num_tasks: int, generator: torch.Generator) -> Episodes:
            drawn.append(num_tasks)
            return super().sample(num_tasks, generator)

    learner = clustered(warmup=2, refresh=4, pool=33)
    sampler = ClusterSampler(Counting(), learner, "balanced")
    for iteration in range(11):
        learner.on_iteration(iteration, sampler, generator(iteration))
        drawn.append(-iteration)
    assert [drawn[i + 1] for i, count in enumerate(drawn[:-1]) if count == 33] == [-2, -6, -10]
    assert set(drawn) == {33} | {-i for i in range(11)}
    assert sampler.sample(16, generator()).num_tasks == 16


def test_tasks_whose_embeddings_are_not_finite_do_not_decide_the_clusters() -> None:
    broken = [slice(None), slice(None, None, 3), slice(None)]

    def embedding(batch: Episodes) -> Tensor:
        points = batch.support_y.flatten(1).clone()
        points[broken[0]] = torch.nan
        return points

    learner = clustered(assign="embedding", embedding=embedding)
    learner.on_iteration(0, TwoFamilies(), generator())
    assert learner.num_active == 0  # too few; the next iteration tries again
    broken.pop(0)
    learner.on_iteration(1, TwoFamilies(), generator(1))
    assert learner.num_active == 2
    points = TwoFamilies().sample(64, generator(1)).support_y.flatten(1)
    expected = Clusters(2)
    expected.fit(points[torch.arange(64) % 3 != 0])
    assert_same_bits("means", learner.clusters.means, expected.means)
    broken.pop(0)
    learner.on_iteration(5, TwoFamilies(), generator(2))
    assert_same_bits("means", learner.clusters.means, expected.means)


class Elsewhere(Episodes):
    """Tasks on another device, unusable for learners until they are moved."""

    moves: ClassVar[list[tuple[int, torch.device]]] = []

    @property
    def support(self) -> tuple[Tensor, Tensor]:
        raise AssertionError("these tasks are not on the learner's device")

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.moves.append((self.num_tasks, *args))
        return Episodes(**self._tensors()).to(*args, **kwargs)


class DrawnElsewhere(TwoFamilies):
    def sample(self, num_tasks: int, generator: torch.Generator) -> Any:
        return Elsewhere(**super().sample(num_tasks, generator)._tensors())


@pytest.mark.parametrize("assign", ASSIGNMENTS)
def test_pools_and_sampled_tasks_are_moved_to_the_learner(assign: str) -> None:
    """A trainer draws on the CPU, wherever the learner is."""
    learner = clustered(assign=assign, begin=1)
    sampler = ClusterSampler(DrawnElsewhere(), learner, "balanced")
    Elsewhere.moves.clear()
    for iteration in (0, 5):
        learner.on_iteration(iteration, sampler, generator())
    assert Elsewhere.moves[0] == (64, learner.active.device)
    assert sampler.sample(8, generator()).num_tasks == 8
    assert Elsewhere.moves[-1] == (16, learner.active.device)


def test_losses_are_those_of_the_learners_that_tasks_are_assigned_to(trained: ClusteredLearner) -> None:
    batch = TwoFamilies().sample(20, generator(9))
    trained.zero_grad()
    labels = trained.assign(batch)
    (losses,) = trained.meta_losses(batch)
    every = torch.stack([next(learner.meta_losses(batch)) for learner in trained.learners])
    torch.testing.assert_close(losses, every.gather(0, labels.unsqueeze(0)).squeeze(0))
    losses[labels == 0].mean().backward()
    moved = [any(p.grad is not None and bool(p.grad.any()) for p in one.parameters()) for one in trained.learners]
    assert moved == [True, False]
    trained.zero_grad()


def test_soft_training_weighs_every_learners_losses_and_cools() -> None:
    learner = clustered(temperature=50.0, anneal=100)
    train(learner, 10)
    batch = TwoFamilies().sample(20, generator(9))
    learner.iteration.fill_(50)
    shares = (-learner.support_losses(batch) / 5.0).softmax(0)  # 50 · 0.01^½
    shares = torch.where(shares > 0.01, shares, 0)
    (losses,) = learner.meta_losses(batch)
    every = torch.stack([next(one.meta_losses(batch)) for one in learner.learners])
    torch.testing.assert_close(losses, (shares * every).sum(0))


class Unrolls(nn.Module):
    """A learner of several outer steps a batch, as rules trained by truncated backpropagation are."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.weight = steps, nn.Parameter(torch.ones(()))

    def meta_losses(self, batch: Episodes) -> Iterator[Tensor]:
        for step in range(self.steps):
            yield self.weight * batch.support_y.mean((1, 2)) + step

    def evaluate(self, batch: Episodes) -> dict[str, Tensor]:
        return {"loss": self.weight.detach() * batch.query_y.mean((1, 2))}


def test_learners_of_several_outer_steps_take_them_side_by_side() -> None:
    learner, batch = ClusteredLearner(Unrolls(2), 2, assign="modes"), TwoFamilies().sample(8, generator())
    learner.on_iteration(0, TwoFamilies(), generator())
    learner.learners[1].steps = 3
    with torch.no_grad():
        learner.learners[1].weight.fill_(2)
    losses = list(learner.meta_losses(batch))
    own = (1 + batch.modes) * batch.support_y.mean((1, 2))
    torch.testing.assert_close(losses[0], own)
    torch.testing.assert_close(losses[1], own + 1)
    torch.testing.assert_close(losses[2], torch.where(batch.modes == 1, own + 2, 0))
    torch.testing.assert_close(learner.evaluate(batch)["loss"], (1 + batch.modes) * batch.query_y.mean((1, 2)))


def test_one_learner_for_all_clusters_is_what_it_is_by_itself() -> None:
    learner = clustered(assign="embedding", per_cluster=False)
    train(learner, 3)
    batch = TwoFamilies().sample(8, generator())
    assert len(learner.learners) == 0
    torch.testing.assert_close(next(learner.meta_losses(batch)), next(learner.shared.meta_losses(batch)))
    sampled = ClusterSampler(TwoFamilies(rising=0.2), learner, "balanced").sample(16, generator())
    assert sampled.modes.bincount().tolist() == [8, 8]


# --------------------------------------------------------------------------------------- empty clusters


def serve(learner: ClusteredLearner, weights: tuple[float, ...]) -> None:
    """Initialise each learner to a line of this slope."""
    with torch.no_grad():
        for one, weight in zip(learner.learners, weights, strict=True):
            one.model[0].weight.fill_(weight)
            one.model[0].bias.zero_()


def shift_losses(learner: ClusteredLearner, offset: float) -> None:
    """Subtract a constant from losses, which may then be negative like log densities."""
    for one in learner.learners:
        one.loss = lambda prediction, target: F.mse_loss(prediction, target) + offset


@pytest.mark.parametrize("weights", [(0.0, 500.0), (-500.0, 0.0), (torch.nan, 0.0)])
def test_one_that_took_all_tasks_is_split(weights: tuple[float, ...]) -> None:
    learner = clustered()
    train(learner, 6)
    serve(learner, weights)
    assert len(learner.assign(TwoFamilies().sample(50, generator(9))).unique()) == 1
    learner.on_iteration(10, TwoFamilies(), generator())
    assert learner.occupancy.min() > 0.1
    assert learner.restarted == (0 if weights[1] == 0 else 1,)
    train(learner, 60, first=11)
    assert learner.restarted == ()
    batch = TwoFamilies().sample(100, generator(9))
    assert agreement(learner.assign(batch), batch.modes) > 0.97


@pytest.mark.parametrize("offset", [0.0, -1e3])
def test_an_empty_cluster_starts_from_the_worst_served_tasks(offset: float) -> None:
    """Rising lines are served well; the second learner takes falling ones, badly, and the third nothing."""
    learner = clustered(3)
    train(learner, 6)
    shift_losses(learner, offset)
    serve(learner, (10.0, 0.0, 900.0))
    learner.on_iteration(10, TwoFamilies(), generator())
    slopes = [one.model[0].weight.item() for one in learner.learners]
    assert slopes[:2] == [10.0, 0.0]
    assert -10 < slopes[2] < -0.3  # towards falling lines
    assert learner.occupancy[2] > 0.3


@pytest.mark.parametrize("offset", [0.0, -1e3])
def test_no_empty_cluster_starts_from_another(offset: float) -> None:
    """With negative losses an empty cluster has the largest sum, zero."""
    learner = clustered(4)
    train(learner, 6)
    shift_losses(learner, offset)
    serve(learner, (0.0, 500.0, 600.0, 700.0))
    learner.on_iteration(10, TwoFamilies(), generator())
    assert learner.restarted[0] == 1
    assert learner.learners[0].model[0].weight.item() == 0
    assert all(abs(learner.learners[index].model[0].weight.item()) < 15 for index in learner.restarted)


def test_an_empty_cluster_selects_its_tasks_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture of problems of several shapes takes ascending indices alone."""
    chosen: list[Tensor] = []
    select = Episodes.select

    def watched(batch: Episodes, tasks: Any) -> Episodes:
        chosen.append(tasks)
        return select(batch, tasks)

    learner = clustered(3)
    train(learner, 6)
    serve(learner, (10.0, 0.0, 900.0))
    monkeypatch.setattr(Episodes, "select", watched)
    learner.on_iteration(10, TwoFamilies(), generator())
    assert learner.restarted == (2,)
    assert max(map(len, chosen)) > 1
    assert all(bool((tasks.diff() > 0).all()) for tasks in chosen)


def test_tasks_whose_losses_are_not_finite_are_the_worst_served_and_lead_nowhere() -> None:
    """Falling lines are served badly, but one rising line is not served at all."""

    class OneBroken(TwoFamilies):
        def sample(self, num_tasks: int, generator: torch.Generator) -> Episodes:
            batch = super().sample(num_tasks, generator)
            batch.support_y[int(batch.modes.argmin())] = torch.nan
            return batch

    learner = clustered(3)
    train(learner, 6)
    serve(learner, (10.0, 0.0, 900.0))
    learner.on_iteration(10, OneBroken(), generator())
    assert learner.restarted == (2,)
    assert 9 < learner.learners[2].model[0].weight.item() < 11


def test_a_pool_of_occupied_clusters_changes_no_learner(trained: ClusteredLearner) -> None:
    before = {name: tensor.clone() for name, tensor in trained.learners.state_dict().items()}
    trained.on_iteration(200, TwoFamilies(), generator())
    for name, tensor in trained.learners.state_dict().items():
        assert_same_bits(name, tensor, before[name])


# --------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("stop", [2, 6, 12])
@pytest.mark.parametrize("options", [{}, {"temperature": 5.0, "anneal": 10}, {"assign": "embedding"}])
def test_a_restored_state_goes_on_to_the_same_bits(stop: int, options: dict[str, Any]) -> None:
    """In any stage: of the shared learner, by embedding, and by losses."""
    learner, other = (clustered(None, warmup=4, begin=4, refresh=3, **options) for _ in range(2))
    train(learner, stop)
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for one in (learner, other):
        train(one, 8, first=stop, seed=5)
    for name, tensor in learner.state_dict().items():
        assert_same_bits(name, other.state_dict()[name], tensor)
    assert all(isinstance(tensor, Tensor) for tensor in learner.state_dict().values())  # as safetensors asks


def test_every_learner_is_trained_by_an_optimizer_of_the_whole() -> None:
    learner = clustered(3)
    names = {name for name, _ in learner.named_parameters()}
    assert names == {
        f"{of}.model.0.{name}" for of in ("shared", *(f"learners.{c}" for c in range(3))) for name in ("weight", "bias")
    }


def test_what_it_refuses() -> None:
    for options, message in (
        ({"assign": "chance"}, "assign must be one of losses, embedding, modes, got 'chance'"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"begin": 0}, "begin must be at least 1, got 0"),
        ({"refresh": 0}, "refresh must be at least 1, got 0"),
        ({"pool": 1}, "pool must be at least 2, got 1"),
        ({"num_clusters": None, "max_clusters": 4, "pool": 4}, "pool must be at least 5, got 4"),
        ({"assign": "modes", "pool": 0}, "pool must be at least 1, got 0"),
        ({"anneal": 0}, "anneal must be at least 1, got 0"),
        ({"least_share": -0.1}, "least_share must be at least 0, got -0.1"),
        ({"least_share": 1.5}, "least_share must be at most 1, got 1.5"),
        ({"temperature": -0.5}, "temperature must be at least 0, got -0.5"),
        ({"eval_temperature": float("nan")}, "eval_temperature must be at least 0, got nan"),
        ({"embedding": "names"}, "embedding must be one of"),
        ({"embedding": "losses"}, "embedding must tell tasks apart before the learners differ, which 'losses' cannot"),
        ({"per_cluster": False}, "assign must be 'embedding' or 'modes' where all clusters share one learner"),
    ):
        with pytest.raises(ValueError, match=message):
            clustered(options.pop("num_clusters", 2), **options)


@pytest.mark.parametrize(
    ("options", "missing", "use"),
    [
        ({}, "support_losses(batch)", "assign='losses'"),
        ({}, "approach(batch)", "assign='losses'"),
        ({}, "support_gradients(batch)", "embedding='gradient'"),
        ({"assign": "embedding"}, "support_gradients(batch)", "embedding='gradient'"),
        ({"assign": "embedding", "embedding": "displacement"}, "displacements(batch)", "embedding='displacement'"),
        ({"eval_temperature": 0.5}, "predict(batch, steps)", "eval_temperature=0.5"),
        ({"eval_temperature": 0.5}, "measure(prediction, target)", "eval_temperature=0.5"),
    ],
)
def test_a_learner_without_what_it_will_be_asked_for_is_refused_at_once(
    options: dict[str, Any], missing: str, use: str
) -> None:
    """The error comes at once, not hours later when clusters begin."""
    has = ["support_losses", "approach", "support_gradients", "displacements", "predict", "measure"]

    def make(names: list[str]) -> ClusteredLearner:
        learner = Unrolls(1)
        for name in names:
            setattr(learner, name, None)
        return ClusteredLearner(learner, 2, **options)

    make(has)
    with pytest.raises(ValueError, match=re.escape(f"learner must have {missing} for {use}, got Unrolls")):
        make([name for name in has if name != missing.partition("(")[0]])


def test_a_learner_that_is_asked_for_nothing_needs_nothing() -> None:
    for options in ({"assign": "modes"}, {"assign": "embedding", "embedding": lambda batch: batch.support_y[:, 0]}):
        assert ClusteredLearner(Unrolls(1), 2, **options).num_active == 0
