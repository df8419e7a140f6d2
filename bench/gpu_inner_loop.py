"""The batched inner loop and inner_update on a GPU against their peers; bench.gpu calls it and writes what it finds.

A meta-iteration is all query losses and the backward of their mean. Peers: torch.func under torch.vmap, launch by
launch, and the same under torch.compile(mode="reduce-overhead"), which replays CUDA graphs. One update of a list of
tensors: against PyTorch's operators for lists and a compiled loop. All after a check that they compute the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu_contenders import largest_difference
from bench.gpu_device import Device, reason, time_limit
from bench.inner_loop_cases import Case, Set, sinusoid
from bench.inner_loop_contenders import Compiled, Contender, Fused, Vmap, iterate, results
from bench.timing import Calls, alternate
from bench.update_contenders import foreach, fused, loop, make_tensors

#: Largest relative difference to the first peer, in float32: sums over tasks and samples in another order.
AGREEMENT = 1e-3

#: How the public functions say that a backend has no kernels for the call.
ABSENT = "cannot run"

#: Meta-batches that a case rotates through.
BATCHES = 3


@dataclass(frozen=True)
class UpdateCase:
    """A list of tensors: weights and biases of a perceptron for T tasks."""

    tasks: int
    hidden: int
    layers: int
    clip_norm: float | None = None
    backward: bool = False

    @property
    def title(self) -> str:
        """The case in words."""
        what = "forward + backward" if self.backward else "forward"
        clipped = ", clipped" if self.clip_norm is not None else ""
        return f"{what}{clipped}, T = {self.tasks}, {self.layers} layers of {self.hidden}"


@dataclass(frozen=True)
class LoopPlan:
    """What a run measures, the most wanted cases first."""

    loops: tuple[Case, ...]
    updates: tuple[UpdateCase, ...]
    cell_seconds: float  # of timing
    compile_seconds: float  # at most, a contender
    min_rounds: int
    share: float  # of the budget of the whole run


FULL = LoopPlan(
    loops=(sinusoid(32), sinusoid(1024)),
    updates=(
        UpdateCase(32, 256, 4),
        UpdateCase(32, 256, 4, backward=True),
        UpdateCase(32, 256, 4, clip_norm=1.0),
        UpdateCase(25, 40, 3),
        UpdateCase(25, 40, 3, backward=True),
        UpdateCase(25, 40, 3, clip_norm=1.0),
    ),
    cell_seconds=1.5,
    compile_seconds=45.0,
    min_rounds=5,
    share=0.45,
)
DRY = LoopPlan(
    loops=(sinusoid(2, 2),),
    updates=(UpdateCase(2, 4, 2), UpdateCase(3, 4, 1, clip_norm=1.0, backward=True)),
    cell_seconds=0.05,
    compile_seconds=20.0,
    min_rounds=2,
    share=0.5,
)

#: Makes a contender's calls on several inputs, and one that returns fresh results on the first of them.
Make = Callable[[], tuple[Calls, Callable[[], list[Tensor]]]]


class Cell:
    """One case: contenders that run and agree, their calls, and why others are missing."""

    def __init__(self, title: str, device: Device, plan: LoopPlan) -> None:
        self.title, self.device, self.plan = title, device, plan
        self.calls: dict[str, Calls] = {}
        self.differences: dict[str, float] = {}
        self.unavailable: dict[str, str] = {}
        self.failed: list[str] = []
        self._ours: set[str] = set()
        self._expected: list[Tensor] = []

    def admit(self, name: str, make: Make, *, ours: bool) -> None:
        """Let a contender take part, unless it fails or computes something else than the first one."""
        try:
            with time_limit(self.plan.compile_seconds, "the first call"):
                calls, first = make()
                got = first()
            self._expected = self._expected or got
            self.differences[name] = largest_difference(got, self._expected, AGREEMENT)
            self.calls[name] = calls
            self._ours |= {name} if ours else set()
        except Exception as error:  # one contender less; the others are measured
            self.unavailable[name] = reason(error)
            print(f"  {name} is not measured: {reason(error)}", flush=True)
            absent = isinstance(error, RuntimeError) and ABSENT in str(error)
            if ours and not absent and not isinstance(error, torch.OutOfMemoryError):
                self.failed.append(name)
            self.device.release()

    def measure(self) -> dict[str, Any]:
        """Times and ratios."""
        times = alternate(
            self.calls,
            seconds=self.plan.cell_seconds,
            min_rounds=self.plan.min_rounds,
            clock=self.device.seconds,
        )
        peers = {name: entry["median_s"] for name, entry in times.items() if name not in self._ours}
        fastest = min(peers, key=peers.__getitem__, default=None)
        contenders: dict[str, dict[str, Any]] = {name: dict(entry) for name, entry in times.items()}
        for name in self._ours:
            speedups = {peer: seconds / times[name]["median_s"] for peer, seconds in peers.items()}
            contenders[name]["speedup"] = speedups
            contenders[name]["speedup_over_fastest_peer"] = None if fastest is None else speedups[fastest]
        return {
            "title": self.title,
            "fastest_peer": fastest,
            "contenders": contenders,
            "difference_from_the_first": self.differences,
            "unavailable": self.unavailable,
            "failed": self.failed,
        }


def on_device(batch: tuple[Set, Set], device: torch.device) -> tuple[Set, Set]:
    """Support and query sets there."""
    (x, y), (query_x, query_y) = batch
    return (x.to(device), y.to(device)), (query_x.to(device), query_y.to(device))


def make_loop(contender: Callable[[], Contender], batches: Sequence[tuple[Set, Set]]) -> tuple[Calls, Any]:
    """Meta-iterations of one contender, its model on the device of the data."""
    made = contender()
    made.model.to(batches[0][0][0].device)
    return [partial(iterate, made, batch) for batch in batches], lambda: results(made, batches[0])


def loop_cell(case: Case, device: Device, plan: LoopPlan, *, compiled: bool) -> Cell:
    """Who takes part in a meta-iteration; the first says what is right."""
    cell = Cell(case.title, device, plan)
    batches = [on_device(case.batch(seed), device.torch_device) for seed in range(BATCHES)]
    cell.admit("vmap", partial(make_loop, partial(Vmap, case), batches), ours=False)
    for backend in device.backends:
        cell.admit(backend, partial(make_loop, partial(Fused, case, backend=backend), batches), ours=True)
    if compiled:
        peer = partial(Compiled, case, **device.graph_options)
        cell.admit("compiled", partial(make_loop, peer, batches), ours=False)
    return cell


def update_cell(case: UpdateCase, device: Device, plan: LoopPlan, *, compiled: bool) -> Cell:
    """Who takes part in an update of a list of tensors."""
    cell = Cell(case.title, device, plan)
    size = case.tasks, case.hidden, case.layers
    params, grads, cotangents = (make_tensors(*size, seed, device.torch_device) for seed in range(3))
    leaves = [x.requires_grad_(case.backward) for x in (*params, *grads)]

    def make(update: Any) -> tuple[Calls, Callable[[], list[Tensor]]]:
        def call() -> Sequence[Tensor]:
            updated: list[Tensor] = update(params, grads, case.clip_norm)
            return torch.autograd.grad(updated, leaves, cotangents) if case.backward else updated

        return [call], lambda: [x.detach().clone() for x in call()]

    cell.admit("foreach", partial(make, foreach), ours=False)
    for backend in device.backends:
        cell.admit(backend, partial(make, fused(backend)), ours=True)
    if compiled:
        peer = torch.compile(loop, fullgraph=True, dynamic=False, **device.graph_options)
        cell.admit("compiled", partial(make, peer), ours=False)
    return cell


def measure(device: Device, plan: LoopPlan, seconds: float, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All cases that fit ``seconds``; the compiled peer where its time is left over. ``write`` gets every state."""
    start = time.monotonic()
    found: dict[str, Any] = {"inner_loop": [], "inner_update": [], "skipped": {}}
    jobs: list[tuple[str, str, Callable[..., Cell]]] = [
        *(("inner_loop", case.title, partial(loop_cell, case)) for case in plan.loops),
        *(("inner_update", case.title, partial(update_cell, case)) for case in plan.updates),
    ]
    for index, (key, title, make) in enumerate(jobs):
        left = seconds - (time.monotonic() - start)
        print(f"{key}, {title}: {left:.0f} s left", flush=True)
        needed = 2 * plan.cell_seconds
        if left < needed and index:
            found["skipped"][title] = f"{left:.0f} s of {seconds:.0f} were left"
            continue
        compiled = left >= needed * (len(jobs) - index) + plan.compile_seconds
        if not compiled:
            found["skipped"][f"compiled, {title}"] = f"{left:.0f} s of {seconds:.0f} were left"
        torch._dynamo.reset()  # every case is compiled for itself
        try:
            found[key].append(make(device, plan, compiled=compiled).measure())
        except torch.OutOfMemoryError as error:
            found["skipped"][title] = reason(error)
        device.release()
        write(found)
    return found


def table(found: dict[str, Any]) -> str:
    """A line a contender: microseconds, and how many times as long the fastest peer takes."""
    lines = []
    for key in ("inner_loop", "inner_update"):
        for cell in found[key]:
            lines.append(f"{key}, {cell['title']}")
            for name, entry in cell["contenders"].items():
                ratio = entry.get("speedup_over_fastest_peer")
                against = "" if ratio is None else f"  {ratio:.2f}x the fastest peer, {cell['fastest_peer']}"
                lines.append(f"  {name:12} {entry['median_s'] * 1e6:12.1f} us{against}")
            lines += [f"  {name:12} not measured: {why}" for name, why in cell["unavailable"].items()]
    return "\n".join([*lines, *(f"not measured: {name}: {why}" for name, why in found["skipped"].items())])


def failures(found: dict[str, Any]) -> list[str]:
    """Our own contenders that failed; a backend that is absent has not."""
    cells = [*found["inner_loop"], *found["inner_update"]]
    return [f"{cell['title']}: {name}" for cell in cells for name in cell["failed"]]
