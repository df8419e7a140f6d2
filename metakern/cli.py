"""The command line: metakern train · eval · info."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
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
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
    return typer.Exit(1)


def progress_bar() -> Progress:
    """A bar with the time taken and left; silent where there is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console,
        disable=not console.is_terminal,
    )  # fmt: skip


def _make_folder(folder: Path) -> None:
    """Make the folder and write to it once: better an error now than after the work."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write figures with the command, date and installation that made them."""
    header: dict[str, object] = {
        "command": " ".join(["metakern", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": build_info() | {"threads": torch.get_num_threads()},
    }
    path.write_text(json.dumps(_finite(header | dict(content)), indent=1, allow_nan=False) + "\n")


def _finite(content: Any) -> Any:
    """The same with null for infinity and NaN, which JSON does not have."""
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


@train_app.command("optimizer")
def train_optimizer(
    output: Annotated[Path, typer.Option(help="Folder for weights, figures and history.")] = Path("runs/optimizer"),
    problem: Annotated[Problem, typer.Option(help="What to train on.")] = Problem.digits,
    episodes: Annotated[int, typer.Option(min=1, help="Meta-iterations: episodes of STEPS inner steps.")] = 100,
    networks: Annotated[int, typer.Option(min=1, help="Problems solved side by side.")] = DEFAULTS.num_tasks,
    steps: Annotated[int, typer.Option(min=1, help="Inner steps of an episode.")] = DEFAULTS.steps,
    unroll: Annotated[int, typer.Option(min=1, help="Inner steps between two outer steps.")] = DEFAULTS.unroll,
    lr: Annotated[float, typer.Option(help="Adam's learning rate for the rule's weights.")] = DEFAULTS.lr,
    objective: Annotated[Objective, typer.Option(help="Sum of losses, or of their logarithms.")] = Objective.log,
    second_order: Annotated[bool, typer.Option(help="Differentiate through the optimizee's gradients too.")] = False,
    clip_norm: Annotated[float, typer.Option(help="Largest norm of a meta-gradient.")] = DEFAULTS.clip_norm,
    hidden_size: Annotated[int, typer.Option(min=1, max=64, help="Units of each LSTM layer.")] = 20,
    layers: Annotated[int, typer.Option(min=1, max=3, help="LSTM layers.")] = 2,
    preprocess: Annotated[
        str | None, typer.Option(help="none, log_sign or log_and_clip; default: log_sign, none for quadratics.")
    ] = None,
    output_scale: Annotated[
        float | None, typer.Option(help="Factor of the update; default: 0.1, 1 for quadratics.")
    ] = None,
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
            preprocess=("log_sign" if digits else "none") if preprocess is None else preprocess,
            output_scale=(0.1 if digits else 1.0) if output_scale is None else output_scale,
            backend=backend,
        )
        config = MetaTrainingConfig(
            num_tasks=networks, steps=steps, unroll=unroll, lr=lr, objective=objective.value,
            second_order=second_order, clip_norm=clip_norm, seed=seed,
        )  # fmt: skip
        _make_folder(output)
        history = _fit(MetaTrainer(rule, problem.make(), config), episodes)
        rule.save_pretrained(output)
        _save_history(output, history, config, problem)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise fail(error) from error
    console.print(f"best validation loss {history.best:.3g}; weights and history are in {escape(str(output))}/")


def _fit(trainer: MetaTrainer, episodes: int) -> History:
    with progress_bar() as bar:
        task = bar.add_task("meta-training", total=episodes, note="")

        def on_episode(episode: Episode, history: History) -> None:
            note = f"loss {episode.loss:.3g}"
            if history.evaluations:
                note += f" · validation {history.evaluations[-1][1]:.3g} (best {history.best:.3g})"
            bar.update(task, advance=1, note=note)
            done = len(history.episodes)
            if not console.is_terminal and history.evaluations and history.evaluations[-1][0] == done:
                console.print(f"episode {done}/{episodes}: {note}")  # the bar is silent there

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
    problem: Annotated[Problem | None, typer.Option(help="Default: what it was trained on, or digits.")] = None,
    networks: Annotated[int, typer.Option(min=2, help="Fresh networks.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each network.")] = 100,
    seed: Annotated[int, typer.Option(help="Decides networks and minibatches.")] = 1000,
    speed: Annotated[bool, typer.Option(help="Also time meta-iterations against plain PyTorch.")] = False,
) -> None:
    """Train unseen networks with a learned optimizer and with SGD, momentum, RMSprop and Adam at their best rates."""
    try:
        rule, folder = _load_rule(rule_folder, output)
        problem = problem or _trained_on(Path(rule_folder))
        _make_folder(folder)
        curves = []
        with progress_bar() as bar:
            task = bar.add_task("training unseen networks", total=1 + len(BASELINES), note="")
            for curve in compare_optimizers(rule, problem.make(), num_tasks=networks, steps=steps, seed=seed):
                curves.append(curve)
                bar.update(task, advance=1, note=curve.name)
        comparison = None
        if speed:
            config = MetaTrainingConfig(steps=steps, unroll=math.gcd(steps, DEFAULTS.unroll))
            with console.status("timing meta-iterations"):
                comparison = compare_speed(rule, problem.make(), config)
        facts = {"problem": problem.value, "networks": networks, "steps": steps, "seed": seed}
        _report(folder, curves, comparison, facts)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise fail(error) from error


def _load_rule(name: str, output: Path | None) -> tuple[CoordinatewiseLSTM, Path]:
    """The rule, and the folder for its figures."""
    if Path(name).is_dir():
        return CoordinatewiseLSTM.from_pretrained(name), output or Path(name)
    try:
        return CoordinatewiseLSTM.pretrained(name), output or Path("runs/eval")
    except ValueError as error:
        raise ValueError(f"{name!r} is not a folder, and {error}") from error


def _trained_on(folder: Path) -> Problem:
    """The problem that training.json of the folder names; digits where there is none."""
    try:
        return Problem(json.loads((folder / "training.json").read_text())["problem"])
    except (OSError, ValueError, KeyError, TypeError):
        return Problem.digits


def _report(folder: Path, curves: list[Curve], comparison: SpeedComparison | None, facts: Mapping[str, object]) -> None:
    from metakern.figures import plot_curves

    console.print(_optimizer_table(curves))
    console.print(verdict(curves))
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
    console.print(f"figures are in {escape(str(folder))}/: curves.png, results.json")


def verdict(curves: list[Curve]) -> str:
    """Whether the first curve, the learned optimizer's, ends below all others."""
    learned, *baselines = curves
    better = [curve.name for curve in baselines if not learned.final.mean() < curve.final.mean()]
    if better:
        return f"The learned optimizer does not beat: {', '.join(better)}."
    return "The learned optimizer beats every tuned baseline."


def _optimizer_table(curves: list[Curve]) -> Table:
    count, steps = curves[0].losses.shape[1], curves[0].losses.shape[0] - 1
    table = Table(title=f"Training loss of {count} unseen networks after {steps} steps")
    for name in ("optimizer", "learning rate", "mean", "standard deviation", "median", "worst"):
        table.add_column(name, justify="left" if name == "optimizer" else "right")
    best = min(curves, key=lambda curve: curve.final.mean().item())
    for curve in curves:
        figures = curve.summary()
        rate = "-" if curve.lr is None else f"{curve.lr:.3g}"
        row = [f"{figures[f'final_loss_{key}']:.2g}" for key in ("mean", "std", "median", "max")]
        table.add_row(curve.name, rate, *row, style="bold green" if curve is best else "")
    return table


def _speed_table(comparison: SpeedComparison) -> Table:
    title = f"Seconds per meta-iteration, {comparison.coordinates:,} coordinates, median of {comparison.repeats}"
    table = Table(
        title=title,
        caption=f"meta-gradients differ by {comparison.difference:.0e} relative, allowed {comparison.tolerance:.0e}",
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
