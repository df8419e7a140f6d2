"""SIGTERM and Ctrl-C leave a checkpoint; SIGKILL at any time loses only the work since the last one."""

import os
import signal
import threading
import time

import pytest

from metakern.training import Interrupted, load_checkpoint
from tests.training.problems import Events, assert_same_state, make_trainer
from tests.training.processes import ended, start, wait_for

#: Iterations of a whole training, of which each takes some time here, so that a signal comes in the middle.
ITERATIONS = 40


def train(folder, pause, checkpoint_every):
    """Start or resume a run in the folder, in a separate process."""
    trainer = make_trainer(
        folder,
        iterations=ITERATIONS,
        checkpoint_every=checkpoint_every,
        eval_every=7,
        callbacks=[Events(lambda *_: time.sleep(pause))],
    )
    trainer.resume(required=False)
    trainer.fit()


def iterations(folder):
    return [int(path.stem) for path in (folder / "checkpoints").glob("*.pt")]


def whole():
    trainer = make_trainer(iterations=ITERATIONS, eval_every=7)
    trainer.fit()
    return trainer.state_dict()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_stop_signal_ends_the_iteration_writes_a_checkpoint_and_says_so(tmp_path, name):
    process = start(train, tmp_path, 0.1, 1000, output=tmp_path / "err")
    wait_for(lambda: iterations(tmp_path), "the first evaluation")
    os.kill(process.pid, getattr(signal, name))
    assert ended(process) == 128 + getattr(signal, name)
    last = max(iterations(tmp_path))
    assert last < ITERATIONS
    line = (tmp_path / "err").read_text()
    assert line.startswith(f"{name}: stopped after iteration {last}; checkpoint {tmp_path}/checkpoints/{last:08d}.pt")
    train(tmp_path, 0.0, 1000)
    assert_same_state(load_checkpoint(tmp_path / "checkpoints" / f"{ITERATIONS:08d}.pt"), whole())


def test_sigkill_loses_no_more_than_the_work_since_the_last_checkpoint(tmp_path):
    """A run killed repeatedly at random moments, mostly while writing checkpoints, ends with the same result."""
    kills = 0
    while not iterations(tmp_path) or max(iterations(tmp_path)) < ITERATIONS:
        before = max(iterations(tmp_path), default=0)
        process = start(train, tmp_path, 0.0, 1, output=tmp_path / "err")
        wait_for(lambda b=before: max(iterations(tmp_path), default=0) >= min(b + 1, ITERATIONS), "an iteration")
        time.sleep(0.001 * (kills % 8))
        process.kill()
        kills += ended(process) == -signal.SIGKILL
        assert (tmp_path / "err").read_text() == ""
    assert kills >= 10
    assert_same_state(load_checkpoint(tmp_path / "checkpoints" / f"{ITERATIONS:08d}.pt"), whole())


def test_handlers_are_those_from_before_and_are_left_alone_where_they_may_not_be_set():
    def handler(*_):
        raise AssertionError("the trainer's handler is not in place")

    previous = signal.signal(signal.SIGTERM, handler)
    seen = []
    interrupt = Events(lambda trainer, record: record.iteration == 2 and os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(Interrupted, match="SIGTERM: stopped after iteration 2; the trainer has no folder"):
            make_trainer(callbacks=[interrupt]).fit()
        assert signal.getsignal(signal.SIGTERM) is handler
        assert interrupt.events[-1] == "Interrupted"
        watch = Events(lambda *_: seen.append(signal.getsignal(signal.SIGTERM)))
        thread = threading.Thread(target=lambda: make_trainer(callbacks=[watch]).fit())
        thread.start()
        thread.join()
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert seen == [handler] * 6


def test_what_is_ignored_stays_ignored():
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        trainer = make_trainer(callbacks=[Events(lambda *_: os.kill(os.getpid(), signal.SIGTERM))])
        assert len(trainer.fit().records) == 6
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_a_second_ctrl_c_does_not_wait():
    def act(trainer, record):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)  # a handler runs between two instructions of Python

    trainer = make_trainer(callbacks=[Events(act)])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
