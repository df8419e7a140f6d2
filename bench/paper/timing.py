"""Seconds, memory and profile of a meta-iteration in every way.

python -m bench.paper.timing                 2 threads, this process's instruction set (minutes, some of them compiling)
python -m bench.paper.timing --quick         smoke test: few tasks, nothing compiled, nothing written
python -m bench.paper.timing --rule lstm     one rule; the other's results stay in the file
python -m bench.paper.timing --device cuda   on a GPU

Contenders take turns in one process, after their meta-losses and meta-gradients were compared. Results go to
build/paper/timing-<instruction set>.json, from which bench.paper.report makes bench/results/paper.json.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import machine
from bench.paper.clock import Clock
from bench.paper.contenders import OPTIONAL, WAYS
from bench.paper.learning import RULES
from bench.paper.tasks import TRAINING, balanced
from bench.processes import in_subprocess, peak_bytes
from bench.runs import Advance, Job, describe_run, run_jobs, write
from bench.timing import alternate
from metakern.inner_loop.updates import RuleUpdate
from metakern.learners.unroll import Unrolled

#: Folder of parts of the results.
PARTS = Path(__file__).parent.parent.parent / "build" / "paper"

#: Largest relative difference of meta-losses, and of meta-gradients in norm, from metakern's: float32 rounding.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Plan:
    """Size of a run."""

    tasks: int  # of each kind
    steps: int
    seconds: float  # of timing a rule, without compilation
    rounds: int  # at least
    compiled: bool
    memory: bool


FULL = Plan(8, 20, 60.0, 5, True, True)
QUICK = Plan(1, 2, 0.1, 1, False, False)
ON_GPU = Plan(4, 10, 8.0, 3, False, False)


def sample(plan: Plan, device: str = "cpu") -> Any:
    """The tasks, the same ones in every call."""
    return balanced(TRAINING, "train", plan.tasks, torch.Generator().manual_seed(0)).to(device)


def new_way(name: str, rule_name: str, plan: Plan, device: str = "cpu") -> Any:
    """A contender; all have the same weights."""
    torch.manual_seed(0)
    return WAYS[name](RULES[rule_name]().to(device), plan.steps, Clock())


def result(way: Any, plan: Plan, device: str = "cpu") -> list[Tensor]:
    """Meta-losses [T] and the meta-gradient as a vector, on the same draws for every way."""
    losses = way(sample(plan, device))
    gradient = torch.cat([torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten() for w in way.weights()])
    for weight in way.weights():
        weight.grad = None
    return [losses, gradient]


def differences(found: Mapping[str, list[Tensor]], subject: str) -> dict[str, dict[str, float]]:
    """Relative differences of every way from ``subject``.

    Raises:
        ArithmeticError: above :data:`TOLERANCE`, and for NaN
    """
    losses, gradient = found[subject]
    differ = {}
    for name, (own_losses, own) in found.items():
        entry = {
            "losses": float((own_losses - losses).abs().max() / losses.abs().max()),
            "gradient": float((own - gradient).norm() / gradient.norm()),
        }
        if not max(entry.values()) <= TOLERANCE:
            raise ArithmeticError(f"{name} differs from {subject} by {entry}, allowed are {TOLERANCE:g}")
        differ[name] = entry
    return differ


def measure_rule(rule_name: str, plan: Plan, device: str, advance: Advance) -> dict[str, Any]:
    """All ways of one rule: first results, differences, times, profile, memory."""
    ways, found, first, missing = {}, {}, {}, {}
    for name in WAYS:
        if name in OPTIONAL and not plan.compiled:
            continue
        began = time.perf_counter()
        try:
            ways[name] = new_way(name, rule_name, plan, device)
            found[name] = result(ways[name], plan, device)
        except Exception as error:
            if name not in OPTIONAL:
                raise
            del ways[name]
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        first[name] = time.perf_counter() - began
    differ = differences(found, "metakern")
    batches = {name: sample(plan, device) for name in ways}
    calls = {name: [partial(_synchronised, way, batches[name], device)] for name, way in ways.items()}
    times = alternate(calls, seconds=plan.seconds, min_rounds=plan.rounds, progress=advance)
    tasks = batches["metakern"].num_tasks
    entry = {
        "tasks": tasks,
        "coordinates": coordinates(batches["metakern"]),
        "differences": differ,
        "first_result_s": first,
        "missing": missing,
        "contenders": {
            name: {**figures, "tasks_per_second": tasks / figures["median_s"]} for name, figures in times.items()
        },
        "speedup": ratios(times, "metakern"),
        "profile": {name: profile(way, batches[name], device) for name, way in ways.items()},
    }
    if plan.memory:
        entry["peak_bytes"] = {
            name: in_subprocess("bench.paper.timing_memory", rule_name, name)["peak_bytes"] for name in ways
        }
    return entry


def coordinates(batch: Any) -> int:
    """Coordinates of all tasks."""
    return sum(p.numel() for group in batch.select(slice(None)).init_params() for p in group.values())


def ratios(times: Mapping[str, Mapping[str, float]], subject: str) -> dict[str, dict[str, float]]:
    """How many times as long as ``subject`` the others take: of medians, and from the quantiles that favour either."""
    own = times[subject]
    return {
        name: {
            "median": other["median_s"] / own["median_s"],
            "low": other["q20_s"] / own["q80_s"],
            "high": other["q80_s"] / own["q20_s"],
        }
        for name, other in times.items()
        if name != subject
    }


def _synchronised(way: Callable[[Any], Tensor], batch: Any, device: str) -> None:
    way(batch)
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def clocked(way: Any) -> Iterator[None]:
    """Let the clock of a way on metakern see where its RuleLearner spends time; the other ways use it themselves."""

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with way.clock(name):
                return function(*args, **kwargs)

        return call

    if not hasattr(way, "learner"):
        yield
        return
    with (
        mock.patch.object(Unrolled, "gradients", timed(Unrolled.gradients, "optimizee")),
        mock.patch.object(RuleUpdate, "step", timed(RuleUpdate.step, "rule")),
        mock.patch.object(RuleUpdate, "init_state", timed(RuleUpdate.init_state, "start")),
    ):
        yield


def profile(way: Any, batch: Any, device: str, repeats: int = 3) -> dict[str, float]:
    """Shares of a meta-iteration: optimizee (its forward and gradient), rule, meta-backward, start and rest.

    In the ways on plain PyTorch the meta-backward also goes through the losses again. On a GPU and in the compiled way
    only launches would be timed, so there is none.
    """
    if device == "cuda" or type(way).__name__ == "Compiled":
        return {}
    shares: list[dict[str, float]] = []
    with clocked(way):
        for _ in range(repeats):
            way.clock.start()
            began = time.perf_counter()
            way(batch)
            total = time.perf_counter() - began
            way.clock.running = False
            shares.append({"seconds": total, **{name: s / total for name, s in way.clock.seconds.items()}})
    best = min(shares, key=lambda share: share["seconds"])
    return best | {"rest": 1 - sum(share for name, share in best.items() if name != "seconds")}


def peak(rule_name: str, way_name: str, plan: Plan = FULL) -> int:
    """Additional peak memory of a meta-iteration in this process, after a warm-up on one task of each kind."""
    way, batch = new_way(way_name, rule_name, plan), sample(plan)
    if way_name not in OPTIONAL:
        way(batch.select(slice(0, None, plan.tasks)))
    else:
        way(batch)  # the first call compiles
    return peak_bytes(lambda: way(batch))[0]


def default_output() -> Path:
    """The file of this process's instruction set."""
    return PARTS / f"timing-{machine.capability()}.json"


def show(results: dict[str, Any], console: Console) -> None:
    """A table of every rule."""
    for rule, entry in results["rules"].items():
        table = Table(title=f"{rule}: a meta-iteration of {entry['tasks']} tasks, {results['steps']} steps")
        for column in ("way", "seconds", "tasks a second", "metakern is faster by", "optimizee", "rule", "backward"):
            table.add_column(column, justify="left" if column == "way" else "right")
        for name, times in entry["contenders"].items():
            ratio, shares = entry["speedup"].get(name), entry["profile"].get(name, {})
            faster = "" if ratio is None else f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
            parts = [f"{shares[p]:.0%}" if p in shares else "" for p in ("optimizee", "rule", "backward")]
            table.add_row(name, f"{times['median_s']:.3f}", f"{times['tasks_per_second']:.0f}", faster, *parts)
        console.print(table)
        for name, reason in entry["missing"].items():
            console.print(f"{name} is missing: {reason}")


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Few tasks, nothing compiled, nothing written.")] = False,
    rule: Annotated[list[str] | None, typer.Option(help="Of these rules alone: lstm, hrnn.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every contender.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    compiled: Annotated[bool, typer.Option(help="Also torch.compile, which compiles for minutes.")] = True,
    output: Annotated[Path | None, typer.Option(help="JSON to write; default in build/paper.")] = None,
) -> None:
    """Time a meta-iteration in every way."""
    console = Console()
    torch.set_num_threads(threads)
    plan = QUICK if quick else ON_GPU if device == "cuda" else FULL
    plan = plan if compiled else replace(plan, compiled=False)
    chosen = rule or list(RULES)
    if unknown := set(chosen) - RULES.keys():
        raise typer.BadParameter(f"rule must be one of {', '.join(RULES)}, got {', '.join(sorted(unknown))}")
    output = output if quick or output else default_output()
    kept = json.loads(output.read_text())["rules"] if output and output.exists() and not quick else {}
    jobs: dict[str, Job] = {name: partial(measure_rule, name, plan, device) for name in chosen}
    rules = kept | dict(zip(chosen, run_jobs(jobs, console), strict=True))
    settings = {"steps": plan.steps, "tasks_of_a_kind": plan.tasks, "kinds": list(TRAINING), "tolerance": TOLERANCE}
    described = describe_run("paper", "bench.paper.timing") if device == "cpu" else {"device": device}
    results = described | settings | {"rules": {name: rules[name] for name in RULES if name in rules}}
    show(results, console)
    write(results, output, console)


if __name__ == "__main__":
    typer.run(main)
