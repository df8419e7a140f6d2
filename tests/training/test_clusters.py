"""A trainer with clusters, batches by cluster and averaged weights, stopped in any stage, resumes to the same bits."""

import copy

import pytest
import torch

from metakern.learners import ClusteredLearner, MAMLLearner
from metakern.learners.clustering import ClusterSampler
from metakern.models import mlp
from metakern.tasks import mixture
from metakern.training import Trainer, TrainerConfig
from tests.conftest import assert_close
from tests.training.problems import Events, assert_same_state

#: The shared learner trains in iterations 1 to 3, clusters by embedding in 4 to 6, by losses from then on.
STAGES = {"warmup": 3, "begin": 3, "refresh": 2}


class Stop(Exception):
    pass


def make(folder, *, stop=0, seed=0):
    """A training of 10 iterations that an error ends in iteration ``stop``."""

    def act(trainer, record):
        if record.iteration == stop:
            raise Stop

    torch.manual_seed(seed)
    shared = MAMLLearner(mlp(1, 6, 1), loss=torch.nn.functional.mse_loss, steps=1, inner_lr=0.01)
    learner = ClusteredLearner(shared, 2, pool=24, embedding="displacement", temperature=0.1, **STAGES)
    tasks = ClusterSampler(mixture(3, 4, 4), learner, "balanced")
    optimizer = torch.optim.Adam(learner.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    config = TrainerConfig(
        iterations=10,
        num_tasks=6,
        batch_parts=2,
        ema=0.9,
        max_grad_norm=1.0,
        eval_every=4,
        eval_tasks=6,
        checkpoint_every=1,
    )
    return Trainer(learner, tasks, optimizer, config, scheduler=schedule, callbacks=[Events(act)], folder=folder)


@pytest.fixture(scope="module")
def whole():
    """The uninterrupted training: its state, its best weights' state, its stage in every iteration."""
    stages = []
    trainer = make(None)
    trainer.callbacks = (Events(lambda t, _: stages.append((t.learner.num_active > 0, t.learner._begins()))),)
    trainer.fit()
    state = copy.deepcopy(trainer.state_dict())
    trainer.load_best()
    return state, trainer.learner.state_dict(), stages


@pytest.mark.parametrize(
    ("stop", "stage"), [(2, "warm-up"), (4, "begins"), (5, "embedding"), (7, "losses"), (9, "losses")]
)
def test_a_resumed_training_of_clusters_has_the_bits_of_a_whole_one(whole, tmp_path, stop, stage):
    state, best, stages = whole
    active, begins = stages[stop - 1]
    assert (active, begins and active) == (stage != "warm-up", stage in ("begins", "embedding"))
    with pytest.raises(Stop):
        make(tmp_path, stop=stop).fit()
    resumed = make(tmp_path, seed=5)  # its own weights are others
    assert resumed.resume() == stop - 1
    resumed.fit()
    assert_same_state(resumed.state_dict(), state)
    resumed.load_best()
    assert_same_state(resumed.learner.state_dict(), best)


def test_averages_of_the_learners_begin_with_the_shared_weights_when_clusters_do():
    """Not with their random initial weights, of which a slow average would keep a part for long."""
    seen = {}

    def act(trainer, record):
        if record.iteration == 4:  # the first one with clusters
            seen.update(trainer.average.average | {f"now {n}": p for n, p in trainer.learner.named_parameters()})
            seen.update({name: tensor.detach().clone() for name, tensor in seen.items()})

    trainer = make(None)
    trainer.callbacks = (Events(act),)
    trainer.fit()
    decay = min(0.9, (1 + 4) / (10 + 4))
    names = [name for name, _ in trainer.learner.shared.named_parameters()]
    for name in (f"learners.{cluster}.{name}" for cluster in range(2) for name in names):
        shared = seen[f"now shared.{name.split('.', 2)[2]}"]
        assert_close(name, seen[name], decay * shared + (1 - decay) * seen[f"now {name}"], 1e-6)
