"""Folder lock: one training per folder; the error names the holder, and a killed holder blocks nobody."""

import json
import os
import re
import signal
import time

import pytest

from metakern.training import FolderInUse, FolderLock, load_checkpoint
from metakern.training.lock import is_in_use
from tests.training.problems import Events, make_trainer
from tests.training.processes import ended, start, wait_for


def hold(folder, ready):
    """Hold the lock until killed."""
    lock = FolderLock(folder)
    lock.acquire()
    ready.write_text("yes")
    time.sleep(100)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder's lock."""
    process = start(hold, tmp_path / "run", tmp_path / "ready", output=tmp_path / "err")
    wait_for((tmp_path / "ready").is_file, "the lock")
    yield process
    process.kill()
    ended(process)


def test_the_second_process_is_told_who_trains_and_nothing_changes(tmp_path, holder):
    trainer = make_trainer(tmp_path / "run")
    pattern = (
        rf"folder {re.escape(str(tmp_path))}/run is in use: process {holder.pid} on {re.escape(os.uname().nodename)} "
        r"\(.*\), since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d.*, trains in it; wait until that ends, or take another folder"
    )
    with pytest.raises(FolderInUse, match=pattern):
        trainer.fit()
    assert trainer.iteration == 0
    assert not list((tmp_path / "run" / "checkpoints").glob("*.pt"))
    assert is_in_use(tmp_path / "run")


def test_a_killed_holder_blocks_nobody(tmp_path, holder):
    holder.kill()
    assert ended(holder) == -signal.SIGKILL
    assert (tmp_path / "run" / ".lock.json").is_file()  # it could not clear up
    assert not is_in_use(tmp_path / "run")
    assert len(make_trainer(tmp_path / "run").fit().records) == 6
    assert not (tmp_path / "run" / ".lock.json").exists()


def race(folder, number):
    trainer = make_trainer(folder, iterations=40, callbacks=[Events(lambda *_: time.sleep(0.05))])
    (folder.parent / f"ready{number}").touch()
    while len(list(folder.parent.glob("ready*"))) < 3:  # a process may take seconds to start
        time.sleep(0.01)
    trainer.resume(required=False)
    trainer.fit()


def test_of_processes_that_race_for_a_folder_one_trains_it_whole(tmp_path):
    processes = [start(race, tmp_path / "run", n, output=tmp_path / f"err{n}") for n in range(3)]
    codes = [ended(process) for process in processes]
    assert sorted(codes) == [0, 1, 1]
    for number, code in enumerate(codes):
        error = (tmp_path / f"err{number}").read_text()
        # One that comes when the winner has ended is refused too, by the checkpoints that it finds.
        assert any(name in error for name in ("FolderInUse", "FileExistsError")) == bool(code)
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "00000040.pt")
    assert state["history"]["columns"]["iteration"].tolist() == list(range(1, 41))


def test_two_trainers_of_one_process_do_not_share_a_folder(tmp_path):
    seen = []

    def other(trainer, record):
        if record.iteration == 2:
            with pytest.raises(FolderInUse, match=f"process {os.getpid()} on"):
                make_trainer(tmp_path).fit()
            seen.append(json.loads((tmp_path / ".lock.json").read_text())["process"])

    make_trainer(tmp_path, callbacks=[Events(other)]).fit()
    assert seen == [os.getpid()]


def test_whatever_ends_a_training_frees_its_folder(tmp_path):
    class Stop(Exception):
        pass

    def stop(trainer, record):
        raise Stop

    with pytest.raises(Stop):
        make_trainer(tmp_path, callbacks=[Events(stop)]).fit()
    make_trainer(tmp_path).fit()
    with pytest.raises(FileExistsError, match="resume, or take another folder"):
        make_trainer(tmp_path).fit()
    trainer = make_trainer(tmp_path, iterations=7)
    trainer.resume()
    trainer.fit()
    assert not is_in_use(tmp_path)


def test_reading_needs_no_lock(tmp_path):
    make_trainer(tmp_path, iterations=2).fit()
    with FolderLock(tmp_path):
        reader = make_trainer(tmp_path)
        assert reader.resume() == 2
        reader.evaluate("test")


def test_one_lock_may_be_taken_twice(tmp_path):
    lock = FolderLock(tmp_path)
    with lock:
        with lock:
            assert is_in_use(tmp_path)
        assert is_in_use(tmp_path)
    assert not is_in_use(tmp_path)
    lock.release()  # nothing to let go


def test_a_lock_is_never_taken_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    for name in (".lock", ".lock.json"):
        (run / name).symlink_to(tmp_path / "precious")
        with pytest.raises(OSError, match="where a symbolic link is"):
            FolderLock(run).acquire()
        (run / name).unlink()
    assert (tmp_path / "precious").read_text() == "mine"


def test_the_words_of_a_holder_may_be_missing_or_damaged(tmp_path, holder):
    for text in (None, "{", '{"process": 1}', "[1]"):
        file = tmp_path / "run" / ".lock.json"
        file.unlink() if text is None else file.write_text(text)
        with pytest.raises(FolderInUse, match=r"is in use: another process trains in it"):
            FolderLock(tmp_path / "run").acquire()
