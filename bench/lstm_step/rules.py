"""RNNProp and Meta-LSTM against lstm_step of the same sizes, and against plain PyTorch; JSON to bench/results.

python -m bench.lstm_step.rules            the measurement (two minutes)
python -m bench.lstm_step.rules --quick    smoke test: small sizes, nothing written
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils import _pytree as pytree

from bench.peers import largest_error
from bench.runs import (
    Advance,
    Job,
    Output,
    Quick,
    Threads,
    default_output,
    describe_run,
    run_jobs,
    show_targets,
    start,
    write,
)
from bench.targets import judged
from bench.timing import Calls, alternate
from metakern.rules import CoordinatewiseLSTM, MetaLSTM, RNNProp, Rule

#: Largest time of a rule as a multiple of that of lstm_step with the same layers and units.
MULTIPLE = 1.3

OPS = ("forward", "forward_backward")

#: Rules, each with the rule on lstm_step of the same sizes.
RULES: dict[str, tuple[Callable[[], Rule], Callable[[], Rule]]] = {
    "RNNProp": (lambda: RNNProp(backend="cpp"), lambda: CoordinatewiseLSTM(20, 2, backend="cpp")),
    "Meta-LSTM": (lambda: MetaLSTM(backend="cpp"), lambda: CoordinatewiseLSTM(20, 1, backend="cpp")),
}


@dataclass(frozen=True)
class Plan:
    """Cells and budgets of a run."""

    sizes: tuple[int, ...]
    seconds: float  # per cell
    min_rounds: int


FULL = Plan((10**4, 10**5), 15.0, 9)
QUICK = Plan((1000,), 0.1, 2)


@dataclass
class Problem:
    """A step of one rule on random inputs: a state as two steps leave it."""

    rule: Rule
    params: Tensor
    grads: Tensor
    loss: Tensor
    state: Any

    @classmethod
    def make(cls, rule: Rule, n: int) -> Problem:
        """N coordinates; the same numbers for every rule."""
        generator = torch.Generator().manual_seed(0)
        params, grads, loss = (torch.randn(size, generator=generator) for size in ((n,), (n,), ()))
        problem = cls(rule, params, grads, loss.exp(), rule.init_state(params))
        with torch.no_grad():
            for _ in range(2):
                problem.params, problem.state = problem.step()
        return problem

    def step(self) -> tuple[Tensor, Any]:
        """The step."""
        result: tuple[Tensor, Any] = self.rule(self.params, self.grads, self.state, loss=self.loss)
        return result

    def forward(self) -> tuple[Tensor, Any]:
        """The step without a graph."""
        with torch.no_grad():
            return self.step()

    def forward_backward(self) -> tuple[Tensor, ...]:
        """Gradients of params, state and every weight."""
        own = [x for x in pytree.tree_leaves(self.state) if isinstance(x, Tensor)]
        leaves = [self.params, *own, *self.rule.parameters()]
        for leaf in leaves:
            leaf.requires_grad_()
        new = [x for x in pytree.tree_leaves(self.step()) if isinstance(x, Tensor)]
        return torch.autograd.grad(new, leaves, new)

    def kept_bytes(self) -> int:
        """Bytes that a step keeps for its backward, the rule's weights not counted."""
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            if x.numel() >= self.params.numel():
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            kept = self.step()
        del kept
        return sum(sizes.values())


def measure_cell(name: str, n: int, plan: Plan, advance: Advance) -> dict[str, Any]:
    """Times of one rule, of lstm_step and of plain PyTorch, and the bytes that they keep."""
    torch.manual_seed(0)
    rule, base = (make() for make in RULES[name])
    plain = rule.plain()
    assert plain is not None
    problems = {kind: Problem.make(each, n) for kind, each in (("rule", rule), ("lstm_step", base), ("eager", plain))}
    agreement = {kind: [problems[kind].forward()[0]] for kind in ("rule", "eager")}
    error = largest_error(agreement)
    cell: dict[str, Any] = {"rule": name, "n": n, "max_relative_difference": error, "ops": {}}
    for index, op in enumerate(OPS):
        calls: dict[str, Calls] = {kind: [getattr(problem, op)] for kind, problem in problems.items()}
        done = partial(_share, advance, index)
        # Without plain PyTorch in turn: its gigabytes leave the next contender with cold caches and freed memory.
        pair = {kind: calls[kind] for kind in ("rule", "lstm_step")}
        times = alternate(pair, seconds=plan.seconds, min_rounds=plan.min_rounds, progress=done)
        ours = times["rule"]
        times |= alternate({"eager": calls["eager"]}, seconds=plan.seconds / 2, min_rounds=plan.min_rounds)
        cell["ops"][op] = {
            **{kind: {**time, "ns_per_coordinate": time["median_s"] / n * 1e9} for kind, time in times.items()},
            "multiple_of_lstm_step": ours["median_s"] / times["lstm_step"]["median_s"],
            "multiple_of_lstm_step_by_minima": ours["min_s"] / times["lstm_step"]["min_s"],
            "speedup_over_eager": times["eager"]["median_s"] / ours["median_s"],
        }
    cell["kept_bytes_per_coordinate"] = {kind: problem.kept_bytes() / n for kind, problem in problems.items()}
    return cell


def _share(advance: Advance, index: int, share: float) -> None:
    advance((index + share) / len(OPS))


def judge(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether the rules are as fast as they must be."""
    return [
        judged(
            "must",
            f"{cell['rule']}, {op.replace('_', ' + ')} against lstm_step, N = {cell['n']:,}",
            "≤",
            MULTIPLE,
            cell["ops"][op]["multiple_of_lstm_step"],
            "x",
        )
        for cell in cells
        for op in OPS
        if cell["n"] == max(FULL.sizes)
    ]


def show(cells: list[dict[str, Any]], console: Console) -> None:
    """A table of times, ns a coordinate."""
    table = Table(title="rules on lstm_step's kernels: ns per coordinate, median")
    for column in (
        "rule",
        "op",
        "N",
        "rule",
        "lstm_step",
        "eager",
        "x lstm_step",
        "by minima",
        "eager /",
        "kept bytes",
    ):
        table.add_column(column, justify="right")
    for cell in cells:
        for op, found in cell["ops"].items():
            times = [f"{found[kind]['ns_per_coordinate']:.0f}" for kind in ("rule", "lstm_step", "eager")]
            multiples = (found[f"multiple_of_lstm_step{suffix}"] for suffix in ("", "_by_minima"))
            ratios = [*(f"{multiple:.2f}" for multiple in multiples), f"{found['speedup_over_eager']:.1f}"]
            kept = f"{cell['kept_bytes_per_coordinate']['rule']:.0f}"
            table.add_row(cell["rule"], op, f"{cell['n']:,}", *times, *ratios, kept)
    console.print(table)


def main(
    quick: Quick = False,
    threads: Threads = 2,
    seconds: Annotated[float, typer.Option(min=0.01, help="Budget of one rule, size and operation.")] = FULL.seconds,
    output: Output = None,
) -> None:
    """Measure RNNProp and Meta-LSTM against lstm_step and plain PyTorch."""
    console = start(threads)
    plan = QUICK if quick else replace(FULL, seconds=seconds)
    jobs: dict[str, Job] = {
        f"{name}, N = {n:,}": partial(measure_cell, name, n, plan) for n in plan.sizes for name in RULES
    }
    cells = run_jobs(jobs, console)
    targets = judge(cells)
    show(cells, console)
    show_targets(targets, console)
    results = describe_run("lstm_step_rules", "bench.lstm_step.rules")
    write(results | {"cells": cells, "targets": targets}, output or default_output("rules", quick), console)


if __name__ == "__main__":
    typer.run(main)
