"""Checkpoints are written atomically: damage is detected, pickled code does not run, a full disk destroys nothing."""

import errno
import hashlib
import io
import os
import pickle
import random
import resource
import subprocess
import warnings

import pytest
import torch

from metakern.training import CheckpointError, Checkpoints, load_checkpoint
from metakern.training.checkpoints import FORMAT
from tests.training.problems import assert_same_state, make_trainer


def state(iteration):
    return {"format": FORMAT, "iteration": iteration, "weights": torch.arange(40.0) + iteration, "list": [1, "a", None]}


@pytest.fixture
def checkpoints(tmp_path):
    """Checkpoints of iterations 1 and 2."""
    store = Checkpoints(tmp_path / "checkpoints", keep=3)
    store.prepare()
    for iteration in (1, 2):
        store.save(state(iteration))
    return store


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


def newest(store):
    path, _ = store.load_newest()
    return load_checkpoint(path)


def test_what_is_saved_is_loaded_and_sha256sum_agrees(checkpoints):
    assert names(checkpoints) == ["00000001.pt", "00000001.sha256", "00000002.pt", "00000002.sha256"]
    assert_same_state(newest(checkpoints), state(2))
    check = subprocess.run(
        ["sha256sum", "-c", "00000001.sha256", "00000002.sha256"], cwd=checkpoints.folder, capture_output=True
    )
    assert check.returncode == 0, check.stderr


def test_the_newest_and_the_best_are_kept(checkpoints):
    for iteration in (30, 100_000_000, 200_000_000):
        checkpoints.save(state(iteration), best=1)
    assert [path.stem for path in checkpoints.numbered()] == ["00000001", "00000030", "100000000", "200000000"]
    assert {path.stem for path in checkpoints.folder.glob("*.sha256")} == {p.stem for p in checkpoints.numbered()}
    checkpoints.save(state(300_000_000), best=30)
    assert [path.stem for path in checkpoints.numbered()] == ["00000030", "100000000", "200000000", "300000000"]


def test_a_trainer_keeps_the_newest_and_the_best(tmp_path):
    trainer = make_trainer(tmp_path, iterations=8, keep=2, eval_every=1, checkpoint_every=1)
    losses = iter([9.0, 8.0, 1.0, *[5.0] * 5])
    trainer.learner.evaluate = lambda batch: {"loss": torch.full((batch.num_tasks,), value)}
    evaluate = trainer.evaluate

    def scripted():
        nonlocal value
        value = next(losses)
        return evaluate()

    value, trainer.evaluate = 0.0, scripted
    trainer.fit()
    assert [path.stem for path in trainer.checkpoints.numbered()] == ["00000003", "00000007", "00000008"]


def damaged(payload, generator):
    """A file with a byte flipped somewhere, or cut off somewhere."""
    place = generator.randrange(len(payload))
    if generator.random() < 0.5:
        return payload[:place]
    return payload[:place] + bytes([payload[place] ^ (1 << generator.randrange(8))]) + payload[place + 1 :]


@pytest.mark.parametrize("suffix", [".pt", ".sha256"])
def test_damage_anywhere_is_found_and_the_checkpoint_before_is_taken(checkpoints, suffix):
    generator = random.Random(0)
    file = checkpoints.numbered()[-1].with_suffix(suffix)
    whole = file.read_bytes()
    for _ in range(200):
        file.write_bytes(damaged(whole, generator))
        with pytest.warns(RuntimeWarning, match=r"00000002.pt is damaged.*; 00000001.pt is taken in its place"):
            assert_same_state(newest(checkpoints), state(1))
        with pytest.raises(CheckpointError, match=r"00000002.pt is damaged: its SHA-256"):
            load_checkpoint(file.with_suffix(".pt"))
    file.write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_state(newest(checkpoints), state(2))


def test_a_trainer_resumes_from_the_one_before_a_damaged_one(tmp_path):
    whole = make_trainer(tmp_path)
    whole.fit()
    path = tmp_path / "checkpoints" / "00000006.pt"
    path.write_bytes(path.read_bytes()[:-100])
    trainer = make_trainer(tmp_path)
    with pytest.warns(RuntimeWarning, match=r"00000006.pt is damaged"):
        assert trainer.resume() == 4
    trainer.fit()
    assert_same_state(trainer.state_dict(), whole.state_dict())
    assert_same_state(load_checkpoint(path), whole.state_dict())


def test_no_whole_checkpoint_is_an_error_that_names_each(checkpoints):
    first, second = checkpoints.numbered()
    first.with_suffix(".sha256").unlink()
    second.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole.*00000002.pt is damaged.*00000001.pt has"):
        checkpoints.load_newest()


def with_digest(path, payload):
    path.write_bytes(payload)
    path.with_suffix(".sha256").write_text(f"{hashlib.sha256(payload).hexdigest()}  {path.name}\n")


class Exploit:
    """Writes a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_a_strangers_checkpoint_runs_no_code(checkpoints, tmp_path, container):
    trap = tmp_path / "ran"
    content = {**state(3), "learner": Exploit(str(trap))}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with_digest(
        checkpoints.folder / "00000003.pt", buffer.getvalue() if container == "torch" else pickle.dumps(content, 2)
    )
    with pytest.raises(CheckpointError, match=r"00000003.pt holds more than tensors and plain data"):
        load_checkpoint(checkpoints.folder / "00000003.pt")
    with pytest.warns(RuntimeWarning, match=r"00000003.pt holds more"):
        assert_same_state(newest(checkpoints), state(2))
    assert not trap.exists()
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert trap.exists()  # the trap works


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no torch file"),
        ([1, 2], "is a torch file, but no checkpoint"),
        ({"format": 7}, "must have format 1, got 7"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, content, message):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with_digest(tmp_path / "00000001.pt", b"PK\3\4 nothing" if content is None else buffer.getvalue())
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "00000001.pt")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "is full: free some space"),
        (errno.EROFS, "the folder is read-only"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
@pytest.mark.parametrize("place", range(3))
def test_a_disk_that_takes_no_more_is_an_error_and_destroys_nothing(checkpoints, monkeypatch, number, message, place):
    """``place``: the sync that fails, of the digest, the checkpoint, or the folder."""
    syncs = iter(range(9))
    sync = os.fsync

    def fail(descriptor):
        if next(syncs) == place:
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=rf"checkpoint 00000003.pt \(.* MB\) was not written.*{message}") as caught:
        checkpoints.save(state(3))
    assert caught.value.errno == number
    assert "older checkpoints are untouched" in str(caught.value)
    monkeypatch.undo()
    assert_same_state(load_checkpoint(checkpoints.folder / "00000002.pt"), state(2))
    assert not list(checkpoints.folder.glob("*.tmp"))
    checkpoints.save(state(3))
    assert_same_state(newest(checkpoints), state(3))


def test_a_limit_of_the_system_is_met_as_a_full_disk_is(checkpoints):
    before = names(checkpoints)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"00000003.pt .* was not written, the disk.* is full"):
            checkpoints.save(state(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(checkpoints) == before
    assert_same_state(newest(checkpoints), state(2))


def test_a_folder_that_cannot_be_written_ends_a_run_before_it_starts(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="no checkpoint can be written"):
        make_trainer(tmp_path / "file").fit()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EROFS, "")))
    trainer = make_trainer(tmp_path)
    with pytest.raises(OSError, match="no checkpoint can be written, the folder is read-only"):
        trainer.fit()
    assert trainer.iteration == 0


def test_what_a_killed_process_left_is_cleared_away(checkpoints):
    (checkpoints.folder / "00000003.pt.tmp").write_bytes(b"half")
    (checkpoints.folder / "00000003.sha256").write_bytes(b"a digest whose checkpoint never came")
    assert_same_state(newest(checkpoints), state(2))
    checkpoints.save(state(4))
    assert "00000003.pt.tmp" not in names(checkpoints)
