"""A checkpoint of another optimizer or schedule, or with values that no training writes, is refused by name."""

import copy
import itertools
import math

import pytest
import torch
from torch import optim

from metakern.training import CheckpointError, load_checkpoint
from metakern.training.checkpoints import Checkpoints
from tests.training.problems import assert_same_state, make_trainer

OPTIMIZERS = (optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop, optim.Adagrad, optim.NAdam, optim.RAdam)

#: Adam and AdamW then compute the same.
SAME = {"weight_decay": 0.0}


def trainer_of(kind, folder=None, **settings):
    options = settings.pop("options", {})
    return make_trainer(folder, optimizer=lambda p, lr: kind(p, lr=lr, **options), iterations=2, **settings)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of every optimizer."""
    root = tmp_path_factory.mktemp("optimizers")
    for kind in OPTIMIZERS:
        trainer_of(kind, root / kind.__name__, options=SAME).fit()
    return root


@pytest.mark.parametrize(("saved", "own"), list(itertools.permutations(OPTIMIZERS, 2)))
def test_the_checkpoint_of_another_optimizer_is_refused_with_both_names(folders, saved, own):
    trainer = trainer_of(own, options=SAME)
    before = copy.deepcopy(trainer.state_dict())
    message = rf"written with optimizer {saved.__name__}, this training has {own.__name__}$"
    with pytest.raises(ValueError, match=message):
        trainer.resume(folders / saved.__name__)
    assert_same_state(trainer.state_dict(), before)
    assert len(trainer.fit().records) == 2  # it still trains


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_checkpoint_of_the_same_optimizer_is_taken(folders, kind):
    assert trainer_of(kind, options=SAME).resume(folders / kind.__name__) == 2


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (optim.Adam, {"betas": (0.8, 0.99)}, r"Adam's betas \[0\.9, 0\.999\], this training has \[0\.8, 0\.99\]"),
        (optim.Adam, {"amsgrad": True}, "Adam's amsgrad False, this training has True"),
        (optim.Adam, {"weight_decay": 0.1}, r"Adam's weight_decay 0\.0, this training has 0\.1"),
        (optim.Adam, {"eps": 1e-3}, r"Adam's eps 1e-08, this training has 0\.001"),
        (optim.SGD, {"momentum": 0.9}, r"SGD's momentum 0, this training has 0\.9"),
        (optim.SGD, {"momentum": 0.9, "nesterov": True}, r"SGD's momentum .*; SGD's nesterov False, this training"),
    ],
)
def test_other_options_of_the_same_optimizer_are_named(folders, kind, options, message):
    trainer = trainer_of(kind, options={**SAME, **options})
    before = copy.deepcopy(trainer.state_dict())
    with pytest.raises(ValueError, match=message):
        trainer.resume(folders / kind.__name__)
    assert_same_state(trainer.state_dict(), before)


def test_the_rate_is_the_checkpoints(tmp_path):
    """It is what a schedule moves, so a program may set another one; the run goes on with its own."""
    trainer_of(optim.Adam, tmp_path).fit()
    trainer = trainer_of(optim.Adam)
    trainer.optimizer.param_groups[0]["lr"] = 7.0
    trainer.resume(tmp_path)
    saved = load_checkpoint(tmp_path / "checkpoints" / "00000002.pt")["optimizer"]["param_groups"][0]["lr"]
    assert trainer.optimizer.param_groups[0]["lr"] == saved < 0.05


def test_how_a_step_is_computed_may_differ(tmp_path):
    trainer_of(optim.Adam, tmp_path, options={"foreach": True}).fit()
    assert trainer_of(optim.Adam, options={"foreach": False}).resume(tmp_path) == 2


def test_options_that_a_schedule_moves_may_have_moved(tmp_path):
    def cycling(folder=None):
        trainer = make_trainer(folder, optimizer=optim.Adam, scheduled=False, iterations=2)
        return with_schedule(trainer, lambda steps: optim.lr_scheduler.OneCycleLR(steps, 0.1, total_steps=10))

    whole = cycling(tmp_path)
    whole.fit()
    assert whole.optimizer.param_groups[0]["betas"][0] != 0.9
    resumed = cycling()
    assert resumed.resume(tmp_path) == 2
    assert_same_state(resumed.state_dict(), whole.state_dict())


def with_schedule(trainer, schedule):
    """The trainer with a schedule, made anew around its parts."""
    return type(trainer)(
        trainer.learner, trainer.tasks, trainer.optimizer, trainer.config,
        scheduler=schedule(trainer.optimizer),
        folder=None if trainer.checkpoints is None else trainer.checkpoints.folder.parent,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda o: optim.lr_scheduler.CosineAnnealingLR(o, 60), r"the schedule's T_max 6, this training has 60"),
        (lambda o: optim.lr_scheduler.CosineAnnealingLR(o, 6, 1e-3), r"the schedule's eta_min 0.*, this .* 0\.001"),
        (lambda o: optim.lr_scheduler.StepLR(o, 6), r"with scheduler CosineAnnealingLR, this training has StepLR"),
    ],
)
def test_another_schedule_is_named(folders, schedule, message):
    trainer = with_schedule(trainer_of(optim.SGD, options=SAME, scheduled=False), schedule)
    with pytest.raises(ValueError, match=message):
        trainer.resume(folders / "SGD")


def test_groups_of_other_parameters_are_named(tmp_path):
    def grouped(turn):
        def make(parameters, lr):
            parts = list(parameters)
            groups = [{"params": parts[:3]}, {"params": parts[3:]}]
            return optim.Adam(groups[::turn], lr=lr)

        return make

    make_trainer(tmp_path, optimizer=grouped(1), iterations=2).fit()
    with pytest.raises(ValueError, match=r"Adam's group 0's parameters \['unused', 'body\.weight', 'body\.bias'\], "):
        make_trainer(optimizer=grouped(-1)).resume(tmp_path)
    with pytest.raises(ValueError, match="2 parameter groups of the optimizer, this training has 1"):
        make_trainer(optimizer=optim.Adam).resume(tmp_path)


def test_an_older_checkpoint_has_no_class_and_is_compared_by_its_options(tmp_path):
    trainer_of(optim.Adam, tmp_path).fit()
    path = tmp_path / "checkpoints" / "00000002.pt"
    state = load_checkpoint(path)
    del state["identity"]
    Checkpoints(tmp_path / "old", 1).prepare()
    old = Checkpoints(tmp_path / "old", 1).save(state)
    assert trainer_of(optim.Adam).resume(old) == 2
    with pytest.raises(ValueError, match=r"NAdam's amsgrad False, this training has none; NAdam's momentum_decay"):
        trainer_of(optim.NAdam).resume(old)


# ------------------------------------------------------------------------------------------------------- forged values


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """A state with everything: averages, skipped steps, evaluations."""
    trainer = make_trainer(iterations=4, eval_every=2)
    trainer.fit()
    return trainer.state_dict()


def forged(state, path, value):
    """The state with one value replaced; ``path`` has dots between the keys, and slashes for dots within them."""
    copied = copy.deepcopy(state)
    *parents, last = [int(key) if key.isdecimal() else key.replace("/", ".") for key in path.split(".")]
    place = copied
    for key in parents:
        place = place[key]
    place[last] = value(place[last]) if callable(value) else value
    return copied


def changed(index, value):
    def change(column):
        column = column.clone()
        column[index] = value
        return column

    return change


FORGED = [
    ("iteration", -5, "iteration must be an integer of at least 0, got -5"),
    ("iteration", math.nan, "iteration must be an integer of at least 0, got nan"),
    ("iteration", 1e30, r"iteration must be an integer of at least 0, got 1e\+30"),
    ("iteration", 10**30, "iteration must be an integer of at least 0, got 1"),
    ("iteration", 3, "history.columns.iteration must be one number for each of 3 iterations"),
    ("iteration", True, "iteration must be an integer"),
    ("worse", -1, "worse must be an integer of at least 0"),
    ("worse", 9, "worse must be at most 2, the number of evaluations, got 9"),
    ("history.columns.iteration", changed(0, 7), "history.columns.iteration must be the numbers 1 to 4"),
    ("history.columns.loss", lambda c: c[:2], "history.columns.loss must be one number for each of 4"),
    ("history.columns.loss", lambda c: c.float(), "history.columns.loss must be a vector of torch.float64"),
    ("history.columns.lr", changed(1, math.nan), "history.columns.lr must be finite"),
    ("history.columns.skipped", changed(1, -1), "history.columns.skipped must be counts that do not fall"),
    ("history.columns", {}, "history.columns must be a dict of iteration, loss"),
    ("history.evaluations.0", (-2, {"loss": 1.0}), "history.evaluations must be an integer of at least 0, got -2"),
    ("history.evaluations.1", (1, {"loss": 1.0}), "history.evaluations must be at iterations that rise"),
    ("history.evaluations.0", "x", "history.evaluations must be pairs of an iteration and measures, got 'x'"),
    ("history.best", math.nan, "history.best must be a finite number, got nan"),
    ("history.best_iteration", 5, "history.best_iteration must be from 1 to 4, got 5"),
    ("best_weights.head/weight", torch.ones(1), "best_weights.head.weight must be of shape"),
    ("best_weights", None, "best_weights must be a dict"),
    ("outer.skipped", 2, "outer.skipped must be the number of skipped steps in the history, got 2"),
    ("outer.in_a_row", 1, "outer.in_a_row must be at most 0"),
    ("optimizer.param_groups.0.lr", math.nan, r"optimizer.param_groups\[0\].lr must be finite, got nan"),
    ("optimizer.param_groups.0.lr", math.inf, r"optimizer.param_groups\[0\].lr must be finite, got inf"),
    ("optimizer.param_groups.0.lr", -1.0, r"optimizer.param_groups\[0\].lr must be at least 0, got -1.0"),
    ("optimizer.param_groups.0.lr", torch.tensor(math.nan), r"optimizer.param_groups\[0\].lr must be finite, got nan"),
    ("optimizer.param_groups.0.betas", (0.9, math.nan), r"optimizer.param_groups\[0\].betas must be finite"),
    ("optimizer.param_groups", 3, "optimizer must be a state with param_groups"),
    ("optimizer.state.1.step", torch.tensor(math.nan), r"optimizer.state\[1\].step must be a count, got"),
    ("optimizer.state.1.step", torch.tensor(-3.0), r"optimizer.state\[1\].step must be a count, got"),
    ("scheduler.last_epoch", -2, "scheduler.last_epoch must be an integer of at least 0, got -2"),
    ("scheduler.last_epoch", 1e30, r"scheduler.last_epoch must be an integer of at least 0, got 1e\+30"),
    ("scheduler.base_lrs", [math.nan], "scheduler.base_lrs must be a number, got nan"),
    ("scheduler.T_max", "x", "scheduler.T_max must be a number, got 'x'"),
    ("average.steps", -1, "average.steps must be an integer of at least 0, got -1"),
    ("average.average.head/weight", torch.ones(1, dtype=torch.float64), "average.average.head.weight must be of shape"),
    ("learner", [1], r"learner must be a dict, got \[1\]"),
]


@pytest.mark.parametrize(("path", "value", "message"), FORGED, ids=[f"{i}-{f[0]}" for i, f in enumerate(FORGED)])
def test_a_forged_value_is_refused_by_its_key(state, path, value, message):
    trainer = make_trainer()
    before = copy.deepcopy(trainer.state_dict())
    with pytest.raises(CheckpointError, match=rf"the checkpoint's {message}"):
        trainer._load(forged(state, path, value))
    assert_same_state(trainer.state_dict(), before)


def test_an_identity_that_is_none_is_refused(state):
    for identity in (3, {"optimizer": 5}, {**state["identity"], "groups": 7}, {**state["identity"], "schedule": None}):
        trainer = make_trainer()
        with pytest.raises((CheckpointError, ValueError), match="identity"):
            trainer._load({**copy.deepcopy(state), "identity": identity})
        assert trainer.iteration == 0


def test_what_training_writes_passes_even_where_losses_are_not_finite(tmp_path):
    trainer = make_trainer(tmp_path, iterations=4, optimizer=optim.SGD, max_skipped=9)
    losses = trainer.learner.meta_losses
    trainer.learner.meta_losses = lambda batch: (x * math.nan if trainer.iteration == 1 else x for x in losses(batch))
    trainer.fit()
    assert trainer.history.skipped == 2
    assert make_trainer(optimizer=optim.SGD).resume(tmp_path) == 4
