"""A resumed training is bitwise equal to an uninterrupted one."""

import pytest
import torch

from metakern.optim import LearnedOptimizer
from metakern.rules import CoordinatewiseLSTM
from metakern.training import CheckpointError, load_checkpoint
from tests.training.problems import Events, Learner, Lines, assert_same_state, make_trainer


class Stop(Exception):
    pass


def stop_at(iteration):
    def act(trainer, record):
        if record.iteration == iteration:
            raise Stop

    return Events(act)


def resumed(folder, stop, **settings):
    """A trainer that an error stopped in an iteration, resumed from its newest checkpoint and trained to the end."""
    with pytest.raises(Stop):
        make_trainer(folder, callbacks=[stop_at(stop)], **settings).fit()
    torch.manual_seed(99)
    torch.rand(5)
    trainer = make_trainer(folder, **settings)
    with torch.no_grad():
        for p in trainer.learner.parameters():
            p.fill_(0.3)
    assert trainer.resume() == stop - 1
    trainer.fit()
    return trainer


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_resumed_training_has_the_bits_of_a_whole_one(tmp_path, stop):
    settings = {"checkpoint_every": 1}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.fit()
    part = resumed(tmp_path / "part", stop, **settings)
    assert_same_state(part.state_dict(), whole.state_dict())
    assert len(part.history.records) == 6
    assert [iteration for iteration, _ in part.history.evaluations] == [3, 6]
    assert part.load_best() == whole.load_best()
    assert_same_state(part.learner.state_dict(), whole.learner.state_dict())


def learned(parameters, lr):
    torch.manual_seed(3)
    rule = CoordinatewiseLSTM(hidden_size=4).double()
    return LearnedOptimizer(parameters, rule, lr=lr)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad, learned])
def test_every_optimizer_resumes(tmp_path, optimizer):
    settings = {"checkpoint_every": 1, "optimizer": optimizer}
    whole = make_trainer(**settings)
    whole.fit()
    assert_same_state(resumed(tmp_path, 4, **settings).state_dict(), whole.state_dict())


def test_the_bits_depend_on_the_seed_and_on_nothing_else():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))
        trainer = make_trainer(seed=seed)
        torch.rand(len(states))
        trainer.fit()
        states.append(trainer.state_dict()["learner"])
    assert_same_state(states[1], states[0])
    assert not torch.equal(states[2]["body.weight"], states[0]["body.weight"])


def test_the_global_generator_stands_where_it_stood():
    trainer = make_trainer()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trainer.fit()
    trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_of_another_kind_leaves_the_trainer_as_it_was(tmp_path):
    make_trainer(tmp_path, iterations=2).fit()
    path = tmp_path / "checkpoints" / "00000002.pt"
    for part, settings in {
        "average": {"ema": None},
        "scheduler": {"scheduled": False},
        "tasks": {"tasks": Lines()},
    }.items():
        trainer = make_trainer(**settings)
        before = [p.clone() for p in trainer.learner.parameters()]
        with pytest.raises(ValueError, match=f"with a state of {part}, this training is without one"):
            trainer.resume(path)
        assert trainer.iteration == 0
        assert all(map(torch.equal, before, trainer.learner.parameters()))


def test_a_learner_of_other_shapes_is_named_and_unchanged(tmp_path):
    make_trainer(tmp_path, iterations=2).fit()
    learner = Learner()
    learner.head = torch.nn.Linear(4, 2, dtype=torch.float64)
    trainer = make_trainer(learner=learner)
    before = {name: p.clone() for name, p in learner.named_parameters()}
    with pytest.raises(ValueError, match=r"(?s)must be of this learner.*size mismatch for head"):
        trainer.resume(tmp_path)
    assert_same_state(dict(learner.named_parameters()), before)


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path):
    make_trainer(tmp_path, iterations=2).fit()
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    with pytest.raises(FileExistsError, match=r"up to 00000002.pt: resume, or take another folder"):
        make_trainer(tmp_path).fit()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before


def test_an_older_checkpoint_starts_another_course_and_loses_nothing(tmp_path):
    whole = make_trainer(tmp_path, keep=9)
    whole.fit()
    trainer = make_trainer(tmp_path, keep=9)
    assert trainer.resume(tmp_path / "checkpoints" / "00000002.pt") == 2
    trainer.fit()
    assert_same_state(trainer.state_dict(), whole.state_dict())
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert {"00000004.pt", "00000004.pt.aside", "00000006.sha256.aside"} <= names


def test_what_is_not_there_to_resume(tmp_path):
    assert make_trainer(tmp_path).resume(required=False) == 0
    assert make_trainer().resume(required=False) == 0
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        make_trainer(tmp_path).resume()
    with pytest.raises(FileNotFoundError, match="the trainer has no folder"):
        make_trainer().resume()
    with pytest.raises(FileNotFoundError, match="typo"):
        make_trainer(tmp_path).resume(tmp_path / "typo.pt", required=False)


def test_a_finished_training_is_done(tmp_path):
    make_trainer(tmp_path).fit()
    trainer = make_trainer(tmp_path)
    assert trainer.resume() == 6
    trainer.fit()
    assert_same_state(trainer.state_dict(), load_checkpoint(tmp_path / "checkpoints" / "00000006.pt"))
    longer = make_trainer(tmp_path, iterations=8)
    longer.resume()
    assert len(longer.fit().records) == 8


def test_extra_state_must_be_plain(tmp_path):
    learner = Learner()
    learner.get_extra_state = lambda: {"centres": Stop()}
    with pytest.raises(TypeError, match=r"got others in \['learner'\]"):
        make_trainer(tmp_path, learner=learner).fit()


def test_a_checkpoint_is_a_file_that_anyone_can_look_into(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.fit()
    state = load_checkpoint(tmp_path / "checkpoints" / "00000006.pt")
    assert_same_state(state, trainer.state_dict())
    (tmp_path / "checkpoints" / "00000006.sha256").unlink()
    with pytest.raises(CheckpointError, match=r"no digest beside it, 00000006\.sha256"):
        load_checkpoint(tmp_path / "checkpoints" / "00000006.pt")
