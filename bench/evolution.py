"""Cost and variance of evolution strategies.

python -m bench.evolution            a truncation of T pairs against two forward unrolls of T problems (minutes)
python -m bench.evolution --quick    smoke test: few problems, nothing written (seconds)

Cost: one estimate of "pes" (T antithetic pairs, with perturbed weights, restarts and new problems) against twice the
unroll that it needs at least: T problems solved by the unperturbed rule in one launch a step, without any graph. The
two take turns. The ratio is that of the medians; restarts make some truncations longer than others.
Variance: that of one pair's estimate for each estimator, on a quadratic solved by gradient descent whose rate is
learned, where the gradient of the whole episode is known. Results go to bench/results/<device>-evolution.json.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench import machine
from bench.runs import RESULTS, Advance, Job, describe_run, run_jobs, write
from bench.targets import judged
from bench.timing import alternate
from metakern.inner_loop.loop import InnerLoop
from metakern.inner_loop.updates import RuleUpdate
from metakern.learners import RuleLearner
from metakern.learners.estimators import STRATEGIES
from metakern.learners.unroll import Optimized
from metakern.rules import make
from metakern.tasks import DigitsCNN, DigitsMLP, Quadratics, toy_problems

#: Steps of a truncation.
UNROLL = 20

PROBLEMS: dict[str, Callable[[], Any]] = {
    "digits": DigitsMLP,
    "digits-cnn": DigitsCNN,
    "quadratics": Quadratics,
    "mixed": toy_problems,
}

RULES = (
    "coordinatewise-lstm", "rnnprop", "meta-lstm", "hierarchical-rnn", "small-fc-lopt", "adam", "momentum", "sgd"
)  # fmt: skip

#: Rule, problem, number of problems.
CELLS = (
    *((rule, "digits", 8) for rule in RULES),
    ("coordinatewise-lstm", "digits", 32),
    ("coordinatewise-lstm", "digits-cnn", 8),
    *((rule, "quadratics", 8) for rule in ("coordinatewise-lstm", "hierarchical-rnn", "adam")),
    *((rule, "mixed", 16) for rule in ("coordinatewise-lstm", "hierarchical-rnn", "small-fc-lopt", "adam")),
)
QUICK = (("coordinatewise-lstm", "digits", 2), ("adam", "quadratics", 2))

#: Most that a truncation of pairs may cost, in two forward unrolls.
TARGET = 1.2


def measure_cost(rule_name: str, problem: str, tasks: int, seconds: float, advance: Advance) -> dict[str, Any]:
    """Times of an estimate and of a forward unroll."""
    torch.manual_seed(0)
    rule, problems = make(rule_name, learned=True), PROBLEMS[problem]()
    learner = RuleLearner(rule, steps=5 * UNROLL, unroll=UNROLL, estimator="pes")
    batches = itertools.cycle([problems.sample(tasks, torch.Generator().manual_seed(seed)) for seed in range(8)])
    update, loop = RuleUpdate(rule), InnerLoop(RuleUpdate(rule), [True] * UNROLL)

    def estimate() -> None:
        for losses in learner.meta_losses(next(batches)):
            losses.mean().backward()

    @torch.no_grad()
    def forward() -> None:
        batch = next(batches)
        params = batch.init_params()
        loop.run(Optimized(batch), params, update.init_state(params))

    estimate()
    times = alternate({"pes": [estimate], "forward": [forward]}, seconds=seconds, min_rounds=5, progress=advance)
    ratio, of_minima = (times["pes"][of] / (2 * times["forward"][of]) for of in ("median_s", "min_s"))
    cell = {"rule": rule_name, "problem": problem, "tasks": tasks, "contenders": times}
    return cell | {"over_two_forward": ratio, "minima_over_two_forward": of_minima}


class _Rate(nn.Module):
    """Gradient descent with one learned rate."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.02))

    def init_state(self, params: Any) -> tuple[()]:
        return ()

    def forward(self, params: Any, grads: Any, state: tuple[()]) -> tuple[Any, tuple[()]]:
        return {name: p - self.rate * grads[name] for name, p in params.items()}, state


def measure_variance(estimator: str, truncations: int, advance: Advance) -> dict[str, Any]:
    """Mean and variance of one pair's estimate over many truncations; the same problems for every estimator."""
    learner = RuleLearner(_Rate(), steps=100, unroll=10, objective="log", estimator=estimator)
    found: list[Tensor] = []
    for seed in range(truncations):
        assert learner.pairs is not None
        batch = Quadratics(5).sample(16, torch.Generator().manual_seed(seed))
        found.append(learner.pairs.estimate(learner.rule, batch)[1].flatten())
        advance((seed + 1) / truncations)
    samples = torch.cat(found).double()
    return {"estimator": estimator, "mean": samples.mean().item(), "variance": samples.var().item()}


def measure(quick: bool, console: Console) -> dict[str, Any]:
    """All measurements."""
    seconds, truncations = (0.1, 4) if quick else (10.0, 200)
    cells = QUICK if quick else CELLS
    costs: dict[str, Job] = {
        f"{rule}, {tasks} of {problem}": partial(measure_cost, rule, problem, tasks, seconds)
        for rule, problem, tasks in cells
    }
    variances: dict[str, Job] = {f"variance of {e}": partial(measure_variance, e, truncations) for e in STRATEGIES}
    found = run_jobs(costs, console)
    targets = [
        judged("must", f"{c['rule']}, {c['tasks']} {c['problem']}", "≤", TARGET, c["over_two_forward"], "x")
        for c in found
    ]
    return {"unroll": UNROLL, "costs": found, "variances": run_jobs(variances, console), "targets": targets}


def show(results: dict[str, Any], console: Console) -> None:
    """Tables of costs and variances."""
    table = Table(title=f"a truncation of {results['unroll']} steps: pairs over two forward unrolls (target {TARGET})")
    for column in ("rule", "problem", "tasks", "pes", "forward", "ratio"):
        table.add_column(column, justify="left" if column in ("rule", "problem") else "right")
    for cell in results["costs"]:
        times = [f"{cell['contenders'][name]['median_s'] * 1e3:.1f} ms" for name in ("pes", "forward")]
        table.add_row(cell["rule"], cell["problem"], str(cell["tasks"]), *times, f"{cell['over_two_forward']:.2f}")
    console.print(table)
    table = Table(title="one pair's estimate, truncations of 10 of at most 100 steps")
    for column in ("estimator", "mean", "variance"):
        table.add_column(column)
    for row in results["variances"]:
        table.add_row(row["estimator"], f"{row['mean']:.3g}", f"{row['variance']:.3g}")
    console.print(table)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Few problems, nothing written.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 2,
    output: Annotated[
        Path | None, typer.Option(help="JSON to write; default bench/results/<device>-evolution.json.")
    ] = None,
) -> None:
    """Time evolution strategies against forward unrolls, and print the variance of their estimates."""
    console = Console()
    torch.set_num_threads(threads)
    results = describe_run("evolution", "bench.evolution") | measure(quick, console)
    show(results, console)
    if not quick:
        output = output or RESULTS / f"{machine.device_name()}-evolution.json"
    write(results, output, console)


if __name__ == "__main__":
    typer.run(main)
