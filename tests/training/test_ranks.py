"""Processes of a run must have the same settings and weights; if one fails, all report why, the failed one last."""

import os
import re

import pytest
import torch
from torch import nn, optim

from metakern.learners import ClusteredLearner, MAMLLearner
from metakern.models import mlp
from metakern.tasks import Sinusoid
from metakern.training import Trainer, TrainerConfig
from metakern.training.identity import first_difference
from tests.training.problems import Events, Learner, make_trainer
from tests.training.processes import ended, start_ranks

SETTINGS = {"num_tasks": 8, "eval_tasks": 8}


def facts(trainer):
    """Settings that a trainer compares with other processes."""
    found = {}
    trainer.processes.world = 2
    trainer.processes.check_same = lambda given, when: found.update(given)
    trainer._check_settings()
    return found


def frozen(learner):
    learner.head.bias.requires_grad_(False)
    return learner


def wide(learner):
    learner.head = nn.Linear(4, 2, dtype=torch.float64)
    return learner


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"max_grad_norm": 2.0}, "config.max_grad_norm is 0.5 in process 0 and 2.0 in process 1"),
        ({"max_grad_norm": None}, "config.max_grad_norm is 0.5 in process 0 and None in process 1"),
        ({"seed": 1}, "config.seed is 0 in process 0 and 1 in process 1"),
        ({"iterations": 7}, "config.iterations is 6 in process 0 and 7 in process 1"),
        ({"batch_parts": 1}, "config.batch_parts is 2 in process 0 and 1 in process 1"),
        ({"num_tasks": 6}, "config.num_tasks is 8 in process 0 and 6 in process 1"),
        ({"ema": 0.5}, "config.ema is 0.9 in process 0 and 0.5 in process 1"),
        ({"learner": Learner(outer_steps=3)}, "learner.outer_steps is 2 in process 0 and 3 in process 1"),
        ({"learner": Learner(dropout=0.0)}, "learner.dropout is 0.2 in process 0 and 0.0 in process 1"),
        ({"learner": frozen(Learner())}, r"learner's head.bias is float64 [1] in process 0 and float64 [1], frozen in"),
        ({"learner": wide(Learner())}, "learner.head.out_features is 1 in process 0 and 2 in process 1"),
        ({"learner": Learner().to(torch.float32)}, "learner's unused is float64 [3] in process 0 and float32 [3] in"),
        ({"optimizer": optim.Adam}, "optimizer is 'torch.optim.adamw.AdamW' in process 0 and 'torch.optim.adam.Adam'"),
        (
            {"optimizer": lambda p, lr: optim.AdamW(p, lr, weight_decay=0.5)},
            "groups[0].options.weight_decay is 0.01 in process 0 and 0.5 in process 1",
        ),
        ({"scheduled": False}, "scheduler is 'torch.optim.lr_scheduler.CosineAnnealingLR' in process 0 and None in"),
    ],
)
def test_settings_that_differ_are_named(other, difference):
    found = first_difference([facts(make_trainer(**SETTINGS)), facts(make_trainer(**{**SETTINGS, **other}))])
    assert found.startswith(difference)


def maml(steps=2, shots=5, lr=0.01, clusters=2, first_order=False):
    learner = ClusteredLearner(
        MAMLLearner(mlp(1, 4, 1), steps=steps, inner_lr=lr, first_order=first_order), clusters, pool=9
    )
    return Trainer(learner, Sinusoid(shots, 5), optim.SGD(learner.parameters(), 0.1), TrainerConfig(num_tasks=4))


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"steps": 3}, "learner.shared.eval_steps is 2 in process 0 and 3 in process 1"),
        ({"lr": 0.1}, "learner.shared.inner_lr is 0.01 in process 0 and 0.1 in process 1"),
        ({"first_order": True}, "learner.shared.options.first_order is False in process 0 and True in process 1"),
        ({"clusters": 3}, "groups[0].parameters is ['shared.model.0.weight', "),
        ({"shots": 6}, "tasks.support is 5 in process 0 and 6 in process 1"),
    ],
)
def test_settings_of_metakerns_own_learners_and_tasks_are_compared(other, difference):
    assert first_difference([facts(maml()), facts(maml(**other))]).startswith(difference)


def test_what_may_differ_is_not_compared():
    """Where a process runs, and the weights that it starts with: the first process's are spread."""
    learner = Learner()
    learner.rank, learner._own, learner.device = 1, "/somewhere", "cuda:1"
    with torch.no_grad():
        learner.head.weight.fill_(3.0)
    assert facts(make_trainer(learner=learner, **SETTINGS)) == facts(make_trainer(**SETTINGS))


def test_of_many_processes_a_difference_names_each():
    assert first_difference([{"a": "1"}, {"a": "1"}, {"a": "2"}]) == "a is 1 in process 0, 1 and 2 in process 2"
    assert first_difference([{"a": "1"}, {}]) == "a is 1 in process 0 and not there in process 1"


# ------------------------------------------------------------------------------------------------- in real processes


def results(world, target, *arguments, output):
    """Exit codes and last lines of the error output of every process, and all of it."""
    ranks = start_ranks(world, target, *arguments, output=output)
    codes = [ended(process) for process in ranks]
    texts = [(output / str(rank)).read_text() for rank in range(world)]
    return codes, [text.strip().splitlines()[-1] for text in texts], texts


def differs(folder):
    rank = int(os.environ["RANK"])
    trainer = make_trainer(folder / "run", max_grad_norm=0.5 if rank else 1.0, **SETTINGS)
    trainer.fit()


def test_processes_with_different_settings_do_not_begin(tmp_path):
    codes, last, _ = results(2, differs, tmp_path, output=tmp_path / "err")
    settings = "config.max_grad_norm is 1.0 in process 0 and 0.5 in process 1"
    line = f"ValueError: all 2 processes of a run must have the same settings, but {settings}"
    assert (codes, last) == ([1, 1], [line, line])
    assert not (tmp_path / "run").exists()


def refused(folder):
    """One process's own settings are out of range."""
    rank = int(os.environ["RANK"])
    make_trainer(folder / "run", num_tasks=8, eval_tasks=8, batch_parts=9 if rank else 1).fit()


def test_what_one_process_refuses_is_what_all_say(tmp_path):
    codes, (first, second), _ = results(2, refused, tmp_path, output=tmp_path / "err")
    cause = "ValueError: num_tasks must be at least 18, one for each process and part, got 8"
    assert codes == [1, 1]
    assert second == cause
    assert first == f"metakern.training.distributed.ProcessLost: process 0 of 2 stops, as process 1 ended with {cause}"


def drifts(folder):
    rank = int(os.environ["RANK"])

    def nudge(trainer, record):
        if record.iteration == 3:
            nudge_weights(trainer)

    def nudge_weights(trainer):
        with torch.no_grad():
            trainer.learner.head.bias.add_(1e-9)

    trainer = make_trainer(folder / "run", callbacks=[Events(nudge)], **{**SETTINGS, "eval_every": 6})
    if rank:  # callbacks are the first process's
        step = trainer._outer.run
        trainer._outer.run = lambda *arguments: (step(*arguments), None)[0]
    trainer.fit()


def test_weights_that_drift_apart_are_named_at_the_next_checkpoint(tmp_path):
    codes, last, _ = results(2, drifts, tmp_path, output=tmp_path / "err")
    assert codes == [1, 1]
    assert last[0] == last[1]
    assert re.match(
        r"ValueError: all 2 processes of a run must have the same weights and states after iteration 4, but "
        r"learner.head.bias is float64 \[1\] of SHA-256 \w+ in process 0 and float64 \[1\] of SHA-256 \w+ in process 1",
        last[0],
    )
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*.pt"))
    assert kept == ["00000002.pt"]  # from before


class Failing(Learner):
    """In one process its fourth batch is an error."""

    def __init__(self, rank):
        super().__init__()
        self._rank = rank

    def on_iteration(self, iteration, tasks, generator):
        super().on_iteration(iteration, tasks, generator)
        if iteration == 3 and int(os.environ["RANK"]) == self._rank:
            raise LookupError("the tasks' file has no line 7")


def fails(folder, rank):
    make_trainer(folder / "run", learner=Failing(rank), **SETTINGS).fit()


@pytest.mark.parametrize(("world", "failing"), [(2, 0), (3, 1)])
def test_where_one_process_raises_all_say_why_and_it_says_so_last(tmp_path, world, failing):
    order = tmp_path / "err"
    codes, last, texts = results(world, fails, tmp_path, failing, output=order)
    cause = "LookupError: the tasks' file has no line 7"
    assert codes == [1] * world
    assert last[failing] == cause
    for rank in set(range(world)) - {failing}:
        assert f"process {rank} of {world} stops, as process {failing} ended with {cause}" in last[rank]
        assert not re.search("reset by peer|Connection closed|gloo", texts[rank])
        assert (order / str(rank)).stat().st_mtime <= (order / str(failing)).stat().st_mtime
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("*.pt")]


def orders(folder):
    """Settings that were set in another order are the same."""
    rank = int(os.environ["RANK"])
    learner = Learner()
    for name in ("first", "second")[:: -1 if rank else 1]:
        setattr(learner, name, 1)
    make_trainer(folder / "run", learner=learner, **SETTINGS).fit()


def test_the_order_of_settings_does_not_matter(tmp_path):
    ranks = start_ranks(2, orders, tmp_path, output=tmp_path / "err")
    assert [ended(process) for process in ranks] == [0, 0]


def fails_everywhere(folder):
    """All meet the same error at the same time: none waits for the others."""
    trainer = make_trainer(folder / "run", **SETTINGS)
    trainer.learner.meta_losses = lambda batch: iter([])
    trainer.fit()


def test_an_error_of_all_processes_is_each_ones_own(tmp_path):
    codes, last, _ = results(2, fails_everywhere, tmp_path, output=tmp_path / "err")
    assert codes == [1, 1]
    assert set(last) == {"RuntimeError: meta_losses must give at least one tensor for a batch, got none"}
