"""lstm_step on a GPU against its peers; bench.gpu runs it and writes the results.

Peers: eager PyTorch, nn.LSTM (cuDNN, in float32 and with its default, TF32) and torch.compile(mode="max-autotune") of
the eager step, after a check that all compute the same; all but the compiled step, which captures graphs of its own,
also as one CUDA graph that runs the call on every set of inputs. Consecutive calls take consecutive sets, together
larger than the L2 cache at N >= 1e5.

The memory floor of a cell is the bytes that a step must move, over the rate of a large copy measured in the same run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu_device import Device, reason, time_limit
from bench.lstm_step.contenders import Problem, make_rule
from bench.lstm_step.gpu_contenders import GpuContender, Inputs, make_contenders, results
from bench.lstm_step.gpu_stages import CELLS as CELLS  # bench.gpu_cells finds them here
from bench.lstm_step.work import (
    BACKWARD_FORWARDS,
    HIDDEN,
    LAYERS,
    backward_bytes_per_coordinate,
    bytes_per_coordinate,
    flops_per_coordinate,
)
from bench.peers import largest_difference
from bench.timing import Calls, alternate, quantiles

OPS = {"forward": False, "forward_backward": True}

#: Maximum number of input sets of a cell; four at N = 1e5 exceed an L2 cache of 60 MB.
MIN_SETS, MAX_SETS = 2, 4

#: Overhead of a cell in seconds, without a compiled peer: inputs, agreement, graphs.
RESERVE = 5.0


@dataclass(frozen=True)
class Plan:
    """Cells of a run, the most important first."""

    cells: tuple[tuple[str, int], ...]
    compiled: tuple[tuple[str, int], ...]  # cells with the compiled peer, if time remains for its minute of compilation
    compile_seconds: float  # at most, per cell
    cell_seconds: float  # of timing; a third of it again for the graphs
    min_rounds: int
    largest_graph: int  # N above which launch costs are negligible
    host_n: int
    host_rounds: int


FULL = Plan(
    cells=(
        ("forward", 10**6),
        ("forward_backward", 10**6),
        ("forward", 10**7),
        ("forward", 10**4),
        ("forward_backward", 10**7),
        ("forward_backward", 10**5),
        ("forward", 10**5),
        ("forward_backward", 10**4),
    ),
    compiled=(("forward", 10**6), ("forward_backward", 10**6), ("forward", 10**4)),
    compile_seconds=60.0,
    cell_seconds=3.0,
    min_rounds=5,
    largest_graph=10**6,
    host_n=10**4,
    host_rounds=15,
)
DRY = Plan(
    cells=(("forward", 100), ("forward_backward", 70)),
    compiled=(("forward", 100), ("forward_backward", 70)),
    compile_seconds=20.0,
    cell_seconds=0.05,
    min_rounds=2,
    largest_graph=100,
    host_n=100,
    host_rounds=1,
)


@dataclass(frozen=True)
class Ceilings:
    """Measured peak rates of the device: bytes and float32 FLOPs per second."""

    bytes_per_second: float
    flops_per_second: float


def bytes_of(op: str, state_bytes: int) -> int:
    """Bytes that one coordinate's step must move."""
    forward = bytes_per_coordinate(state_bytes)
    return forward + backward_bytes_per_coordinate(state_bytes) * OPS[op]


def count_sets(n: int, device: Device) -> int:
    """Number of input sets, so that float32 states exceed twice the cache if :data:`MAX_SETS` allows."""
    return min(MAX_SETS, max(MIN_SETS, math.ceil(2 * device.cache_bytes / (n * bytes_per_coordinate() / 2))))


class Cell:
    """One operation at one size: contenders that run and agree, their calls, and why others are missing."""

    def __init__(self, op: str, n: int, device: Device, plan: Plan, *, compiled: bool) -> None:
        self.op, self.n, self.device, self.plan = op, n, device, plan
        rule = make_rule(HIDDEN, LAYERS).to(device.torch_device)
        self.sets = count_sets(n, device) if n <= plan.largest_graph else 1
        inputs = [Inputs(rule, n, seed, device.torch_device, backward=OPS[op]) for seed in range(self.sets)]
        self.contenders: dict[str, GpuContender] = {}
        self.problems: dict[str, list[Problem]] = {}
        self.differences: dict[str, float] = {}
        self.unavailable: dict[str, str] = {}
        self.failed: list[str] = []
        self._expected: list[torch.Tensor] = []
        for contender in make_contenders(rule, device, compiled=compiled):
            try:
                self._admit(contender, inputs)
            except Exception as error:  # skip this contender, measure the others
                self._refuse(contender, error)
        self._expected = []
        device.release()

    def _admit(self, contender: GpuContender, inputs: Sequence[Inputs]) -> None:
        problems, backward = [each.problem(contender) for each in inputs], OPS[self.op]
        with time_limit(self.plan.compile_seconds, "the first call"):
            got = results(problems[0], contender, backward=backward)
        if not self._expected:
            self._expected = got
        difference = largest_difference(got, self._expected, contender.agreement[backward])
        self.differences[contender.name] = difference
        self.contenders[contender.name], self.problems[contender.name] = contender, problems

    def _refuse(self, contender: GpuContender, error: Exception) -> None:
        self.unavailable[contender.name] = reason(error)
        print(f"  {contender.name} is not measured: {reason(error)}", flush=True)
        if contender.ours and not isinstance(error, torch.OutOfMemoryError):
            self.failed.append(contender.name)
        self.device.release()

    def time_calls(self) -> dict[str, dict[str, float]]:
        """Seconds of a call, by contender."""
        calls: dict[str, Calls] = {
            name: [getattr(p, self.op) for p in problems] for name, problems in self.problems.items()
        }
        return self._alternate(calls, self.plan.cell_seconds)

    def time_graphs(self) -> dict[str, dict[str, float]]:
        """Seconds of a call inside a graph that runs all sets of inputs, by contender."""
        if self.n > self.plan.largest_graph:
            return {}
        graphs: dict[str, Calls] = {}
        for name, problems in self.problems.items():
            if name == "compiled":
                continue

            def all_sets(problems: list[Problem] = problems) -> None:
                for problem in problems:
                    getattr(problem, self.op)()

            try:
                graphs[name] = [self.device.capture(all_sets)]
            except Exception as error:  # a peer that cannot be captured has no graph figure
                self.unavailable[f"{name} graph"] = reason(error)
                if self.contenders[name].ours:
                    self.failed.append(f"{name} graph")
        times = self._alternate(graphs, self.plan.cell_seconds / 3)
        return {
            name: {key: value / self.sets if key.endswith("_s") else value for key, value in time.items()}
            for name, time in times.items()
        }

    def _alternate(self, calls: Mapping[str, Calls], seconds: float) -> dict[str, dict[str, float]]:
        return alternate(calls, seconds=seconds, min_rounds=self.plan.min_rounds, clock=self.device.seconds)


def measure_cell(cell: Cell, ceilings: Ceilings) -> dict[str, Any]:
    """Measure times, ratios and shares of the memory floor of one cell."""
    op, n = cell.op, cell.n
    calls, graphs = cell.time_calls(), cell.time_graphs()
    peers = {name: time["median_s"] for name, time in calls.items() if not cell.contenders[name].ours}
    peers |= {f"{name} graph": t["median_s"] for name, t in graphs.items() if not cell.contenders[name].ours}
    fastest = min(peers, key=peers.__getitem__) if peers else None
    flops = flops_per_coordinate() * (1 + BACKWARD_FORWARDS * OPS[op])

    def entry(name: str, time: dict[str, float]) -> dict[str, Any]:
        contender, seconds = cell.contenders[name], time["median_s"]
        size = bytes_of(op, contender.state_bytes)
        floor = n * size / ceilings.bytes_per_second
        result: dict[str, Any] = {
            **time,
            "ns_per_coordinate": seconds / n * 1e9,
            "bytes_per_coordinate": size,
            "gigabytes_per_second": n * size / seconds / 1e9,
            "memory_floor_ns": floor / n * 1e9,
            "multiple_of_memory_floor": seconds / floor,
            "share_of_memory_floor": floor / seconds,
            "teraflops": n * flops / seconds / 1e12,
        }
        if contender.ours and fastest is not None:
            result["speedup_over_fastest_peer"] = peers[fastest] / seconds
            result["speedup_over_eager"] = peers["eager"] / seconds if "eager" in peers else None
        return result

    return {
        "op": op,
        "n": n,
        "input_sets": cell.sets,
        "inputs_exceed_cache": cell.sets * n * bytes_per_coordinate() / 2 > cell.device.cache_bytes,
        "flops_per_coordinate": flops,
        "fastest_peer": fastest,
        "contenders": {name: entry(name, time) for name, time in calls.items()},
        "graphs": {name: entry(name, time) for name, time in graphs.items()},
        "difference_from_eager": cell.differences,
        "unavailable": cell.unavailable,
        "failed": cell.failed,
    }


def measure_host(device: Device, plan: Plan) -> dict[str, Any]:
    """Host microseconds per forward call, and the number of kernels it launches."""
    rule = make_rule(HIDDEN, LAYERS).to(device.torch_device)
    inputs = Inputs(rule, plan.host_n, 0, device.torch_device, backward=False)
    microseconds, launches, unavailable = {}, {}, {}
    for contender in make_contenders(rule, device, compiled=False):
        call = inputs.problem(contender).forward
        try:
            launches[contender.name] = device.launches(call)
            samples = []
            for _ in range(plan.host_rounds):
                device.synchronize()
                start = time.perf_counter()
                for _ in range(20):  # few enough for the launch queue
                    call()
                samples.append((time.perf_counter() - start) / 20)
            device.synchronize()
            microseconds[contender.name] = quantiles(samples)["median_s"] * 1e6
        except Exception as error:  # the cells report failures
            unavailable[contender.name] = reason(error)
    return {"n": plan.host_n, "microseconds": microseconds, "launches": launches, "unavailable": unavailable}


def measure(
    device: Device,
    plan: Plan,
    ceilings: Ceilings,
    found: dict[str, Any],
    seconds: float,
    write: Callable[[dict[str, Any]], None],
) -> None:
    """Measure cells that fit ``seconds`` into ``found``; calls ``write`` after every cell so that none is lost."""
    start = time.monotonic()
    for index, (op, n) in enumerate(plan.cells):
        name, left = f"{op}, N = {n:,}", seconds - (time.monotonic() - start)
        print(f"{name}: {left:.0f} s left", flush=True)
        needed = plan.cell_seconds * 4 / 3 + RESERVE
        if left < needed and found["cells"]:
            found["skipped"][name] = f"{left:.0f} s of {seconds:.0f} were left"
            continue
        compiled = (op, n) in plan.compiled
        if compiled and left < needed * (len(plan.cells) - index) + plan.compile_seconds:
            found["skipped"][f"compiled, {name}"] = f"{left:.0f} s of {seconds:.0f} were left"
            compiled = False
        torch._dynamo.reset()  # every size is compiled separately
        try:
            found["cells"].append(measure_cell(Cell(op, n, device, plan, compiled=compiled), ceilings))
        except torch.OutOfMemoryError as error:
            found["skipped"][name] = f"out of memory: {error}".splitlines()[0]
        device.release()
        write(found)


def table(found: dict[str, Any]) -> str:
    """Table of contenders by cells: nanoseconds per coordinate and, in brackets, multiples of the memory floor."""
    forms = {"": "contenders", " graph": "graphs"}
    names = list(dict.fromkeys(n + form for form, key in forms.items() for cell in found["cells"] for n in cell[key]))
    short = {"forward": "fwd", "forward_backward": "fwd+bwd"}
    heads = [f"{short[cell['op']]} {cell['n']:.0e}".replace("e+0", "e") for cell in found["cells"]]
    lines = [f"{'ns a coordinate (x floor)':28}" + "".join(head.rjust(17) for head in heads)]
    for name in names:
        form = " graph" if name.endswith(" graph") else ""
        entries = [cell[forms[form]].get(name.removesuffix(" graph")) for cell in found["cells"]]
        figures = [f"{e['ns_per_coordinate']:.3g} ({e['multiple_of_memory_floor']:.2g})" if e else "-" for e in entries]
        lines.append(f"{name:28}" + "".join(figure.rjust(17) for figure in figures))
    return "\n".join(lines)
