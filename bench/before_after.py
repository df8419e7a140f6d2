"""Compare this checkout with an older one, case by case, in turns on one machine.

The cases use public names that both versions have. Each round starts a process for either version, in alternating
order; the ratio is that of the least times over all rounds.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import nn

Call = Callable[[], Any]
_SECONDS = 0.35  # of one measurement


def mlp(*widths: int) -> nn.Sequential:
    """An MLP with ReLU between its layers."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def rule_cases() -> dict[str, Call]:
    """Steps of CoordinatewiseLSTM, LearnedOptimizer, inner_update."""
    from metakern.ops import inner_update
    from metakern.optim import LearnedOptimizer
    from metakern.rules import CoordinatewiseLSTM

    rule = CoordinatewiseLSTM()
    cases: dict[str, Call] = {}
    for n in (16, 1000, 10_000, 100_000):
        params, grads = torch.randn(n), torch.randn(n)
        state = rule.init_state(params)

        def forward(p: torch.Tensor = params, g: torch.Tensor = grads, s: Any = state) -> None:
            with torch.no_grad():
                rule(p, g, s)

        def both(p: torch.Tensor = params, g: torch.Tensor = grads, s: Any = state) -> None:
            new, new_state = rule(p, g, s)
            torch.autograd.grad(new.sum() + new_state.data.sum(), list(rule.parameters()))

        cases |= {f"rule(), N = {n}": forward, f"rule() and backward, N = {n}": both}
    for n in (16, 10_000):
        tensors = [nn.Parameter(torch.randn(n)) for _ in range(4)]
        for tensor in tensors:
            tensor.grad = torch.randn(n)
        cases[f"LearnedOptimizer.step, 4 tensors of {n}"] = LearnedOptimizer(tensors, CoordinatewiseLSTM()).step
    for n in (40, 1600, 40_000):
        ps, gs = ([torch.randn(32, n) for _ in range(6)] for _ in range(2))
        cases[f"inner_update, 6 tensors [32, {n}]"] = lambda ps=ps, gs=gs: inner_update(ps, gs, 0.1)  # type: ignore[misc]
    return cases


def meta_cases(title: str, model: nn.Module, pairs: list[Any], **options: Any) -> dict[str, Call]:
    """adapt, meta_loss with its backward, and meta_backward."""
    import metakern

    return {
        f"meta_loss and backward, {title}": lambda: metakern.meta_loss(model, *pairs, **options).mean().backward(),
        f"meta_backward, {title}": lambda: metakern.meta_backward(model, *pairs, **options),
        f"adapt, {title}": lambda: metakern.adapt(model, *pairs[0], **options),
    }


def maml_cases() -> dict[str, Call]:
    """Inner loops on MLPs and conv4, batched and of one task."""
    import metakern
    from metakern.models import conv4

    cases: dict[str, Call] = {}
    for tasks, steps, first_order in ((4, 1, False), (32, 5, False), (32, 5, True)):
        pairs = [(torch.randn(tasks, 10, 1), torch.randn(tasks, 10, 1)) for _ in range(2)]
        title = f"1-40-40-1, T = {tasks}, K = {steps}, {'first' if first_order else 'second'} order"
        cases |= meta_cases(title, mlp(1, 40, 40, 1), pairs, steps=steps, lr=0.01, first_order=first_order)
    pairs = [(torch.randn(32, 25, 64), torch.randint(0, 5, (32, 25))) for _ in range(2)]
    options: dict[str, Any] = {"loss": F.cross_entropy, "lr": 0.1}
    cases |= meta_cases("64-64-64-5, T = 32, K = 5", mlp(64, 64, 64, 5), pairs, steps=5, **options)
    images = [(torch.randn(2, 5, 1, 16, 16), torch.randint(0, 5, (2, 5))) for _ in range(2)]
    cases |= meta_cases("conv4 16 x 16, T = 2, K = 1", conv4((1, 16, 16), 16, 5), images, steps=1, **options)
    learner = metakern.MAML(mlp(1, 40, 40, 1), lr=0.01)
    x, y, query_x, query_y = (torch.randn(10, 1) for _ in range(4))

    def one_task() -> None:
        clone = learner.clone()
        for _ in range(5):
            clone.adapt(F.mse_loss(clone(x), y))
        F.mse_loss(clone(query_x), query_y).backward()

    return cases | {"MAML: clone, 5 x adapt, backward": one_task}


def learner_cases() -> dict[str, Call]:
    """Truncated backpropagation through 20 steps of an LSTM rule."""
    from metakern.learners import RuleLearner
    from metakern.rules import CoordinatewiseLSTM
    from metakern.tasks import DigitsMLP, Quadratics

    def unroll(tasks: Any) -> Call:
        learner = RuleLearner(CoordinatewiseLSTM(), steps=20, unroll=20)
        batch = tasks.sample(8, torch.Generator().manual_seed(0))

        def call() -> None:
            for losses in learner.meta_losses(batch):
                losses.mean().backward()

        return call

    return {f"RuleLearner, 20 steps, {type(t).__name__}": unroll(t) for t in (DigitsMLP(), Quadratics())}


def measured() -> dict[str, Any]:
    """Least and median microseconds of every case, in this process."""
    import metakern

    torch.manual_seed(0)
    found = {}
    for title, call in (rule_cases() | maml_cases() | learner_cases()).items():
        for _ in range(3):
            call()
        times: list[float] = []
        end = time.perf_counter() + _SECONDS
        while time.perf_counter() < end or len(times) < 5:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        found[title] = {"least_us": 1e6 * min(times), "median_us": 1e6 * statistics.median(times)}
    return {"cpu_capability": metakern.build_info()["cpu_capability"], "path": metakern.__file__, "cases": found}


def run(checkout: Path) -> dict[str, Any]:
    """:func:`measured` with the metakern of a checkout, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, "--measure"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if not Path(result["path"]).is_relative_to(checkout.resolve()):
        raise RuntimeError(f"expected the metakern of {checkout.resolve()}, got {result['path']}")
    return result


def main(
    before: Annotated[Path, typer.Option(help="Checkout of the older version, built.")],
    output: Annotated[Path, typer.Option(help="JSON to write.")],
    rounds: Annotated[int, typer.Option(min=2, help="Processes of either version.")] = 6,
) -> None:
    """Compare this checkout with an older one."""
    from bench.machine import describe

    checkouts = {"before": before, "after": Path(__file__).parents[1]}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    for index in range(rounds):
        for name in sorted(checkouts, reverse=index % 2 == 0):
            results[name].append(run(checkouts[name]))
    cases = {}
    for title in results["before"][0]["cases"]:
        times = {n: [r["cases"][title] for r in runs] for n, runs in results.items()}
        least = {n: min(t["least_us"] for t in ts) for n, ts in times.items()}
        medians = {n: statistics.median(t["median_us"] for t in ts) for n, ts in times.items()}
        cases[title] = {"least_us": least, "median_us": medians, "after / before": least["after"] / least["before"]}
        print(f"{title:60s} {least['before']:10.1f} {least['after']:10.1f} us  {cases[title]['after / before']:.2f}")
    commits = {
        n: subprocess.run(
            ["git", "-C", str(c), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for n, c in checkouts.items()
    }
    report = {
        "command": "python -m bench.before_after --before CHECKOUT --output FILE",
        "host": describe(),  # not "machine": that marks results with a table in docs/benchmarks.md
        "cpu_capability": results["after"][0]["cpu_capability"],
        "commits": commits,
        "rounds": rounds,
        "cases": cases,
    }
    output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--measure"]:
        print(json.dumps(measured()))
    else:
        typer.run(main)
