"""The command line: metakern train · eval · info."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from metakern import build_info
from metakern.evaluation import BASELINES, LEARNING_RATES, Curve, SpeedComparison, compare_optimizers, compare_speed
from metakern.rules import CoordinatewiseLSTM
from metakern.tasks import DigitsMLP, Optimizees, Quadratics
from metakern.trainer import Episode, History, MetaTrainer, MetaTrainingConfig

app = typer.Typer(no_args_is_help=True, help="Train and evaluate gradient-based meta-learners.")
train_app = typer.Typer(no_args_is_help=True, help="Meta-train a learner.")
eval_app = typer.Typer(no_args_is_help=True, help="Evaluate a trained learner.")
app.add_typer(train_app, name="train")
app.add_typer(eval_app, name="eval")

console = Console()
DEFAULTS = MetaTrainingConfig()


class Problem(StrEnum):
    """Problems that the learned optimizer is trained on."""

    digits = "digits"
    quadratics = "quadratics"

    def make(self) -> Optimizees:
        """The distribution."""
        return DigitsMLP() if self is Problem.digits else Quadratics()


class Objective(StrEnum):
    """What an unroll minimises."""

    sum = "sum"
    log = "log"


def fail(error: Exception) -> typer.Exit:
    """Print a one-line error and leave with status 1."""
    Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False)
    return typer.Exit(1)


def progress_bar() -> Progress:
    """A bar with the time taken and left; silent where there is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console,
        disable=not console.is_terminal,
    )  # fmt: skip


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write figures with the command, date and installation that made them."""
    header: dict[str, object] = {
        "command": " ".join(["metakern", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": build_info() | {"threads": torch.get_num_threads()},
    }
    path.write_text(json.dumps(header | dict(content), indent=1) + "\n")


@train_app.command("optimizer")
def train_optimizer(
    output: Annotated[Path, typer.Option(help="Folder for weights, figures and history.")] = Path("runs/optimizer"),
    problem: Annotated[Problem, typer.Option(help="What to train on.")] = Problem.digits,
    episodes: Annotated[int, typer.Option(min=1, help="Meta-iterations: episodes of STEPS inner steps.")] = 60,
    networks: Annotated[int, typer.Option(min=1, help="Problems solved side by side.")] = DEFAULTS.num_tasks,
    steps: Annotated[int, typer.Option(min=1, help="Inner steps of an episode.")] = DEFAULTS.steps,
    unroll: Annotated[int, typer.Option(min=1, help="Inner steps between two outer steps.")] = DEFAULTS.unroll,
    lr: Annotated[float, typer.Option(help="Adam's learning rate for the rule's weights.")] = DEFAULTS.lr,
    objective: Annotated[Objective, typer.Option(help="Sum of losses, or of their logarithms.")] = Objective.log,
    second_order: Annotated[bool, typer.Option(help="Differentiate through the optimizee's gradients too.")] = False,
    clip_norm: Annotated[float, typer.Option(help="Largest norm of a meta-gradient.")] = DEFAULTS.clip_norm,
    hidden_size: Annotated[int, typer.Option(min=1, max=64, help="Units of each LSTM layer.")] = 20,
    layers: Annotated[int, typer.Option(min=1, max=3, help="LSTM layers.")] = 2,
    preprocess: Annotated[str, typer.Option(help="none, log_sign or log_and_clip; default by problem.")] = "",
    output_scale: Annotated[float, typer.Option(help="Factor of the update; 0 takes the problem's default.")] = 0.0,
    backend: Annotated[str, typer.Option(help="auto, cpp or reference.")] = "auto",
    seed: Annotated[int, typer.Option(help="Decides weights and draws.")] = 0,
) -> None:
    """Meta-train a coordinatewise LSTM optimizer by truncated backpropagation; the best weights by validation stay."""
    try:
        torch.manual_seed(seed)
        digits = problem is Problem.digits
        rule = CoordinatewiseLSTM(
            hidden_size,
            layers,
            preprocess=preprocess or ("log_sign" if digits else "none"),
            output_scale=output_scale or (0.1 if digits else 1.0),
            backend=backend,
        )
        config = MetaTrainingConfig(
            num_tasks=networks, steps=steps, unroll=unroll, lr=lr, objective=objective.value,
            second_order=second_order, clip_norm=clip_norm, seed=seed,
        )  # fmt: skip
        output.mkdir(parents=True, exist_ok=True)
        history = _fit(MetaTrainer(rule, problem.make(), config), episodes)
        rule.save_pretrained(output)
        _save_history(output, history, config, problem)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise fail(error) from error
    console.print(f"best validation loss {history.best:.3g}; weights and history are in {output}/")


def _fit(trainer: MetaTrainer, episodes: int) -> History:
    with progress_bar() as bar:
        task = bar.add_task("meta-training", total=episodes, note="")

        def on_episode(episode: Episode, history: History) -> None:
            note = f"loss {episode.loss:.3g}"
            if history.evaluations:
                note += f" · validation {history.evaluations[-1][1]:.3g} (best {history.best:.3g})"
            bar.update(task, advance=1, note=note)

        return trainer.fit(episodes, on_episode)


def _save_history(output: Path, history: History, config: MetaTrainingConfig, problem: Problem) -> None:
    from metakern.figures import plot_training  # matplotlib takes a second to import

    figures = {
        "problem": problem.value,
        "config": asdict(config),
        "episodes": [asdict(episode) for episode in history.episodes],
        "evaluations": history.evaluations,
        "best": history.best,
    }
    write_json(output / "training.json", figures)
    plot_training(history, output / "training.png")


@eval_app.command("optimizer")
def eval_optimizer(
    rule_folder: Annotated[
        str, typer.Argument(help="Folder of `metakern train optimizer`, or the name of a rule in the package.")
    ] = "digits_lstm",
    output: Annotated[Path | None, typer.Option(help="Folder for figures; default: RULE_FOLDER, or runs/eval.")] = None,
    problem: Annotated[Problem, typer.Option(help="What to evaluate on.")] = Problem.digits,
    networks: Annotated[int, typer.Option(min=2, help="Fresh networks.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each network.")] = 100,
    seed: Annotated[int, typer.Option(help="Decides networks and minibatches.")] = 1000,
    speed: Annotated[bool, typer.Option(help="Also time meta-iterations against plain PyTorch.")] = False,
) -> None:
    """Train unseen networks with a learned optimizer and with SGD, momentum, RMSprop and Adam at their best rates."""
    try:
        local = Path(rule_folder).is_dir()
        folder = output or (Path(rule_folder) if local else Path("runs/eval"))
        rule = CoordinatewiseLSTM.from_pretrained(rule_folder) if local else CoordinatewiseLSTM.pretrained(rule_folder)
        folder.mkdir(parents=True, exist_ok=True)
        problems = problem.make()
        curves = []
        with progress_bar() as bar:
            task = bar.add_task("training unseen networks", total=1 + len(BASELINES), note="")
            for curve in compare_optimizers(rule, problems, num_tasks=networks, steps=steps, seed=seed):
                curves.append(curve)
                bar.update(task, advance=1, note=curve.name)
        comparison = None
        if speed:
            with console.status("timing meta-iterations"):
                comparison = compare_speed(rule, problems, MetaTrainingConfig(steps=steps))
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise fail(error) from error
    _report(folder, curves, comparison, {"problem": problem.value, "networks": networks, "steps": steps, "seed": seed})


def _report(folder: Path, curves: list[Curve], comparison: SpeedComparison | None, facts: dict[str, object]) -> None:
    from metakern.figures import plot_curves

    console.print(_optimizer_table(curves))
    figures: dict[str, object] = {
        **facts,
        "learning_rates": LEARNING_RATES,
        "optimizers": [curve.summary() for curve in curves],
    }
    if comparison:
        console.print(_speed_table(comparison))
        figures["speed"] = asdict(comparison) | {"ratio": comparison.ratio}
    write_json(folder / "results.json", figures)
    plot_curves(curves, folder / "curves.png")
    console.print(f"figures are in {folder}/: curves.png, results.json")


def _optimizer_table(curves: list[Curve]) -> Table:
    count, steps = curves[0].losses.shape[1], curves[0].losses.shape[0] - 1
    table = Table(title=f"Training loss of {count} unseen networks after {steps} steps")
    for name in ("optimizer", "learning rate", "mean", "standard deviation"):
        table.add_column(name, justify="left" if name == "optimizer" else "right")
    best = min(curves, key=lambda curve: curve.final.mean().item())
    for curve in curves:
        figures = curve.summary()
        rate = "-" if curve.lr is None else f"{curve.lr:.3g}"
        row = [curve.name, rate, f"{figures['final_loss_mean']:.3g}", f"{figures['final_loss_std']:.2g}"]
        table.add_row(*row, style="bold green" if curve is best else "")
    return table


def _speed_table(comparison: SpeedComparison) -> Table:
    title = f"Seconds per meta-iteration, {comparison.coordinates:,} coordinates, median of {comparison.repeats}"
    table = Table(
        title=title, caption=f"largest difference of the trained weights: {comparison.difference:.1e} relative"
    )
    for name in ("implementation", "seconds", "speed-up"):
        table.add_column(name, justify="left" if name == "implementation" else "right")
    table.add_row("metakern, fused", f"{comparison.fused_seconds:.3f}", f"{comparison.ratio:.1f}x", style="bold green")
    table.add_row("plain PyTorch (LSTMCell)", f"{comparison.plain_seconds:.3f}", "1.0x")
    return table


@app.command()
def info() -> None:
    """What this installation can run: versions, compiler, instruction set in use, CUDA architectures."""
    table = Table(show_header=False)
    for name, value in build_info().items():
        table.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    console.print(table)
