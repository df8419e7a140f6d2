"""metakern train maml · metakern eval maml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from metakern.cli.common import ERRORS, LIBRARIES, RunOptions, checked_settings, fail, train_command
from metakern.cli.fewshot import MAMLSettings
from metakern.cli.outer import device_of
from metakern.cli.tables import adaptation_table, print_table
from metakern.cli.training import Run, begin, finish, fit
from metakern.core.requirements import check_installed
from metakern.evaluation.adaptation import TEST_SEED, Adaptation, fit_tasks, measure_adaptation
from metakern.learners import ClusteredLearner
from metakern.runs import load
from metakern.runs.fewshot import IMAGES, REGRESSION, make_learner, make_tasks, sampler
from metakern.runs.folder import (
    CONFIG,
    FIGURES,
    METRICS,
    RESULTS,
    make_folder,
    read_config,
    save_weights,
    write_json,
)
from metakern.runs.metrics import read_metrics
from metakern.runs.progress import Display
from metakern.tasks import TaskDistribution
from metakern.training import FolderLock, Trainer

LEARNER = "maml"


def train_maml(settings: MAMLSettings, options: RunOptions) -> None:
    """Meta-train an initialisation by MAML; the best weights by validation stay, test tasks are looked at last."""
    settings = settings.resolved()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    tasks = make_tasks(settings)
    learner = make_learner(settings, tasks)
    optimizer = settings.make_optimizer(learner)
    run = Run(LEARNER, settings, options)
    trainer = Trainer(
        learner,
        sampler(settings, tasks, learner),
        optimizer,
        settings.trainer_config(settings.iterations, settings.num_tasks or 1),
        scheduler=settings.make_scheduler(optimizer, settings.iterations),
        folder=run.record,
    )
    with begin(run, trainer):
        run.console.print(settings.describe(), highlight=False, markup=False, soft_wrap=True)
        fit(run, trainer)
        if finish(run, trainer, lambda folder: save_weights(folder, learner)):
            trained = Trained(run.folder.name, run.folder, settings, learner, tasks)
            report(run.console, run.folder, [trained], settings.test_tasks)


def eval_maml(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUNS", help="Folders of `metakern train maml`; several are compared.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Folder for results.json and figures; default: RUNS/eval, or runs/eval/maml for several.",
        ),
    ] = None,
    num_tasks: Annotated[int, typer.Option(min=2, metavar="N", help="Test tasks.")] = 600,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Inner steps; default: those of its evaluations.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where the images are now, if they were elsewhere.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Decides the tasks.")] = TEST_SEED,
    device: Annotated[str, typer.Option(metavar="TEXT", help="cpu, cuda, or auto.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", metavar="", help="Print errors alone.")] = False,
) -> None:
    """Adapt trained initialisations to unseen tasks: loss and accuracy after every number of inner steps."""
    try:
        check_installed(*LIBRARIES)
        moved = {"device": device} | ({"data": data} if data else {})
        names = [run.resolve().name for run in runs]
        unique = len(set(names)) == len(runs)
        trained = [_load(run, name if unique else str(run), moved) for run, name in zip(runs, names, strict=True)]
        folder = output or (runs[0] / "eval" if len(runs) == 1 else Path("runs/eval") / LEARNER)
        make_folder(folder)
        with FolderLock(folder):
            report(Console(quiet=quiet), folder, trained, num_tasks, steps=steps, seed=seed)
    except ERRORS as error:
        raise fail(error) from error


@dataclass(frozen=True)
class Trained:
    """A learner, the tasks that it was trained for, and the folder of its run."""

    name: str
    folder: Path
    settings: MAMLSettings
    learner: Any
    tasks: TaskDistribution


def _load(run: Path, name: str, moved: Mapping[str, str]) -> Trained:
    """Load a trained run; ``moved`` overrides settings whose paths changed."""
    content = checked_settings(MAMLSettings, read_config(run / CONFIG, LEARNER), run / CONFIG)
    settings = MAMLSettings(**{**content, **moved}).resolved()
    if "data" in moved and settings.tasks not in IMAGES:
        raise ValueError(f"--data has no meaning for {run}, a run on --tasks {settings.tasks}, which need no folder")
    loaded = load(run, device=device_of(settings.device), data=settings.data)
    return Trained(name, run, settings, loaded.learner, loaded.tasks)


def report(
    console: Console,
    folder: Path,
    trained: Sequence[Trained],
    num_tasks: int,
    *,
    steps: int | None = None,
    seed: int = TEST_SEED,
) -> None:
    """Evaluate learners on the same test tasks: prints a table, writes results.json and figures.

    Raises:
        ValueError: for learners of different tasks.
    """
    from metakern.runs.figures import plot_adaptation, plot_clusters, plot_fits, plot_validation  # a second to import

    kinds = {_kind(each.settings) for each in trained}
    if len(kinds) > 1:
        raise ValueError(f"runs must be of the same tasks to be compared, got {'; '.join(sorted(kinds))}")
    adaptations = _measure(console, trained, num_tasks, steps, seed)
    print_table(console, adaptation_table(console, adaptations))
    measures = [{"run": each.name, "measures": each.summary()} for each in adaptations]
    write_json(folder / RESULTS, {"test_tasks": num_tasks, "seed": seed, "runs": measures})
    plot_adaptation(adaptations, folder / FIGURES / "adaptation.png")
    written = [RESULTS, f"{FIGURES}/adaptation.png"]
    tasks, evaluations = trained[0].tasks, {each.name: _evaluations(each.folder) for each in trained}
    if len(trained) > 1 and any(evaluations.values()):
        plot_validation(evaluations, folder / FIGURES / "learning.png", chance=adaptations[0].chance)
        written.append(f"{FIGURES}/learning.png")
    if fits := fit_tasks({each.name: each.learner for each in trained}, tasks, steps=steps, seed=seed):
        plot_fits(fits, folder / FIGURES / "fits.png")
        written.append(f"{FIGURES}/fits.png")
    for each in trained:
        if isinstance(each.learner, ClusteredLearner) and each.learner.num_active:
            name = "clusters.png" if len(trained) == 1 else f"clusters-{each.name.replace('/', '-')}.png"
            points, clusters, modes = cluster_map(each.learner, each.tasks, num_tasks)
            plot_clusters(points, clusters, modes, folder / FIGURES / name, getattr(tasks, "mode_names", ()))
            written.append(f"{FIGURES}/{name}")
    line = f"results are in {folder}/: {', '.join(written)}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _evaluations(run: Path) -> list[dict[str, Any]]:
    """A run's evaluation lines; empty if its metrics file is gone."""
    path = run / METRICS
    return read_metrics(path)[1] if path.is_file() else []


def _measure(
    console: Console, trained: Sequence[Trained], num_tasks: int, steps: int | None, seed: int
) -> list[Adaptation]:
    """Evaluate every learner on the test tasks, with a progress display."""
    adaptations: list[Adaptation] = []
    with Display(console, "test tasks", num_tasks * len(trained)) as display:
        for each in trained:
            first = num_tasks * len(adaptations)
            adaptations.append(
                measure_adaptation(
                    each.learner, each.tasks, num_tasks=num_tasks, steps=steps, seed=seed, name=each.name,
                    advance=partial(_show, display, each.name, first),
                )
            )  # fmt: skip
    return adaptations


def _show(display: Display, name: str, first: int, done: int) -> None:
    display.update(first + done, name)


def _kind(settings: MAMLSettings) -> str:
    """Settings that must agree for results to be comparable, as text."""
    ways = "" if settings.tasks in REGRESSION else f"{settings.ways}-way "
    return f"{settings.tasks}, {ways}{settings.shots}-shot with {settings.queries} queries"


def cluster_map(
    learner: ClusteredLearner, tasks: TaskDistribution, num_tasks: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Embeddings [T, D] of test tasks, their clusters [T], and their true modes [T], or None."""
    device = next(learner.parameters()).device
    batch = tasks.split("test").sample(num_tasks, torch.Generator().manual_seed(TEST_SEED)).to(device)
    points = learner.embedding(learner.shared, list(learner.learners)[: learner.num_active], batch)
    modes = None if batch.modes is None else batch.modes.cpu()
    return points.cpu(), learner.assign(batch).cpu(), modes


def register(train_app: typer.Typer, eval_app: typer.Typer) -> None:
    """Register both commands."""
    train_command(train_app, LEARNER, MAMLSettings, train_maml)
    eval_app.command(LEARNER)(eval_maml)
