"""Checks that MAML training through metakern equals plain PyTorch's, on the 5-shot sinusoid of Finn et al. 2017.

python -m bench.train_sinusoid            the documentation's runs (minutes)
python -m bench.train_sinusoid --quick    smoke test: a few iterations, nothing written

For every seed an MLP 1-40-40-1 is trained twice from the same weights on the same tasks: by metakern.meta_loss, and by
torch.func.grad and torch.func.vmap alone. Each is evaluated by its own implementation on the same held-out tasks.
Results go to bench/results/<device>-sinusoid.json, the figure to bench/results/sinusoid.png.

Finn et al. 2017, arXiv 1703.03400, section 5.1: amplitude 0.1 to 5, phase 0 to π, x from −5 to 5, 5 support and 5
query samples, 25 tasks a meta-iteration, one inner step of α = 0.01, second order, Adam with 10⁻³.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench import machine
from bench.mlp_inner_loop.cases import Case, sinusoid
from bench.mlp_inner_loop.contenders import Batched, Fused, Vmap, iterate
from bench.runs import RESULTS, Advance, Job, describe_run, run_jobs, show_targets, write
from bench.targets import judge_sinusoid
from metakern.evaluation.adaptation import mean_interval
from metakern.models import mlp
from metakern.runs.figures import COLOURS

WAYS: dict[str, type[Batched]] = {"metakern": Fused, "plain PyTorch": Vmap}

#: Inner steps at test time.
TEST_STEPS = (1, 5, 10)

#: Adam's learning rate.
OUTER_LR = 1e-3

#: Meta-iterations compared in float64, too few for rounding to grow. In float32, one sample rounded across a ReLU's
#: kink makes two runs diverge.
SAME = 100

#: Seed of the held-out tasks, larger than all training seeds. A generator uses 32 bits of its seed.
HELD_OUT_SEED = 2**31

#: Inputs x of the fits in the figure.
GRID = 61

TRAINING = replace(sinusoid(tasks=25, steps=1), support=5, query=5)


@dataclass(frozen=True)
class Plan:
    """Size of a run."""

    seeds: int
    iterations: int
    every: int  # iterations between points of the learning curve
    held_out: Case


FULL = Plan(seeds=5, iterations=10_000, every=500, held_out=replace(TRAINING, tasks=1000, query=100))
QUICK = Plan(seeds=2, iterations=20, every=10, held_out=replace(TRAINING, tasks=10, query=10))


@dataclass(frozen=True)
class Trained:
    """One training run."""

    model: nn.Module
    losses: list[float]  # mean query loss of the first iterations
    exact_losses: list[float]  # the same in float64
    curve: list[float]  # mean test loss after one step
    seconds: float  # wall clock of all meta-iterations: tasks, meta-gradient, Adam
    cpu_seconds: float  # the same summed over threads, unaffected by other load


def training_seed(seed: int, iteration: int) -> int:
    """Seed of an iteration's tasks, unique over all iterations and runs."""
    return seed * 10**6 + iteration


def at_test(way: str, model: nn.Module, case: Case) -> Batched:
    """The trained model, with another number of inner steps or tasks."""
    contender = WAYS[way](case)
    contender.model.load_state_dict(model.state_dict())
    return contender


@torch.no_grad()
def test_losses(way: str, model: nn.Module, case: Case, batch: Any) -> Tensor:
    """Query losses [T] of the held-out tasks after ``case.steps`` steps."""
    return at_test(way, model, case).query_losses(*batch)


class Run:
    """Training of one way, with weights and tasks from a seed."""

    def __init__(self, way: str, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.contender, self.seed, self.dtype = WAYS[way](TRAINING), seed, dtype
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.contender.model.load_state_dict(mlp(*TRAINING.shape, *TRAINING.widths).state_dict())
        self.contender.model.to(dtype)
        self.optimizer = torch.optim.Adam(self.contender.model.parameters(), OUTER_LR)

    def iterate(self, iterations: range) -> list[float]:
        """Run these meta-iterations; returns the mean query loss before each."""
        losses = []
        for iteration in iterations:
            (x, y), (query_x, query_y) = TRAINING.batch(training_seed(self.seed, iteration))
            batch = (x.to(self.dtype), y.to(self.dtype)), (query_x.to(self.dtype), query_y.to(self.dtype))
            losses.append(float(iterate(self.contender, batch).mean()))
            self.optimizer.step()
        return losses


def train(way: str, seed: int, plan: Plan, advance: Advance) -> Trained:
    """Train a whole run, and the first iterations of another one in float64."""
    exact = Run(way, seed, torch.float64).iterate(range(min(SAME, plan.iterations)))
    run, held_out = Run(way, seed), plan.held_out.batch(HELD_OUT_SEED)
    model, seconds, cpu_seconds = run.contender.model, 0.0, 0.0
    losses: list[float] = []
    curve = [float(test_losses(way, model, plan.held_out, held_out).mean())]
    for first in range(0, plan.iterations, plan.every):
        start, cpu_start = time.perf_counter(), time.process_time()
        losses += run.iterate(range(first, first + plan.every))
        seconds += time.perf_counter() - start
        cpu_seconds += time.process_time() - cpu_start
        curve.append(float(test_losses(way, model, plan.held_out, held_out).mean()))
        advance((first + plan.every) / plan.iterations)
    return Trained(model, losses[:SAME], exact, curve, seconds, cpu_seconds)


def largest_difference(a: Sequence[float], b: Sequence[float]) -> float:
    """Largest relative difference of pairs."""
    return max(abs(x / y - 1) for x, y in zip(a, b, strict=True))


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds with Student's 95 % interval."""
    mean, half = (float(x) for x in mean_interval(torch.tensor(values, dtype=torch.float64)))
    return {"mean": mean, "low": mean - half, "high": mean + half, "of_seeds": list(values)}


def fits(models: dict[str, nn.Module], plan: Plan) -> dict[str, Any]:
    """Fits of the first seed's models to the held-out task with the largest values."""
    case = plan.held_out
    (x, y), (query_x, query_y) = case.batch(HELD_OUT_SEED)
    task = int(query_y.abs().amax((1, 2)).argmax())
    support = x[task : task + 1], y[task : task + 1]
    grid = torch.linspace(-5, 5, GRID).view(1, GRID, 1)
    order = query_x[task].flatten().argsort()
    found: dict[str, Any] = {"x": grid.flatten().tolist(), "support_x": x[task].flatten().tolist()}
    found["support_y"] = y[task].flatten().tolist()
    found["task_x"], found["task_y"] = (q[task].flatten()[order].tolist() for q in (query_x, query_y))
    with torch.no_grad():
        found["before"] = {way: model(grid).flatten().tolist() for way, model in models.items()}
        for steps in (TEST_STEPS[0], TEST_STEPS[-1]):
            adapted = {way: at_test(way, model, replace(case, steps=steps)) for way, model in models.items()}
            found[f"after {steps} step{'s' * (steps > 1)}"] = {
                way: a.predictions(support, grid).flatten().tolist() for way, a in adapted.items()
            }
    return found


def measure(plan: Plan, console: Console) -> dict[str, Any]:
    """Train all runs, alternating the two ways, and evaluate them."""
    jobs: dict[str, Job] = {
        f"seed {seed}, {way}": partial(train, way, seed, plan) for seed in range(plan.seeds) for way in WAYS
    }
    done = iter(run_jobs(jobs, console))
    runs = [{way: next(done) for way in WAYS} for _ in range(plan.seeds)]
    held_out = plan.held_out.batch(HELD_OUT_SEED)
    losses: dict[str, dict[int, list[float]]] = {way: {} for way in WAYS}
    for way in WAYS:
        for steps in TEST_STEPS:
            case = replace(plan.held_out, steps=steps)
            losses[way][steps] = [float(test_losses(way, run[way].model, case, held_out).mean()) for run in runs]
    ours, plain = WAYS
    results: dict[str, Any] = {
        "training": TRAINING.describe(),
        "outer_lr": OUTER_LR,
        "iterations": plan.iterations,
        "seeds": plan.seeds,
        "held_out_tasks": plan.held_out.tasks,
        "held_out_queries": plan.held_out.query,
        "interval": "Student's t over the seeds, 95 %",
        "ways": {
            way: {
                "seconds": summary([run[way].seconds for run in runs]),
                "cpu_seconds": summary([run[way].cpu_seconds for run in runs]),
                "test_loss": {str(steps): summary(values) for steps, values in losses[way].items()},
                "curve": [summary(values) for values in zip(*(run[way].curve for run in runs), strict=True)],
            }
            for way in WAYS
        },
        "curve_iterations": list(range(0, plan.iterations + 1, plan.every)),
        "difference": {
            str(steps): summary([a - b for a, b in zip(losses[ours][steps], losses[plain][steps], strict=True)])
            for steps in TEST_STEPS
        },
        "first_iterations": {
            "iterations": min(SAME, plan.iterations),
            "float32": max(largest_difference(run[ours].losses, run[plain].losses) for run in runs),
            "float64": max(largest_difference(run[ours].exact_losses, run[plain].exact_losses) for run in runs),
        },
        "fits": fits({way: runs[0][way].model for way in WAYS}, plan),
    }
    return results | {"targets": judge_sinusoid(results)}


def plot(results: dict[str, Any], path: Path) -> None:
    """Learning curves of both ways with their intervals, and the fits of one held-out task."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    styles = dict(zip(results["ways"], zip(COLOURS, ("-", "--"), strict=False), strict=True))
    for way, (colour, line) in styles.items():
        mean, low, high = ([p[key] for p in results["ways"][way]["curve"]] for key in ("mean", "low", "high"))
        left.plot(results["curve_iterations"], mean, line, color=colour, label=way)
        left.fill_between(results["curve_iterations"], low, high, color=colour, alpha=0.18, linewidth=0)
    left.set(xlabel="meta-iteration", ylabel="test loss after one step", yscale="log")
    left.set_title(f"Mean and 95 % interval of {results['seeds']} seeds", fontsize=11)
    data = results["fits"]
    steps = [key for key in data if key.startswith("after")]
    for way, (colour, line) in styles.items():
        right.plot(data["x"], data["before"][way], line, color=colour, alpha=0.35, linewidth=1, label=f"{way}, before")
        for width, key in zip((1.2, 2.4), steps, strict=True):
            right.plot(data["x"], data[key][way], line, color=colour, linewidth=width, label=f"{way}, {key}")
    right.plot(data["task_x"], data["task_y"], color="black", linewidth=1, label="the task")
    right.plot(data["support_x"], data["support_y"], "o", color="black", label="its 5 samples")
    right.set(xlabel="x", ylabel="y")
    right.set_title("A held-out task, models of the first seed", fontsize=11)
    left.legend(frameon=False)
    right.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def show(results: dict[str, Any], console: Console) -> None:
    """Tables of the test losses and of the targets."""
    table = Table(title=f"test loss, mean and 95 % interval of {results['seeds']} seeds")
    for column in ("steps", *results["ways"], "difference"):
        table.add_column(column, justify="right")

    def shown(entry: dict[str, Any]) -> str:
        return f"{entry['mean']:.4f} ({entry['low']:.4f} to {entry['high']:.4f})"

    for steps, difference in results["difference"].items():
        losses = [way["test_loss"][steps] for way in results["ways"].values()]
        table.add_row(steps, *map(shown, losses), shown(difference))
    console.print(table)
    for way, entry in results["ways"].items():
        console.print(f"{way}: {entry['seconds']['mean']:.1f} s a seed")
    show_targets(results["targets"], console)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A few iterations, nothing written.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of both ways; tensors this small gain little.")] = 1,
    output: Annotated[
        Path | None, typer.Option(help="JSON to write; default bench/results/<device>-sinusoid.json.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Picture; default bench/results/sinusoid.png.")] = None,
) -> None:
    """Train MAML on the 5-shot sinusoid through metakern and through plain PyTorch, and compare."""
    console = Console()
    torch.set_num_threads(threads)
    results = describe_run("sinusoid", "bench.train_sinusoid") | measure(QUICK if quick else FULL, console)
    show(results, console)
    if not quick:
        output = output or RESULTS / f"{machine.device_name()}-sinusoid.json"
        figure = figure or RESULTS / "sinusoid.png"
    write(results, output, console)
    if figure is not None:
        plot(results, figure)


if __name__ == "__main__":
    typer.run(main)
