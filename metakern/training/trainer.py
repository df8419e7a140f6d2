"""The trainer: optimizes the meta-parameters of any meta-learner, by any torch optimizer, on any task distribution."""

from __future__ import annotations

import copy
import errno
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from metakern.core.provided import provided
from metakern.tasks import TaskDistribution
from metakern.training.averaging import MovingAverage, start_anew
from metakern.training.callbacks import Callback, FolderRecord, call_ends
from metakern.training.checkpoints import (
    CHECKPOINTS,
    FORMAT,
    CheckpointError,
    Checkpoints,
    find_checkpoint,
    from_bytes,
    to_bytes,
)
from metakern.training.config import HIGHER_IS_BETTER, TrainerConfig
from metakern.training.distributed import Processes, ProcessLost
from metakern.training.draws import generator_for, own_global_draws, seed_global
from metakern.training.history import History, Record
from metakern.training.identity import differences, identity_in, identity_of, settings_of, values_of
from metakern.training.outer import BatchResult, OuterLoop, own_parts
from metakern.training.parts import Parts, check_parts, collect_states, weights_of
from metakern.training.signals import Interrupted, StopSignals
from metakern.training.state_checks import check_state

State = dict[str, Any]


class Trainer:
    """Meta-trains a learner on a distribution of tasks.

    Under ``torchrun`` each process computes its share of every meta-batch, and gradients are summed over all; only the
    first process writes files and calls callbacks. All processes must have the same settings: configuration, optimizer,
    schedule, and public numeric or text attributes of the learner's modules (attributes that differ between processes
    start with an underscore). These are compared at the start, weights and states at every evaluation and checkpoint.

    All draws follow from ``config.seed``: torch's global generators are seeded before each iteration and restored when
    ``fit`` ends. If the learner has a method ``on_iteration(iteration, tasks, generator)``, it is called before each
    meta-batch, in every process, with the iterations so far and the "train" split; its effect must depend on these and
    the learner alone. It may return parameters that it has replaced; their optimizer state and average are reset. The
    state of a "train" split with ``state_dict`` and ``load_state_dict`` is saved in checkpoints. The trainer never
    switches modules between ``train()`` and ``eval()``, not even for evaluations.

    Args:
        learner: a :class:`metakern.learners.MetaLearner`, an ``nn.Module``; trained in place, and moved to
            ``config.device``. State besides parameters and buffers comes from ``get_extra_state``, as plain data
        tasks: a :class:`metakern.tasks.TaskDistribution`; trains on its "train" split, its "valid" split selects the
            best weights
        optimizer: any torch optimizer of the learner's parameters whose ``step`` needs no closure
        config: see :class:`TrainerConfig`
        scheduler: steps after every iteration; ``ReduceLROnPlateau`` steps after every evaluation, by the monitored
            measure
        callbacks: see :class:`Callback`
        folder: of the run, for checkpoints and the files of :class:`metakern.runs.RunRecord`; pass a record of your own
            to change these. Without a folder nothing is written. Only one process at a time can train in a folder
        progress: whether to show progress on the screen; default: if there is a folder

    Attributes:
        iteration: iterations so far
        history: see :class:`History`
        checkpoints: the folder's :class:`Checkpoints`, or None
        processes: :class:`Processes` of the run

    Raises:
        TypeError: for a learner, tasks or optimizer of the wrong type
        ValueError: for optimizer parameters that are not the learner's, and for fewer tasks than processes and
            ``batch_parts`` need
        RuntimeError: for an unavailable mixed precision or device

    Example:
        >>> learner, config = MAMLLearner(mlp(1, 40, 1), steps=5), TrainerConfig(iterations=5)
        >>> optimizer = torch.optim.Adam(learner.parameters(), 1e-3)
        >>> trainer = Trainer(learner, Sinusoid(), optimizer, config, folder="runs/first", progress=False)
        >>> trainer.resume(required=False)  # iterations that a checkpoint has
        0
        >>> history = trainer.fit()
        >>> trainer.load_best()  # the iteration of the best weights
        5
    """

    def __init__(
        self,
        learner: nn.Module,
        tasks: TaskDistribution,
        optimizer: torch.optim.Optimizer,
        config: TrainerConfig | None = None,
        *,
        scheduler: LRScheduler | None = None,
        callbacks: Sequence[Callback] = (),
        folder: str | Path | FolderRecord | None = None,
        progress: bool | None = None,
    ) -> None:
        self.config = config or TrainerConfig()
        self.processes = Processes(self.config.device)
        with self.processes.telling():
            check_parts(learner, tasks, optimizer)
            world = self.processes.world
            for name, least in (("num_tasks", world * self.config.batch_parts), ("eval_tasks", world)):
                number = getattr(self.config, name)
                if number < least:
                    raise ValueError(f"{name} must be at least {least}, one for each process and part, got {number}")
            self.learner: Any = learner.to(self.processes.device)
            self.tasks, self.optimizer, self.scheduler = tasks, optimizer, scheduler
            self._set_record(folder, progress, callbacks)
            self.average = MovingAverage(learner, self.config.ema) if self.config.ema is not None else None
            self.iteration, self.history = 0, History()
            self._outer = OuterLoop(learner, optimizer, self.config, self.processes, self.average)
            if set_process := getattr(learner, "set_process", None):
                set_process(self.processes.rank, world)
            self._splits = {"train": tasks.split("train")}
            self._parts = Parts(learner, optimizer, scheduler, self.average, self._outer, self._splits["train"])
            self._identity = identity_of(optimizer, scheduler, learner)
            self._best_weights: State | None = None
            self._worse = 0  # evaluations since the best one
            self._signals = StopSignals()
            self._saved: tuple[int, Path] | None = None  # iteration and file of the last checkpoint
            self._last_whole: tuple[State, tuple[Any, ...]] | None = None

    def _set_record(
        self, folder: str | Path | FolderRecord | None, progress: bool | None, callbacks: Sequence[Callback]
    ) -> None:
        """Set up the folder's record and checkpoints; without a folder, progress alone."""
        self.record: FolderRecord | None = None
        self.checkpoints: Checkpoints | None = None
        own: Sequence[Callback] = provided("progress")(True) if folder is None and progress else ()
        if folder is not None:
            record: FolderRecord = (
                folder
                if isinstance(folder, FolderRecord)
                else provided("record")(folder, progress=progress is not False)
            )
            self.record, self.checkpoints = record, Checkpoints(record.folder / CHECKPOINTS, self.config.keep)
            own = (record,)
        self.callbacks = (*own, *callbacks)

    @property
    def best_weights(self) -> State | None:
        """The learner's state at the best evaluation so far, None before one."""
        return self._best_weights

    @property
    def finished(self) -> bool:
        """Whether all iterations are done, or the last ``patience`` evaluations brought no improvement."""
        patience = self.config.patience
        return self.iteration >= self.config.iterations or (patience is not None and self._worse >= patience)

    def fit(self) -> History:
        """Train from the current iteration to the end, and write a final checkpoint.

        The learner then holds the last weights; :meth:`load_best` loads the best ones.

        Raises:
            Interrupted: after SIGTERM or Ctrl-C, once the iteration is done and its checkpoint written
            FileExistsError: for a folder with checkpoints of a run that was not resumed
            FolderInUse: if another process trains in the folder
            ModuleNotFoundError: if a library that the folder's record needs is not installed
            OSError: if a checkpoint cannot be written; earlier ones stay intact
            ValueError: for processes with different settings, or weights that have drifted apart
            ProcessLost: if another process of the run ended; a checkpoint of the last complete iteration is written
            RuntimeError: after ``max_skipped`` consecutive non-finite outer steps
        """
        with self.processes.telling():
            self._check_settings()
            self._prepare_folder()
        ended_by: BaseException | None = None
        try:
            if self.processes.world > 1:
                state = self.processes.spread_bytes(to_bytes(self.state_dict()))
                self._load(from_bytes(state, "the first process's state"))
            with self._signals, own_global_draws(self.processes.device):
                self._call("on_start")
                while not self.finished:
                    self._iterate()
                self._leave_if(self._signals.received)
        except ProcessLost as error:
            ended_by = error
            ended_by = self._explained(error)
            raise ended_by from error
        except BaseException as error:
            ended_by = error
            if not isinstance(error, Interrupted):
                self.processes.announce(error)
            raise
        finally:
            try:
                call_ends(self, self.callbacks if self.processes.is_first else (), ended_by)
            finally:
                if self.record is not None and self.processes.is_first:
                    self.record.lock.release()
            if ended_by is not None and not isinstance(ended_by, Interrupted | ProcessLost):
                self.processes.let_others_end()
            if isinstance(ended_by, Interrupted) and self.processes.is_first:
                print(ended_by, file=sys.stderr)
        return self.history

    def resume(self, path: str | Path | None = None, *, required: bool = True) -> int:
        """Continue from a checkpoint, bitwise as if training had not been interrupted.

        Args:
            path: a ``.pt`` file, or a folder of them; default: the newest intact one in the trainer's folder. Damaged
                ones are skipped with a warning that names them
            required: whether a trainer's folder without a checkpoint is an error; with False the trainer then stays as
                it is, so that one program both starts a run and continues it

        Returns:
            the iterations so far

        Raises:
            FileNotFoundError: if a checkpoint is required and there is none
            CheckpointError: for a damaged or invalid checkpoint, and for a folder without an intact one
            ValueError: for a checkpoint of another learner, optimizer or scheduler; the trainer is unchanged then
        """
        with self.processes.telling():
            self._check_settings()
        found: tuple[Path, bytes] | None = None
        failure: Exception | None = None
        if self.processes.is_first:
            try:
                found = find_checkpoint(path, self.checkpoints)
            except FileNotFoundError as error:
                failure = error if required or path is not None else None
            except (OSError, CheckpointError, ValueError) as error:
                failure = error
        # The first byte is the outcome: other processes may not see the folder, and must not wait for a state forever.
        message = b"e" + str(failure).encode() if failure else b"s" + found[1] if found else b"n"
        message = self.processes.spread_bytes(message)
        if failure is not None:
            raise failure
        if message[:1] == b"e":
            raise CheckpointError(f"the first process cannot resume: {message[1:].decode()}")
        if message[:1] == b"s":
            self._load(from_bytes(message[1:], str(found[0]) if found else "the first process's checkpoint"))
            if found and self.checkpoints and found[0].parent.resolve() == self.checkpoints.folder.resolve():
                self._saved = (self.iteration, found[0])
        return self.iteration

    def evaluate(self, split: str = "valid") -> dict[str, float]:
        """Mean measures over ``eval_tasks`` tasks of a split, with the averaged parameters if ``ema`` is on.

        Every call draws the same tasks; the processes share them and all return the same numbers.
        """
        config, processes = self.config, self.processes
        with processes.telling(), own_global_draws(processes.device), self.averaged():
            seed_global(processes.device, config.seed, "evaluate", split, processes.rank)
            if split not in self._splits:
                self._splits[split] = self.tasks.split(split)
            batch = self._splits[split].sample(config.eval_tasks, generator_for(config.seed, "evaluate", split))
            sums: dict[str, torch.Tensor] = {}
            for part in own_parts(batch, processes, -(-config.eval_tasks // config.num_tasks)):
                with self._outer.autocast:
                    measures = self.learner.evaluate(part)
                for name, values in measures.items():
                    if values.shape != (part.num_tasks,):
                        raise ValueError(f"{name} must have shape [{part.num_tasks}], got {list(values.shape)}")
                    sums[name] = sums.get(name, 0) + values.detach().double().sum()
            names = sorted(sums)
            totals = processes.sum_(torch.stack([sums[name] for name in names]))
        return dict(zip(names, (totals / config.eval_tasks).tolist(), strict=True))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the learner has the averaged parameters, if ``ema`` is on."""
        with self.average.in_place() if self.average is not None else nullcontext():
            yield

    def load_best(self) -> int:
        """Load the weights of the best evaluation into the learner; returns its iteration.

        Raises:
            RuntimeError: if no evaluation has given a finite ``monitor`` yet.
        """
        if self._best_weights is None or self.history.best_iteration is None:
            raise RuntimeError(f"there must be an evaluation with a finite {self.config.monitor} first, got none")
        self.learner.load_state_dict(self._best_weights)
        return self.history.best_iteration

    def state_dict(self) -> State:
        """State for :meth:`resume`, as plain data; tensors are not copied."""
        return {
            "format": FORMAT,
            "iteration": self.iteration,
            "identity": self._identity,
            **self._parts.state_dict(),
            "history": self.history.state_dict(),
            "best_weights": self._best_weights,
            "worse": self._worse,
        }

    # ------------------------------------------------------------------------------------------------ one iteration

    def _iterate(self) -> None:
        config, start = self.config, time.perf_counter()
        self._remember_whole()
        batch = self._draw()
        seed_global(self.processes.device, config.seed, "train", self.iteration, self.processes.rank)
        lr = float(self.optimizer.param_groups[0]["lr"])
        result = self._outer.run(batch, lambda: self._signals.received)
        self.processes.spread_(self.learner.buffers())
        self.iteration += 1
        if self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            self._step_schedule(self.scheduler)
        self._record(result, lr, time.perf_counter() - start)
        last = self.iteration >= config.iterations
        evaluates, keeps = (
            last or self.iteration % every == 0 for every in (config.eval_every, config.checkpoint_every)
        )
        if evaluates or keeps:
            collect_states(self.learner, self.processes)
            self._check_values()
        if evaluates:
            self._judge(self.evaluate())
        if keeps or self.finished:
            self._save()
        # All processes must stop at the same iteration: they act only on signals shared through the last sum.
        self._leave_if(self._signals.received if self.processes.world == 1 else result.stop)

    def _step_schedule(self, scheduler: LRScheduler) -> None:
        """Step the scheduler, without torch's warning about a missing optimizer step if the first one was skipped."""
        if self.iteration > 1 or not self._outer.skipped:
            scheduler.step()
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            scheduler.step()

    def _draw(self) -> Any:
        """Draw the meta-batch of this iteration, the same in all processes."""
        seed, num_tasks, tasks = self.config.seed, self.config.num_tasks, self._splits["train"]
        seed_global(self.processes.device, seed, "draw", self.iteration)
        if hasattr(self.learner, "on_iteration"):
            generator = generator_for(seed, "on_iteration", self.iteration)
            replaced = self.learner.on_iteration(self.iteration, tasks, generator)
            start_anew(replaced or (), self.optimizer, self.average)
        batch = tasks.sample(num_tasks, generator_for(seed, "tasks", self.iteration))
        if batch.num_tasks != num_tasks:
            raise ValueError(f"sample must give the {num_tasks} tasks that it is asked for, got {batch.num_tasks}")
        return batch

    def _record(self, result: BatchResult, lr: float, seconds: float) -> None:
        record = Record(
            iteration=self.iteration,
            loss=result.loss,
            tasks_per_second=self.config.num_tasks / seconds,
            lr=lr,
            grad_norm=result.grad_norm,
            skipped=self._outer.skipped,
            seconds=seconds,
        )
        self.history.records.append(record)
        self._call("on_iteration", record)

    def _judge(self, measures: dict[str, float]) -> None:
        """Record an evaluation, and keep the weights if they are the best so far."""
        monitor, history = self.config.monitor, self.history
        if monitor not in measures:
            raise ValueError(f"monitor must be one of the learner's measures, {', '.join(measures)}, got {monitor!r}")
        value = measures[monitor]
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(value)
        sign = -1 if monitor in HIGHER_IS_BETTER else 1
        better = math.isfinite(value) and (history.best is None or sign * value < sign * history.best)
        history.evaluations.append((self.iteration, measures))
        if better:
            history.best, history.best_iteration = value, self.iteration
            with self.averaged():
                self._best_weights = copy.deepcopy(weights_of(self.learner))
        self._worse = 0 if better else self._worse + 1
        self._call("on_evaluation", measures)
        if better:
            self._save()

    def _call(self, event: str, *arguments: Any) -> None:
        if self.processes.is_first:
            for callback in self.callbacks:
                getattr(callback, event)(self, *arguments)

    # ---------------------------------------------------------------------------------------------------- the state

    def _load(self, state: State) -> None:
        """Restore a state of :meth:`state_dict`; unchanged if it does not fit this training."""
        before = copy.deepcopy(self.state_dict())
        if {*state, "identity"} != before.keys():
            raise CheckpointError(f"a checkpoint must hold {', '.join(before)}, got {', '.join(map(str, state))}")
        check_state(state, before)
        try:
            self._check_identity(state)
            self._take(state)
        except Exception as error:
            self._take(before)
            raise ValueError(f"the checkpoint must be of this learner, optimizer and scheduler: {error}") from error

    def _check_identity(self, state: State) -> None:
        """Raise ValueError for a checkpoint of another optimizer or schedule, naming the differences."""
        saved = state["identity"] if "identity" in state else identity_in(state, self._identity)
        try:
            found = differences(saved, self._identity)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its identity is none: {error}") from error
        if found:
            raise ValueError(f"it was written with {'; '.join(found)}")

    def _take(self, state: State) -> None:
        self._parts.load_state_dict(state)
        self.history.load_state_dict(state["history"])
        self.iteration, self._best_weights, self._worse = state["iteration"], state["best_weights"], state["worse"]

    def _check_settings(self) -> None:
        """Raise ValueError if processes have different settings."""
        if self.processes.world > 1:
            config = {f"config.{name}": value for name, value in asdict(self.config).items()}
            facts = settings_of(self.learner, self._splits["train"], self._identity, config)
            self.processes.check_same(facts, "settings")

    def _check_values(self) -> None:
        """Raise ValueError if weights or states differ between processes."""
        if self.processes.world > 1:
            facts = values_of({"iteration": self.iteration, **self._parts.state_dict()})
            self.processes.check_same(facts, f"weights and states after iteration {self.iteration}")

    def _prepare_folder(self) -> None:
        """Lock the folder, and fail early if a checkpoint could not be written."""
        if self.checkpoints is None or not self.processes.is_first:
            return
        self.checkpoints.prepare()
        assert self.record is not None, "there are checkpoints where there is a record"
        self.record.lock.acquire()
        try:
            self.record.prepare()
            found = self.checkpoints.numbered()
            if found and self._saved is None:
                raise FileExistsError(
                    errno.EEXIST,
                    f"there are checkpoints up to {found[-1].name}: resume, or take another folder for a new run",
                    str(self.checkpoints.folder),
                )
            to_bytes(self.state_dict())
        except BaseException:
            self.record.lock.release()
            raise

    def _save(self) -> None:
        if self.checkpoints is None or not self.processes.is_first:
            return
        if self._saved is None or self._saved[0] != self.iteration:
            path = self.checkpoints.save(self.state_dict(), best=self.history.best_iteration)
            self._saved = (self.iteration, path)
            self._call("on_checkpoint", path)

    # ------------------------------------------------------------------------------------------------------ the end

    def _leave_if(self, signum: int) -> None:
        if signum:
            collect_states(self.learner, self.processes)
            self._save()
            raise Interrupted(signum, f"{Signals(signum).name}: stopped after iteration {self._where()}")

    def _where(self) -> str:
        """The current iteration and how to resume from it, for messages."""
        if not self.processes.is_first:
            return f"{self.iteration}; the first process writes the checkpoint"
        if self.checkpoints is None or self._saved is None:
            return f"{self.iteration}; the trainer has no folder, so no checkpoint was written"
        return f"{self._saved[0]}; checkpoint {self._saved[1]}: resume goes on from there"

    def _remember_whole(self) -> None:
        """Keep the state before the iteration, in case another process ends during it."""
        self._last_whole = None
        own = getattr(self.learner, "process_state", lambda: None)()  # a lost process would take its own with it
        if own is None and self.processes.world > 1 and self.processes.is_first and self.checkpoints is not None:
            history = self.history
            marks = (len(history.records), len(history.evaluations), history.best, history.best_iteration)
            fixed = {"iteration": self.iteration, "best_weights": self._best_weights, "worse": self._worse}
            self._last_whole = ({**copy.deepcopy(self._parts.state_dict()), **fixed}, marks)

    def _explained(self, error: ProcessLost) -> ProcessLost:
        """Extend the error by how to resume; the first process saves the state of the last complete iteration."""
        if self._last_whole is not None:
            state, (records, evaluations, best, best_iteration) = self._last_whole
            history = self.history
            del history.records[records:], history.evaluations[evaluations:]
            history.best, history.best_iteration = best, best_iteration
            self._take({**state, "history": history.state_dict()})
            self._save()
        return ProcessLost(f"{error}; stopped after iteration {self._where()}")
