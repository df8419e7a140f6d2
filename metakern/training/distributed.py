"""Data-parallel processes: each computes its share of a meta-batch, and gradients are summed over all.

Started by ``torchrun`` or anything else that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; gloo connects CPUs,
NCCL GPUs.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.util import Finalize
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from metakern.training.identity import first_difference
from metakern.training.signals import Interrupted, StopSignals

#: How long processes wait for others to start.
_PATIENCE = timedelta(minutes=30)

#: Seconds that a failed process waits for the others to end, so that its error message comes last.
_FAREWELL = 30.0

#: Seconds for the other processes to print their messages after they announced their end.
_LAST_WORDS = 0.5

#: Characters of an error message that are sent to other processes.
_TOLD = 2000

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """Whether the environment variables describe a distributed launch."""
    return all(name in os.environ for name in _ENVIRONMENT) and int(os.environ["WORLD_SIZE"]) > 1


class ProcessLost(RuntimeError):
    """Another process of the run no longer responds.

    Example:
        >>> issubclass(ProcessLost, RuntimeError)
        True
    """


class Processes:
    """The processes of this run, or this one alone.

    Args:
        device: where tensors are; "cuda" becomes the GPU of LOCAL_RANK

    Attributes:
        rank: index of this process
        world: number of processes
        device: this process's device

    Raises:
        RuntimeError: for a GPU that does not exist.

    Example:
        >>> processes = Processes("cpu")
        >>> processes.rank, processes.world
        (0, 1)
    """

    _store: Any = None  # key-value store for messages; global, like torch's process group

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda":
            self.device = _own_gpu(self.device)
        self.rank, self.world = 0, 1
        self._lost = self._failed = self._heard = False  # connection gone; own error; another's error known
        if not dist.is_available():
            return
        if not dist.is_initialized() and is_launched():
            Processes._store = _connect("nccl" if self.device.type == "cuda" else "gloo")
        if self._store is not None:
            atexit.register(self._leave)
            Finalize(None, self._leave, exitpriority=0)  # multiprocessing children run this instead of atexit
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files."""
        return self.rank == 0

    def share(self, num_tasks: int) -> slice:
        """Slice of ``num_tasks`` tasks for this process; shares differ by at most one task.

        Raises:
            ValueError: for fewer tasks than processes.
        """
        if num_tasks < self.world:
            raise ValueError(f"there must be at least one task for each of {self.world} processes, got {num_tasks}")
        return slice(num_tasks * self.rank // self.world, num_tasks * (self.rank + 1) // self.world)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place; the result is bitwise the same everywhere.

        Raises:
            ProcessLost: if another process has ended.
        """
        if self.world > 1:
            self._collective(lambda: dist.all_reduce(tensor))
        return tensor

    def sum_gradients(self, parameters: Sequence[Tensor], figures: Tensor) -> Tensor:
        """Sum the gradients and some figures over all processes in one collective.

        Args:
            parameters: their ``grad`` becomes the sum; None counts as zero, and stays None if it is None everywhere
            figures: [n], further numbers to sum

        Returns:
            the sums of ``figures``, [n]
        """
        if self.world == 1:
            return figures
        dtype = torch.float32
        for p in parameters:
            dtype = torch.promote_types(dtype, p.dtype)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        present = torch.tensor([p.grad is not None for p in parameters], device=figures.device)
        flat = torch.cat([*(g.reshape(-1).to(dtype) for g in grads), present.to(dtype), figures.to(dtype)])
        self.sum_(flat)
        *sums, present, figures = flat.split([*(p.numel() for p in parameters), len(parameters), figures.numel()])
        for p, total, somewhere in zip(parameters, sums, present.tolist(), strict=True):
            p.grad = total.view_as(p).to(p.dtype) if somewhere else None
        return figures

    def spread_(self, tensors: Iterable[Tensor]) -> None:
        """Broadcast tensors from rank 0, in place."""
        if self.world > 1:
            for tensor in tensors:
                self._collective(functools.partial(dist.broadcast, tensor, 0))

    def spread_bytes(self, payload: bytes) -> bytes:
        """Broadcast bytes from rank 0; ``payload`` of other ranks is ignored."""
        if self.world == 1:
            return payload
        size = torch.tensor([len(payload)], device=self.device)
        self.spread_([size])
        if self.is_first:
            data = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(self.device)
        else:
            data = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        self.spread_([data])
        return data.cpu().numpy().tobytes()

    def check_same(self, facts: Mapping[str, str], when: str) -> None:
        """Compare facts over all processes by checksum; the values are exchanged only if checksums differ.

        Args:
            facts: values by name
            when: the point of the comparison, for the error message

        Raises:
            ValueError: in all processes; names the first difference and which process has which value.
        """
        if self.world == 1:
            return
        payload = json.dumps(facts).encode()  # unsorted: the order decides which difference is named
        checksum = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()
        checksums = self._gather(torch.frombuffer(bytearray(checksum), dtype=torch.uint8))
        if all(torch.equal(other, checksums[0]) for other in checksums):
            return
        texts = self.gather_bytes(payload)
        difference = first_difference([json.loads(text) for text in texts])
        raise ValueError(f"all {self.world} processes of a run must have the same {when}, but {difference}")

    def gather_bytes(self, payload: bytes) -> list[bytes]:
        """The bytes of every process, in every process."""
        sizes = [int(size) for size in self._gather(torch.tensor([len(payload)]))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        return [data[:size].numpy().tobytes() for data, size in zip(self._gather(padded), sizes, strict=True)]

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """Gather every process's tensor to the CPU; all have the same shape."""
        own = tensor.to(self.device)
        gathered = [torch.empty_like(own) for _ in range(self.world)]
        self._collective(lambda: dist.all_gather(gathered, own))
        return [each.cpu() for each in gathered]

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Context that announces an error to the other processes before raising it; see :meth:`announce`."""
        try:
            yield
        except (ProcessLost, Interrupted):
            raise
        except BaseException as error:
            self.announce(error)
            self.let_others_end()
            raise

    def announce(self, error: BaseException) -> None:
        """Tell the other processes which error ends this one, and leave the group."""
        if self.world == 1 or self._store is None or self._lost:
            return
        self._lost = self._failed = self._heard = True
        with suppress(RuntimeError):  # the process that keeps the store has ended
            self._store.set(f"error/{self.rank}", f"{type(error).__name__}: {error}"[:_TOLD])
        self._close()

    def _close(self) -> None:
        """Close the connections: processes waiting for this one then fail and read the store."""
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()

    def let_others_end(self) -> None:
        """After :meth:`announce`: wait, with a timeout, until the others have ended or failed too.

        The message that names the cause then comes last. A signal ends the wait: torchrun sends one as soon as one
        process has ended.
        """
        if self._failed:
            self._failed = False
            self._wait_for("left", "error")
            with suppress(RuntimeError):
                self._store.set(f"bye/{self.rank}", "yes")
            time.sleep(_LAST_WORDS)

    def _wait_for(self, *words: str) -> None:
        """Wait, with a timeout, until every other process has posted one of the words to the store."""
        missing, end = set(range(self.world)) - {self.rank}, time.monotonic() + _FAREWELL
        with StopSignals() as signals, suppress(RuntimeError):
            while missing and time.monotonic() < end and not signals.received:
                missing -= {r for r in missing if any(self._store.check([f"{word}/{r}"]) for word in words)}
                time.sleep(0.02)

    def _cause(self) -> str:
        """The error that another process announced; empty if none did."""
        try:
            for rank in range(self.world) if self._store is not None else ():
                if rank != self.rank and self._store.check([f"error/{rank}"]):
                    self._heard = True
                    return f"process {rank} ended with {self._store.get(f'error/{rank}').decode()}"
        except RuntimeError:
            pass
        return ""

    def _collective(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except torch.OutOfMemoryError:
            raise  # this process's own error
        except RuntimeError as error:
            self._lost = True
            if cause := self._cause():
                traceback.clear_frames(error.__traceback__)  # frames hold the group and keep it connected
                self._close()
                raise ProcessLost(f"process {self.rank} of {self.world} stops, as {cause}") from None
            reason = str(error).strip().splitlines()[0]
            raise ProcessLost(
                f"process {self.rank} of {self.world} does not reach the others any more; one of them has ended, and "
                f"its own output says why ({reason})"
            ) from error

    def _leave(self) -> None:
        """At exit: after another process's error, the process that hosts the store ends last."""
        if self._heard and not self._failed:
            self._heard = False
            with suppress(RuntimeError):
                self._store.set(f"left/{self.rank}", "yes")
            if self.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                self._wait_for("left", "bye")
        if dist.is_initialized() and not self._lost:  # destroying the group would wait for a lost process
            dist.destroy_process_group()


def _connect(backend: str) -> Any:
    """Join the process group; returns the shared store."""
    # Imported here: torch builds without distributed support lack both.
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(rendezvous("env://", timeout=_PATIENCE))
    store = PrefixStore(_new_name(store, rank, world), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return PrefixStore("metakern", store)


def _new_name(store: Any, rank: int, world: int) -> str:
    """A key prefix for this set of processes, chosen by rank 0.

    torchrun keeps its store when it restarts processes, and the new ones would read the addresses of the dead: the
    prefix keeps their keys apart. The restart count cannot serve as prefix, as machines may count differently. So each
    process posts a random word, overwriting its predecessor's, and takes the name posted in answer to this word.
    """
    word = uuid.uuid4().hex
    if rank:
        store.set(f"metakern/word/{rank}", word)
        name: str = store.get(f"metakern/name/{word}").decode()
        store.set(f"metakern/taken/{name}/{rank}", "yes")
        return name
    missing = set(range(1, world))
    end = time.monotonic() + _PATIENCE.total_seconds()
    while missing:
        if time.monotonic() > end:
            raise ProcessLost(f"processes {sorted(missing)} of {world} did not start within {_PATIENCE}")
        for other in sorted(missing):
            if store.check([f"metakern/taken/{word}/{other}"]):
                missing.remove(other)
            elif store.check([f"metakern/word/{other}"]):
                store.set(f"metakern/name/{store.get(f'metakern/word/{other}').decode()}", word)
        time.sleep(0.01)
    return word


def _own_gpu(device: torch.device) -> torch.device:
    index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
    count = torch.cuda.device_count()
    if index >= count:
        raise RuntimeError(f"device cuda:{index} must be one of the GPUs of this machine, of which there are {count}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
