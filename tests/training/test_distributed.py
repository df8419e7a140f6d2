"""Distributed training equals a single process: meta-gradient and steps; one process writes; a failure ends all."""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from metakern.cli.common import is_first_process
from metakern.training import load_checkpoint
from metakern.training.distributed import Processes, _new_name, is_launched
from tests.conftest import assert_close
from tests.training.problems import Events, Learner, assert_same_state, make_trainer, meta_gradient
from tests.training.processes import ended, start_ranks

#: Seven tasks for two or three processes are shares of different sizes.
SETTINGS = {"num_tasks": 7, "eval_tasks": 8, "batch_parts": 2}


class Sparse(Learner):
    """Without dropout; ``rare`` has a gradient from some tasks only, the second loss is NaN in the first process."""

    def __init__(self):
        super().__init__(outer_steps=1, dropout=0.0)
        self.rare, self.batches = torch.nn.Parameter(torch.ones(2, dtype=torch.float64)), 0

    def on_iteration(self, iteration, tasks, generator):
        super().on_iteration(iteration, tasks, generator)
        self.spoiled = iteration == 1 and os.environ.get("RANK", "0") == "0"

    def meta_losses(self, batch):
        for losses in super().meta_losses(batch):
            rare = batch.query_x[:, 0, 0] > 1
            yield losses * float("nan") if self.spoiled else losses + rare * self.rare.sum() if rare.any() else losses


def sparse_trainer(folder=None, callbacks=()):
    return make_trainer(folder, learner=Sparse(), callbacks=callbacks, **SETTINGS)


def train_as_one(folder):
    """Save the first meta-gradient, and what a training from weights of the process's own ends with."""
    rank = int(os.environ["RANK"])
    trainer = sparse_trainer()
    gradient = meta_gradient(trainer, trainer._draw())
    events = Events()
    trainer = sparse_trainer(folder / "run", [events])
    if rank:
        with torch.no_grad():
            trainer.learner.head.weight.fill_(9.0)
    trainer.fit()
    torch.save(
        {
            "gradient": gradient,
            "state": trainer.state_dict(),
            "events": events.events,
            "test": trainer.evaluate("test"),
        },
        folder / f"{rank}.saved",
    )


def flattened(state):
    """Numbers of a trainer's state by name."""
    weights = {f"learner {n}": x for n, x in state["learner"].items() if isinstance(x, torch.Tensor)}
    moments = {f"moment {i} {n}": x for i, entry in state["optimizer"]["state"].items() for n, x in entry.items()}
    average = {f"average {n}": x for n, x in state["average"]["average"].items()}
    columns = {n: x for n, x in state["history"]["columns"].items() if n not in ("seconds", "tasks_per_second")}
    evaluations = torch.tensor([list(values.values()) for _, values in state["history"]["evaluations"]])
    return {**weights, **moments, **average, **columns, "evaluations": evaluations}


@pytest.mark.parametrize("world", [2, 3])
def test_processes_train_as_one(tmp_path, world):
    ranks = start_ranks(world, train_as_one, tmp_path, output=tmp_path / "err")
    one = sparse_trainer()
    gradient = meta_gradient(one, one._draw())
    one = sparse_trainer()
    one.fit()
    assert [ended(process) for process in ranks] == [0] * world
    saved = [torch.load(tmp_path / f"{rank}.saved", weights_only=False) for rank in range(world)]
    assert sum(g is None for g in gradient) == 1
    for rank, values in enumerate(saved):
        for actual, expected in zip(values["gradient"], gradient, strict=True):
            assert (actual is None) == (expected is None)
            if expected is not None:
                assert_close(f"the meta-gradient of process {rank}", actual, expected, 1e-10)
        assert_same_state(values["state"], saved[0]["state"])
        assert values["test"] == saved[0]["test"] == pytest.approx(one.evaluate("test"), rel=1e-10)
    actual, expected = flattened(saved[0]["state"]), flattened(one.state_dict())
    assert actual.keys() == expected.keys()
    for name in expected.keys() - {"learner seen"}:
        assert_close(name, actual[name], expected[name], 1e-10)
    assert one.history.skipped == 1
    assert saved[0]["events"][0] == "start"
    assert [values["events"] for values in saved[1:]] == [[]] * (world - 1)
    assert_same_state(load_checkpoint(tmp_path / "run" / "checkpoints" / "00000006.pt"), saved[0]["state"])


# ------------------------------------------------------------------------------------------------- what ends one


class Fated(Learner):
    """With dropout; in the last process something happens to it before its fourth meta-gradient, if ``fate`` exists."""

    def __init__(self, fate):
        super().__init__()
        self.fate = fate

    def on_iteration(self, iteration, tasks, generator):
        super().on_iteration(iteration, tasks, generator)
        self.fated = iteration == 3 and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1

    def meta_losses(self, batch):
        for position, losses in enumerate(super().meta_losses(batch)):
            if self.fated and position == 1 and self.fate.exists():
                happens = self.fate.read_text()
                self.fate.unlink()
                if happens == "die":
                    os._exit(3)
                os.kill(os.getpid(), signal.SIGTERM)
            yield losses


def train(folder):
    """Start the run in a folder, or go on with it."""
    trainer = make_trainer(folder, learner=Fated(folder / "fate"), checkpoint_every=5, **SETTINGS)
    trainer.resume(required=False)
    trainer.fit()


def run(folder, fate=None):
    """Exit codes and outputs of two processes."""
    folder.mkdir(exist_ok=True)
    if fate:
        (folder / "fate").write_text(fate)
    ranks = start_ranks(2, train, folder, output=folder / "err")
    return [ended(process) for process in ranks], [(folder / "err" / str(rank)).read_text() for rank in range(2)]


def final(folder):
    return load_checkpoint(folder / "checkpoints" / "00000006.pt")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The state that two processes end with if nothing happens to them."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder) == ([0, 0], ["", ""])
    return final(folder)


def test_a_signal_to_one_process_stops_all_after_the_same_iteration(tmp_path, uninterrupted):
    codes, (first, second) = run(tmp_path, "stop")
    assert codes == [128 + signal.SIGTERM] * 2
    assert re.match(r"SIGTERM: stopped after iteration 4; checkpoint .*00000004\.pt: resume goes on from there", first)
    assert second == ""
    assert run(tmp_path)[0] == [0, 0]
    assert_same_state(final(tmp_path), uninterrupted)


def test_a_dying_process_ends_the_run_with_a_checkpoint_of_the_last_whole_iteration(tmp_path, uninterrupted):
    """The process dies between two outer steps of a batch: what the first one changed is not in the checkpoint."""
    codes, (first, _) = run(tmp_path, "die")
    assert codes == [1, 3]
    assert "process 0 of 2 does not reach the others any more; one of them has ended" in first
    assert re.search(r"ProcessLost: .*stopped after iteration 3; checkpoint .*00000003\.pt: resume goes on", first)
    assert run(tmp_path) == ([0, 0], ["", ""])
    assert_same_state(final(tmp_path), uninterrupted)


def test_torchruns_elastic_restart_resumes(tmp_path, uninterrupted):
    (tmp_path / "fate").write_text("die")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, "-m", "tests.training.test_distributed", str(tmp_path)],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "fate").exists()
    assert "does not reach the others any more" in done.stderr
    assert_same_state(final(tmp_path), uninterrupted)


def test_shares_cover_all_tasks_and_differ_by_one():
    processes = Processes("cpu")
    for world, tasks in ((1, 5), (2, 7), (3, 7), (4, 4), (5, 32)):
        processes.world = world
        shares = []
        for processes.rank in range(world):
            shares.append(processes.share(tasks))
        assert [i for share in shares for i in range(tasks)[share]] == list(range(tasks))
        sizes = [share.stop - share.start for share in shares]
        assert max(sizes) - min(sizes) <= 1
    with pytest.raises(ValueError, match="at least one task for each of 5 processes, got 4"):
        processes.share(4)


def test_restarted_processes_agree_on_a_name_in_a_store_that_remembers_the_dead():
    store, world = torch.distributed.HashStore(), 3
    store.set("metakern/word/2", "of a process that died before it was answered")
    names = []
    for _ in range(3):
        with ThreadPoolExecutor(world) as pool:
            names.append(list(pool.map(lambda rank: _new_name(store, rank, world), reversed(range(world)))))
    assert all(len(set(started)) == 1 for started in names)
    assert len({started[0] for started in names}) == 3


if __name__ == "__main__":
    train(Path(sys.argv[1]))


def test_one_of_several_processes_is_known_by_all_of_its_variables(monkeypatch):
    """RANK alone may be a batch system's."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert not is_launched()
    assert is_first_process()
    assert Processes("cpu").is_first
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert is_launched()
    assert not is_first_process()


def test_memory_that_runs_out_is_no_lost_process():
    def call():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Processes("cpu")._collective(call)
