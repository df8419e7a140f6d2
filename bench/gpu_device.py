"""Device interface of bench.gpu: timing, graphs and measured peak rates, or a CPU stand-in.

:class:`CpuStandIn` lets the benchmark's logic run without a GPU; its figures mean nothing.
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch._C._autograd import DeviceType

from bench import machine
from bench.timing import wall_seconds

Call = Callable[[], Any]

#: Buffer size in bytes for measuring the copy rate, and matrix size for measuring FLOP/s.
COPY_BYTES = 2**32
SGEMM_SIZE = 8192


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise TimeoutError in the main thread when the block takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"{what} took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def reason(error: Exception) -> str:
    """Why a contender is not measured: the first line of its exception."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


class Device(Protocol):
    """Interface of a device to measure on."""

    name: str
    torch_device: torch.device
    backends: tuple[str, ...]  # metakern's, the one judged by the targets first
    state_dtypes: tuple[torch.dtype, ...]  # that those backends keep
    compile_options: dict[str, Any]  # of torch.compile, for the compiled peer of one large step
    graph_options: dict[str, Any]  # the same for a peer of many small steps
    cache_bytes: int  # of the last level

    def seconds(self, work: Call) -> float:
        """How long a function keeps the device busy, gaps between its launches included."""

    def synchronize(self) -> None:
        """Wait until the device is idle."""

    def capture(self, call: Call) -> Call:
        """A function that replays the launches of ``call``, without its host code."""

    def launches(self, call: Call) -> int:
        """Number of kernels launched by ``call``."""

    def release(self) -> None:
        """Free unreferenced memory."""

    def copy_rate(self) -> float:
        """Measured bytes per second read and written by a large copy."""

    def flop_rate(self) -> float:
        """Float32 FLOP/s of a large matrix product, measured."""


class CudaDevice:
    """The current CUDA device, timed by events."""

    backends: tuple[str, ...] = ("cuda", "triton")
    state_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("there is no CUDA device to measure (--dry exercises the logic without one)")
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.torch_device)
        self.name = properties.name
        self.cache_bytes = int(properties.L2_cache_size)
        self.compile_options: dict[str, Any] = {"mode": "max-autotune"}
        self.graph_options: dict[str, Any] = {"mode": "reduce-overhead"}

    def seconds(self, work: Call) -> float:
        """Time between two events around the work."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def synchronize(self) -> None:
        """Wait for all streams."""
        torch.cuda.synchronize()

    def capture(self, call: Call) -> Call:
        """A CUDA graph of the call, after three warm-up calls on a side stream, as torch requires."""
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def launches(self, call: Call) -> int:
        """Kernels, copies and fills that the profiler sees on the device."""
        call()
        self.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            self.synchronize()
        return sum(event.device_type == DeviceType.CUDA for event in profile.events())

    def release(self) -> None:
        """Collect, then empty torch's cache."""
        gc.collect()
        torch.cuda.empty_cache()

    def copy_rate(self) -> float:
        """Median of 20 copies of random data, far larger than the L2 cache."""
        source = torch.randn(COPY_BYTES // 4, device=self.torch_device)
        target = torch.empty_like(source)
        seconds = self._median(lambda: target.copy_(source))
        return 2 * COPY_BYTES / seconds

    def flop_rate(self) -> float:
        """Median of 20 products of random matrices, TF32 off."""
        a, b = (torch.randn(SGEMM_SIZE, SGEMM_SIZE, device=self.torch_device) for _ in range(2))
        out = torch.empty_like(a)
        seconds = self._median(lambda: torch.mm(a, b, out=out))
        return 2 * SGEMM_SIZE**3 / seconds

    def _median(self, call: Call) -> float:
        for _ in range(3):
            call()
        samples = torch.tensor([self.seconds(call) for _ in range(20)])
        return float(samples.median())


class CpuStandIn:
    """The CPU in the device's place, with backends that run there."""

    backends: tuple[str, ...] = ("cpp", "reference")
    state_dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    name = "dry run on the CPU"

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.compile_options: dict[str, Any] = {"backend": "eager"}
        self.graph_options = self.compile_options
        self.cache_bytes = machine.last_level_cache_bytes()

    def seconds(self, work: Call) -> float:
        """Wall-clock time."""
        return wall_seconds(work)

    def synchronize(self) -> None:
        """Nothing to wait for: calls are synchronous."""

    def capture(self, call: Call) -> Call:
        """The call itself."""
        return call

    def launches(self, call: Call) -> int:
        """Run the call; nothing is counted."""
        call()
        return 1

    def release(self) -> None:
        """Collect."""
        gc.collect()

    def copy_rate(self) -> float:
        """Copy rate of 4 MiB."""
        source = torch.randn(2**20)
        target = torch.empty_like(source)
        return 2 * 2**22 / self.seconds(lambda: target.copy_(source))

    def flop_rate(self) -> float:
        """FLOP/s of a small product."""
        return machine.sgemm_gflops(256) * 1e9
