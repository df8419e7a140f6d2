"""metakern train maml · metakern eval maml."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from metakern.adaptation import TEST_SEED, Adaptation, measure_adaptation
from metakern.cli.common import ERRORS, RunOptions, fail, train_command
from metakern.cli.fewshot import MAMLSettings, make_learner, make_optimizer, make_tasks, sampler, settings_of
from metakern.cli.training import begin, cosine, finish, fit
from metakern.learners import ClusteredLearner
from metakern.runs.folder import (
    CONFIG,
    FIGURES,
    RESULTS,
    load_weights,
    make_folder,
    read_config,
    save_weights,
    write_json,
)
from metakern.tasks import TaskDistribution
from metakern.training import Trainer, TrainerConfig

LEARNER = "maml"


def train_maml(settings: MAMLSettings, options: RunOptions) -> None:
    """Meta-train an initialisation by MAML; the best weights by validation stay, test tasks are looked at last."""
    settings = settings.resolved()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    tasks = make_tasks(settings)
    learner = make_learner(settings, tasks)
    optimizer = make_optimizer(settings, learner)
    run = begin(LEARNER, asdict(settings), options)
    run.console.print(escape(settings.describe()), highlight=False)
    trainer = Trainer(
        learner,
        sampler(settings, tasks, learner),
        optimizer,
        trainer_config(settings),
        scheduler=cosine(optimizer, settings.iterations) if settings.scheduler == "cosine" else None,
        callbacks=run.callbacks(),
        folder=run.folder,
    )
    fit(run, trainer)
    if finish(run, trainer, lambda folder: save_weights(folder, learner)):
        report(run.console, run.folder, learner, tasks, settings.test_tasks)


def trainer_config(settings: MAMLSettings) -> TrainerConfig:
    """The trainer's part of resolved settings; 0 and none are what it calls None."""
    return TrainerConfig(
        iterations=settings.iterations,
        num_tasks=settings.num_tasks or 1,
        seed=settings.seed,
        clip_norm=settings.clip_norm or None,
        accumulate=settings.accumulate,
        eval_every=settings.eval_every,
        eval_tasks=settings.eval_tasks,
        patience=settings.patience or None,
        ema=settings.ema or None,
        precision=settings.precision,
        checkpoint_every=settings.checkpoint_every,
        keep=settings.keep,
        device=settings.device,
    )


def eval_maml(
    run: Annotated[Path, typer.Argument(help="Folder of `metakern train maml`.")],
    output: Annotated[Path | None, typer.Option(help="Folder for results.json and the figure; default: RUN.")] = None,
    num_tasks: Annotated[int, typer.Option(min=2, help="Test tasks.")] = 600,
    steps: Annotated[int | None, typer.Option(min=1, help="Inner steps; default: those of its evaluations.")] = None,
    data: Annotated[str | None, typer.Option(help="Where the images are now, if they were elsewhere.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the tasks; the same for all runs that are compared.")] = TEST_SEED,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors alone.")] = False,
) -> None:
    """Adapt a trained initialisation to unseen tasks: loss and accuracy after every number of inner steps."""
    try:
        content = read_config(run / CONFIG, LEARNER) | {"device": device}
        settings = settings_of(content | ({"data": data} if data else {})).resolved()
        tasks = make_tasks(settings)
        learner = make_learner(settings, tasks)
        load_weights(run, learner)
        folder = output or run
        make_folder(folder)
        report(Console(quiet=quiet), folder, learner, tasks, num_tasks, steps=steps, seed=seed)
    except ERRORS as error:
        raise fail(error) from error


def report(console: Console, folder: Path, learner: Any, tasks: TaskDistribution, num_tasks: int, **how: Any) -> None:
    """Measure the learner on test tasks: a table, results.json and figures/adaptation.png."""
    from metakern.figures import plot_adaptation, plot_clusters  # matplotlib takes a second to import

    adaptation = measure_adaptation(learner, tasks, num_tasks=num_tasks, **how)
    console.print(adaptation_table(adaptation))
    facts = {"test_tasks": num_tasks, "seed": how.get("seed", TEST_SEED), "measures": adaptation.summary()}
    write_json(folder / RESULTS, facts)
    plot_adaptation([adaptation], folder / FIGURES / "adaptation.png")
    written = f"{RESULTS}, {FIGURES}/adaptation.png"
    if isinstance(learner, ClusteredLearner) and learner.num_active:
        plot_clusters(*cluster_map(learner, tasks, num_tasks), folder / FIGURES / "clusters.png")
        written += f", {FIGURES}/clusters.png"
    console.print(f"results are in {escape(str(folder))}/: {written}", highlight=False, soft_wrap=True)


def cluster_map(
    learner: ClusteredLearner, tasks: TaskDistribution, num_tasks: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Embeddings [T, D] of test tasks, their clusters [T], and their true modes [T] where they have some."""
    device = next(learner.parameters()).device
    batch = tasks.split("test").sample(num_tasks, torch.Generator().manual_seed(TEST_SEED)).to(device)
    points = learner.embedding(learner.shared, list(learner.learners)[: learner.num_active], batch)
    modes = None if batch.modes is None else batch.modes.cpu()
    return points.cpu(), learner.assign(batch).cpu(), modes


def adaptation_table(adaptation: Adaptation) -> Table:
    """A row for every number of inner steps: mean and 95 % interval of loss and accuracy."""
    summary = adaptation.summary()
    table = Table(title=f"{adaptation.num_tasks} unseen tasks, ± 95 %")
    for name in ("inner steps", *summary):
        table.add_column(name, justify="right")
    for step, row in enumerate(zip(*summary.values(), strict=True)):
        cells = [_cell(name, entry["mean"], entry["interval"]) for name, entry in zip(summary, row, strict=True)]
        table.add_row(str(step), *cells, style="bold green" if step == len(summary["loss"]) - 1 else "")
    return table


def _cell(name: str, mean: float, half: float) -> str:
    if name == "accuracy":
        return f"{100 * mean:.1f} ± {100 * half:.1f} %"
    return f"{mean:.4g} ± {half:.2g}"


def register(train_app: typer.Typer, eval_app: typer.Typer) -> None:
    """Both commands."""
    train_command(train_app, LEARNER, MAMLSettings, train_maml)
    eval_app.command(LEARNER)(eval_maml)
