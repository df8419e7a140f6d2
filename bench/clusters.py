"""Benchmark: does training in clusters shorten training and raise accuracy? Seeds, intervals, oracles, equal time.

python -m bench.clusters                       everything (hours); finished runs are not repeated
python -m bench.clusters --problem digits      only one problem's runs; nothing is written
python -m bench.clusters --quick               smoke test: a few iterations, nothing kept

Every way of training (bench/cluster_cases.py) starts from the same weights for the same seed and trains on the same
number of tasks; clusters also look at the support sets of a pool of tasks now and then. Ways with clusters run again
with the processor time that plain MAML took: each run has one thread, never idle, and --workers sets the number of
parallel runs. Each run is saved as a file in build/clusters, so that an interrupted command continues. Temperatures
are chosen on validation tasks, and curves show validation tasks; test tasks are used once, for a run's final learner.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from bench.cluster_cases import PEERS, PLAIN, PROBLEMS, Problem, Way
from bench.report import CLUSTERED_COLUMNS, MEASURES, way_cells
from bench.runs import RESULTS, Advance, Job, describe_run, run_jobs, show_targets, write
from bench.targets import judge_clusters
from bench.train_sinusoid import summary
from metakern.learners import ClusteredLearner
from metakern.learners.clustering import ClusterSampler
from metakern.runs.figures import COLOURS
from metakern.training.averaging import MovingAverage, start_anew

#: Folder of saved runs.
PARTS = Path(__file__).parent.parent / "build" / "clusters"

#: For "settled" training: the final share of iterations, in which the learning rate falls to zero along a cosine, and
#: the decay of the moving average of weights.
DECAY, AVERAGING = 0.3, 0.998

#: Seeds of the generators of validation and test tasks.
HELD_OUT_SEEDS = {"valid": 10**6, "test": 2 * 10**6}

#: Ways shown in the table but not in the figure.
UNDRAWN = ("random", "balanced", "one")

#: Temperatures of averaged predictions; 0: the best learner alone.
TEMPERATURES = (0.0, 0.03, 0.06, 0.1, 0.15, 0.25, 0.4, 0.7)


@dataclass(frozen=True)
class Plan:
    """Size of a run."""

    seeds: int
    share: float  # of a problem's iterations
    tasks: int  # of an iteration
    points: int  # on a learning curve, evenly spaced
    held_out: int  # validation tasks, and test tasks


FULL = Plan(seeds=5, share=1.0, tasks=32, points=45, held_out=2000)
QUICK = Plan(seeds=2, share=0.002, tasks=8, points=2, held_out=20)


def rate(iteration: int, iterations: int) -> float:
    """Learning-rate factor of settled training: 1, then a cosine to zero."""
    share = max(0.0, iteration / iterations - (1 - DECAY)) / DECAY
    return (1 + math.cos(math.pi * share)) / 2


class Run:
    """One training run under way.

    Attributes:
        seconds: processor time of the meta-iterations so far, without evaluation; with one busy thread this is the
            wall time on a free processor
    """

    def __init__(self, problem: Problem, way: Way, seed: int, plan: Plan) -> None:
        self.way, self.plan, self.iterations = way, plan, max(plan.points, round(plan.share * problem.iterations))
        self.learner = problem.learner(way, seed, self.iterations)
        tasks = problem.tasks()
        self.tasks: Any = tasks if way.batches == "uniform" else ClusterSampler(tasks, self.learner, way.batches)  # type: ignore[arg-type]
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.Adam(self.learner.parameters(), problem.outer_lr)
        self.scheduler: LRScheduler | None = None
        self.average: MovingAverage | None = None
        if way.settled:
            self.scheduler = LambdaLR(self.optimizer, partial(rate, iterations=self.iterations))
            self.average = MovingAverage(self.learner, AVERAGING)
        self.iteration, self.seconds = 0, 0.0

    @contextmanager
    def result(self) -> Iterator[Any]:
        """The learner to evaluate, with averaged weights if there are any."""
        with self.average.in_place() if self.average else nullcontext():
            yield self.learner

    def advance(self, to: int) -> None:
        """Train up to this iteration."""
        start = time.thread_time()
        while self.iteration < to:
            self._iterate()
        self.seconds += time.thread_time() - start

    def _iterate(self) -> None:
        learner: Any = self.learner
        if isinstance(learner, ClusteredLearner):
            start_anew(learner.on_iteration(self.iteration, self.tasks, self.generator), self.optimizer, self.average)
        for losses in learner.meta_losses(self.tasks.sample(self.plan.tasks, self.generator)):
            self.optimizer.zero_grad()
            losses.mean().backward()
            self.optimizer.step()
        if self.scheduler is not None and self.average is not None:
            self.scheduler.step()
            self.average.update()
        self.iteration += 1


# ------------------------------------------------------------------------------------------------------ one run's part


def evaluated(learner: Any, batch: Any, measure: str, temperature: float = 0.0, by: str | None = None) -> float:
    """Mean measure over tasks, assigned by the learner's method or another."""
    if isinstance(learner, ClusteredLearner):
        before = learner.eval_temperature, learner.assign_by
        learner.eval_temperature, learner.assign_by = temperature, by or learner.assign_by
        try:
            measures = learner.evaluate(batch)
        finally:
            learner.eval_temperature, learner.assign_by = before
    else:
        measures = learner.evaluate(batch)
    if measure == "log_loss":
        return float(measures["loss"].nan_to_num(1e8).clamp(1e-8, 1e8).log10().mean())
    return float(measures[measure].mean())


def train(problem_name: str, way_name: str, seed: int, plan: Plan, advance: Advance) -> dict[str, Any]:
    """Train one run: its learning curve on validation tasks, final test measures, and seconds."""
    problem, way = PROBLEMS[problem_name], PROBLEMS[problem_name].ways[way_name]
    run, measure, by = Run(problem, way, seed, plan), problem.measure, "losses" if way.by_loss else None
    curve = []
    for point in range(plan.points + 1):
        run.advance(point * run.iterations // plan.points)
        with run.result() as learner:
            value = evaluated(learner, held_out(problem, "valid", plan), measure, by=by)
        curve.append({"iteration": run.iteration, "seconds": run.seconds, "valid": value})
        advance(point / plan.points)
    found = {"seconds": run.seconds, "iterations": run.iterations, "curve": curve}
    with run.result() as learner:
        return found | tested(learner, problem, plan, by)


def tested(learner: Any, problem: Problem, plan: Plan, by: str | None) -> dict[str, Any]:
    """Final test measures of a run; the temperature is chosen on validation tasks."""
    measure = problem.measure
    averages = isinstance(learner, ClusteredLearner) and "losses" in (by, learner.assign_by)
    valid, test = (partial(held_out, problem, split, plan) for split in ("valid", "test"))
    choices = {t: evaluated(learner, valid(), measure, t, by) for t in (TEMPERATURES if averages else (0.0,))}
    temperature = (max if measure == "accuracy" else min)(choices, key=choices.__getitem__)
    found: dict[str, Any] = {
        "temperature": temperature,
        "valid": choices[temperature],
        "test": evaluated(learner, test(), measure, temperature, by),
        "test_of_one": evaluated(learner, test(), measure, by=by),
    }
    if averages and learner.assign_by == "modes":
        found["test_told"] = evaluated(learner, test(), measure)
    elif averages and not by and learner.num_active:
        found["clusters_by_mode"] = _table(learner.assign(test()), test().modes)
    return found


def held_out(problem: Problem, split: str, plan: Plan) -> Any:
    """Validation or test tasks, sampled again each time, as solving problems to optimise advances their generator."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEEDS[split])
    return problem.tasks().split(split).sample(plan.held_out, generator)


def _table(labels: Tensor, modes: Tensor) -> list[list[int]]:
    """Tasks by cluster and true mode."""
    table = torch.zeros(int(labels.max()) + 1, int(modes.max()) + 1, dtype=torch.int64)
    table.index_put_((labels, modes), torch.ones((), dtype=torch.int64), accumulate=True)
    return table.tolist()


# ----------------------------------------------------------------------------------------------------- all runs' parts


def part(problem: str, way: str, seed: int, plan: Plan, folder: Path | None, advance: Advance) -> dict[str, Any]:
    """A run, loaded from its file if made with the same settings."""
    path = None if folder is None else folder / f"{problem}-{way}-{plan.share:.4f}-{seed}.json"
    settings = described(problem, way, plan)
    if path is not None and path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        if kept["settings"] == settings:
            return kept
    found = train(problem, way, seed, plan, advance) | {"settings": settings}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(found))
        path.with_suffix(".part").replace(path)
    return found


def described(problem: str, way: str, plan: Plan) -> str:
    """Settings that determine a run, without the seed; the same text in every process."""
    of = PROBLEMS[problem]
    settings = [of.described(), asdict(of.ways[way]), asdict(replace(plan, seeds=0))]
    constants = [DECAY, AVERAGING, TEMPERATURES, HELD_OUT_SEEDS, str(inspect.signature(ClusteredLearner))]
    return json.dumps([*settings, *constants], default=lambda function: function.__qualname__)


def equal_time(runs: dict[str, list[dict[str, Any]]], way: str, plan: Plan) -> Plan:
    """Share of a run that takes plain MAML's processor time, by medians over seeds, in whole percents."""
    plain, ours = (torch.tensor([run["seconds"] for run in runs[name]]).median() for name in (PLAIN, way))
    return replace(plan, share=plan.share * max(0.01, min(1.0, math.floor(100 * float(plain / ours)) / 100)))


def measure(
    problems: Sequence[str], plan: Plan, folder: Path | None, console: Console, workers: int = 1
) -> dict[str, Any]:
    """All runs of these problems."""
    found = {}
    for name in problems:
        ways = PROBLEMS[name].ways
        runs = _runs(name, dict.fromkeys(ways, plan), plan, folder, console, workers)
        shorter = {way: equal_time(runs, way, plan) for way, of in ways.items() if of.proposed}
        timed = _runs(name, shorter, plan, folder, console, workers)
        found[name] = gathered(name, runs, {PLAIN: runs[PLAIN]} | timed)
    results = {
        "tasks": plan.tasks,
        "seeds": plan.seeds,
        "held_out_tasks": plan.held_out,
        "decay": DECAY,
        "averaging": AVERAGING,
        "interval": "Student's t over the seeds, 95 %",
        "problems": found,
    }
    return results | {"targets": judge_clusters(results)}


def _runs(
    problem: str, plans: dict[str, Plan], plan: Plan, folder: Path | None, console: Console, workers: int
) -> dict[str, list[dict[str, Any]]]:
    """Runs of every way and seed, one seed after the other."""
    jobs: dict[str, Job] = {
        f"{problem}, seed {seed}, {way}": partial(part, problem, way, seed, of, folder)
        for seed in range(plan.seeds)
        for way, of in plans.items()
    }
    done = iter(run_jobs(jobs, console, workers))
    by_seed = [{way: next(done) for way in plans} for _ in range(plan.seeds)]
    return {way: [runs[way] for runs in by_seed] for way in plans}


def gathered(problem: str, runs: dict[str, Any], timed: dict[str, Any]) -> dict[str, Any]:
    """Results of every way over the seeds, with differences from plain MAML and the best single learner."""
    ways = {}
    higher = PROBLEMS[problem].measure == "accuracy"
    means = {peer: sum(run["valid"] for run in runs[peer]) for peer in PEERS if peer in runs}
    best = (max if higher else min)(means, key=means.__getitem__)
    for name, of in runs.items():
        tests = [run["test"] for run in of]
        entry: dict[str, Any] = {
            "title": PROBLEMS[problem].ways[name].title,
            "test": summary(tests),
            "seconds": summary([run["seconds"] for run in of]),
            "test_of_one": summary([run["test_of_one"] for run in of]),
            "temperatures": [run["temperature"] for run in of],
            "difference": summary([a - b["test"] for a, b in zip(tests, runs[PLAIN], strict=True)]),
            "difference_best": summary([a - b["test"] for a, b in zip(tests, runs[best], strict=True)]),
            "ratio": summary([a / b["test"] for a, b in zip(tests, runs[PLAIN], strict=True)]),
            "ratio_best": summary([a / b["test"] for a, b in zip(tests, runs[best], strict=True)]),
            "reaches_plain": [reached(run, plain, higher) for run, plain in zip(of, runs[PLAIN], strict=True)],
            "curve": [summary([p["valid"] for p in points]) for points in zip(*(r["curve"] for r in of), strict=True)],
            "curve_seconds": [
                sum(p["seconds"] for p in points) / len(of) for points in zip(*(r["curve"] for r in of), strict=True)
            ],
            "curve_iterations": [p["iteration"] for p in of[0]["curve"]],
        }
        if name in timed:
            entry["equal_time"] = {
                "iterations": timed[name][0]["iterations"],
                "test": summary([run["test"] for run in timed[name]]),
                "seconds": summary([run["seconds"] for run in timed[name]]),
            }
        for key in ("test_told", "clusters_by_mode"):
            if key in of[0]:
                entry[key] = summary([run[key] for run in of]) if key == "test_told" else of[0][key]
        ways[name] = entry
    return {"settings": PROBLEMS[problem].described(), "best_single_learner": best, "ways": ways}


def reached(run: dict[str, Any], plain: dict[str, Any], higher: bool) -> dict[str, float] | None:
    """When a run first reaches plain MAML's final validation measure: shares of plain MAML's iterations and time."""
    last = plain["curve"][-1]
    for point in run["curve"]:
        if point["valid"] >= last["valid"] if higher else point["valid"] <= last["valid"]:
            return {
                "iterations": point["iteration"] / last["iteration"],
                "seconds": point["seconds"] / last["seconds"],
            }
    return None


# -------------------------------------------------------------------------------------------------- what is made of it


def plot(results: dict[str, Any], path: Path) -> None:
    """Learning curves of every problem by tasks seen, above, and by processor time, below."""
    problems = results["problems"]
    names = dict.fromkeys(name for found in problems.values() for name in found["ways"] if name not in UNDRAWN)
    styles = dict(zip(names, itertools.product(("-", "--"), COLOURS), strict=False))  # the same style in every column
    figure, rows = plt.subplots(2, len(problems), figsize=(5.2 * len(problems), 8), layout="constrained", squeeze=False)
    for column, found in enumerate(problems.values()):
        measure = MEASURES[found["settings"]["measure"]]
        drawn = [(way, *styles[name]) for name, way in found["ways"].items() if name in styles]
        for axes, by in zip(rows[:, column], ("curve_iterations", "curve_seconds"), strict=True):
            for way, line, colour in drawn:
                mean, low, high = ([point[key] for point in way["curve"]] for key in ("mean", "low", "high"))
                axes.plot(way[by], mean, line, color=colour, label=way["title"], linewidth=1.4)
                axes.fill_between(way[by], low, high, color=colour, alpha=0.12, linewidth=0)
            axes.set(xlabel="meta-iteration" if by == "curve_iterations" else "seconds of one processor core")
            axes.set(ylabel=f"validation {measure}", yscale="log" if measure == "MSE" else "linear")
            axes.grid(alpha=0.3)
        rows[0, column].set_title(found["settings"]["title"], fontsize=11)
        rows[0, column].legend(frameon=False, fontsize=7)
    figure.suptitle(f"Mean and 95 % interval of {results['seeds']} seeds; by one learner a task", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def show(results: dict[str, Any], console: Console) -> None:
    """A table of every problem, and the targets."""
    for found in results["problems"].values():
        settings = found["settings"]
        table = Table(title=f"{settings['title']}: test {MEASURES[settings['measure']]}, {results['seeds']} seeds")
        for column in CLUSTERED_COLUMNS:
            table.add_column(column)
        for way in found["ways"].values():
            table.add_row(*way_cells(way, results["seeds"]))
        console.print(table)
    show_targets(results["targets"], console)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A few iterations, nothing kept.")] = False,
    problem: Annotated[list[str] | None, typer.Option(help="Of these problems alone; default: all.")] = None,
    seeds: Annotated[int, typer.Option(min=2, help="Seeds of every way.")] = FULL.seeds,
    threads: Annotated[int, typer.Option(min=1, help="Tensors this small gain nothing from more.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Runs side by side, each in a process of its own.")] = 1,
    parts: Annotated[Path, typer.Option(help="Where runs are kept.")] = PARTS,
    output: Annotated[Path | None, typer.Option(help="JSON to write; default bench/results/clusters.json.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Picture; default bench/results/clusters.png.")] = None,
) -> None:
    """Train with and without clusters, and compare."""
    console = Console()
    torch.set_num_threads(threads)
    chosen = problem or list(PROBLEMS)
    if unknown := set(chosen) - PROBLEMS.keys():
        raise typer.BadParameter(f"problem must be one of {', '.join(PROBLEMS)}, got {', '.join(sorted(unknown))}")
    plan = QUICK if quick else replace(FULL, seeds=seeds)
    found = measure(chosen, plan, None if quick else parts, console, workers)
    results = describe_run("clusters", "bench.clusters") | found
    show(results, console)
    if not quick and set(chosen) == PROBLEMS.keys():
        output, figure = output or RESULTS / "clusters.json", figure or RESULTS / "clusters.png"
    write(results, output, console)
    if figure is not None:
        plot(results, figure)


if __name__ == "__main__":
    typer.run(main)
