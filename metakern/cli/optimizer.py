"""metakern train optimizer · metakern eval optimizer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer
from rich.console import Console
from rich.table import Table

from metakern.cli.common import ERRORS, LIBRARIES, RunOptions, choose, fail, group, train_command
from metakern.cli.outer import EVALUATION, OUTER, OuterSettings
from metakern.cli.tables import BEST, figures_table, print_table
from metakern.cli.training import Run, begin, finish, fit
from metakern.core.plain_data import RESULT_BYTES, read_json
from metakern.core.requirements import check_installed
from metakern.evaluation.optimizers import (
    LEARNING_RATES,
    TRAININGS,
    Curve,
    SpeedComparison,
    compare_optimizers,
    compare_speed,
)
from metakern.learners import RuleLearner, ScaledRuleLearner
from metakern.learners.estimators import ESTIMATORS, SIGMA, STRATEGIES
from metakern.learners.scaled import ScaledRule
from metakern.rules import Rule, load
from metakern.rules.pretrained import shipped_folder
from metakern.rules.registry import names, options_of
from metakern.runs.folder import make_folder, write_json
from metakern.runs.problems import (
    PROBLEMS,
    RULE,
    SCALES,
    TRAINING,
    load_scales,
    make_problems,
    make_rule_learner,
    problem_named,
    rule_of,
)
from metakern.runs.progress import Display
from metakern.tasks import Optimizees
from metakern.tasks.variants import SCALE_SHARES
from metakern.training import FolderLock, History, Trainer

LEARNER = "optimizer"


def word_for(problem: str) -> str:
    """The word for problems of this name: networks, or functions to minimise."""
    return "networks" if problem.startswith(("digits", "softmax", "general")) or ":" in problem else "functions"


_PROBLEM = group("Problem and episodes")
_ESTIMATOR = group("Gradient estimator")
_RULE = group("Learned optimizer")

#: Settings of :data:`RULE`; other rules take theirs from ``rule_options``.
_OF_LSTM = ("hidden_size", "layers", "preprocess", "output_scale")


@dataclass(frozen=True)
class OptimizerSettings(OuterSettings):
    """The whole configuration of a run; None means the problem's default."""

    count: ClassVar[str] = "episodes"

    problem: Annotated[str, _PROBLEM(help=f"What to train on: {', '.join(PROBLEMS)}.")] = "digits"
    episodes: Annotated[
        int, _PROBLEM(min=1, help="Meta-iterations: with tbptt episodes of STEPS inner steps, else UNROLL steps.")
    ] = 100
    networks: Annotated[int, _PROBLEM(min=1, help="Problems solved side by side.")] = 8
    steps: Annotated[int, _PROBLEM(min=1, help="Inner steps of an episode.")] = 100
    unroll: Annotated[int, _PROBLEM(min=1, help="Inner steps between two outer steps.")] = 20
    objective: Annotated[
        str,
        _PROBLEM(help="sum of losses, or of their logarithms: log, relative-log (to the first loss); or the last one."),
    ] = "log"
    loss_on: Annotated[
        str, _PROBLEM(help="Samples of the objective: train, or held-out ones, which the rule never sees.")
    ] = "train"
    augment: Annotated[
        str, _PROBLEM(help="Random scales of the problems' parameters: none, or one a problem, tensor or coordinate.")
    ] = "none"
    augment_spread: Annotated[float, _PROBLEM(min=0, help="Largest logarithm of such a scale, in size.")] = 3.0
    second_order: Annotated[bool, _PROBLEM(help="Differentiate through the optimizee's gradients too.")] = False
    estimator: Annotated[str, _ESTIMATOR(help=f"How meta-gradients are computed: {', '.join(ESTIMATORS)}.")] = "tbptt"
    sigma: Annotated[
        float | None, _ESTIMATOR(help="Standard deviation of the weights' perturbations; default: 0.01.")
    ] = None
    min_steps: Annotated[
        int | None, _ESTIMATOR(min=1, help="Shortest life of a problem, STEPS the longest; default: UNROLL.")
    ] = None
    max_difference: Annotated[
        float | None, _ESTIMATOR(help="Largest difference of a pair's losses; default: no limit.")
    ] = None
    scales: Annotated[
        str, _PROBLEM(help="Learned factors of the updates: none, one, or one for each kind of problem by its shapes.")
    ] = "none"
    scale_rate: Annotated[float, _PROBLEM(help="Their logarithms' multiple of the outer learning rate.")] = 10.0
    rule: Annotated[str, _RULE(help=f"The rule: {', '.join(names())}.")] = RULE
    rule_options: Annotated[str | None, _RULE(help="Options of other rules, as hidden_size=20,preprocess=none.")] = None
    hidden_size: Annotated[int, _RULE(min=1, max=64, help="Units of each LSTM layer.")] = 20
    layers: Annotated[int, _RULE(min=1, max=3, help="LSTM layers.")] = 2
    preprocess: Annotated[
        str | None, _RULE(help="none, log_sign or log_and_clip; default: log_sign, none for quadratics.")
    ] = None
    output_scale: Annotated[float | None, _RULE(help="Factor of the update; default: 0.1, 1 for quadratics.")] = None
    backend: Annotated[str, _RULE(help="auto, cpp, cuda, triton or reference.")] = "auto"
    outer_lr: Annotated[float, OUTER(help="Outer learning rate.")] = 1e-2
    max_grad_norm: Annotated[float, OUTER(min=0, help="Largest norm of a meta-gradient; 0: no limit.")] = 1.0
    monitor: Annotated[
        str, EVALUATION(help="The measure that chooses the best: loss, or relative with relative-log.")
    ] = "loss"
    eval_every: Annotated[int, EVALUATION(min=1, help="Episodes between evaluations.")] = 5
    eval_tasks: Annotated[int, EVALUATION(min=1, help="Validation problems of an evaluation.")] = 16
    checkpoint_every: Annotated[int, EVALUATION(min=1, help="Episodes between checkpoints.")] = 10

    def resolved(self) -> OptimizerSettings:
        """The settings with all defaults filled in.

        Raises:
            ValueError: for unknown names, invalid rates, and settings that do not fit together.
        """
        choose("problem", self.problem, tuple(PROBLEMS))
        choose("rule", self.rule, names())
        choose("estimator", self.estimator, ESTIMATORS)
        choose("augment", self.augment, ("none", *SCALE_SHARES))
        choose("scales", self.scales, ("none", *SCALES))
        if self.scales != "none" and self.estimator != "tbptt":
            raise ValueError(f"scales need estimator tbptt, which has gradients of them, got {self.estimator}")
        if not 0 < self.scale_rate < math.inf:
            raise ValueError(f"scale_rate must be positive and finite, got {self.scale_rate}")
        self.check_outer("loss", *(("relative",) if self.objective == "relative-log" else ()))
        if self.estimator != "tbptt" and self.batch_parts != 1:
            raise ValueError(
                f"batch_parts must be 1 with estimator {self.estimator}, which keeps a problem for every task of a "
                f"meta-batch, got {self.batch_parts}; estimator tbptt takes more"
            )
        quadratics = self.problem == "quadratics"
        preprocess = ("none" if quadratics else "log_sign") if self.preprocess is None else self.preprocess
        scale = (1.0 if quadratics else 0.1) if self.output_scale is None else self.output_scale
        decay = self.decay_iterations or self.episodes
        sigma, least = self.sigma, self.min_steps
        if self.estimator != "tbptt":
            sigma, least = SIGMA if sigma is None else sigma, least or self.unroll
        return replace(
            self, preprocess=preprocess, output_scale=scale, decay_iterations=decay, sigma=sigma, min_steps=least
        )

    def meaningless(self) -> Iterator[tuple[Sequence[str], str]]:
        """Settings that have no effect with the others, and why, naming the other option."""
        yield from super().meaningless()
        if self.rule != RULE:
            known = ", ".join(options_of(self.rule)) or "none"
            yield _OF_LSTM, f"with --rule {self.rule}, whose --rule-options are {known}"
            if "backend" not in options_of(self.rule):
                yield ("backend",), f"with --rule {self.rule}, which has none to choose"
        if self.estimator == "tbptt":
            others = ", ".join(STRATEGIES)
            yield ("sigma", "min_steps", "max_difference"), f"with --estimator tbptt; {others} perturb weights"
        if self.augment == "none":
            yield ("augment_spread",), "with --augment none; problem, tensor and coordinate draw scales"
        if self.scales == "none":
            yield ("scale_rate",), "with --scales none, where no factors are learned"


def train_optimizer(settings: OptimizerSettings, options: RunOptions) -> None:
    """Meta-train an update rule by truncated backpropagation or evolution strategies; the best by validation stays."""
    settings = settings.resolved()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    learner = make_rule_learner(settings)
    optimizer = settings.make_optimizer(learner)
    run = Run(LEARNER, settings, options, "episode")
    trainer = Trainer(
        learner,
        make_problems(settings),
        optimizer,
        settings.trainer_config(settings.episodes, settings.networks),
        scheduler=settings.make_scheduler(optimizer, settings.episodes),
        folder=run.record,
    )
    with begin(run, trainer):
        history = fit(run, trainer)
        if finish(run, trainer, rule_of(learner).save_pretrained):
            _write_history(run.folder, history, settings, learner)
            best = f"best validation {settings.monitor} {history.best:.3g}; weights and history are in {run.folder}/"
            run.console.print(best, highlight=False, markup=False, soft_wrap=True)


def _write_history(folder: Path, history: History, settings: OptimizerSettings, learner: RuleLearner) -> None:
    figures: dict[str, Any] = {
        "problem": settings.problem,
        "config": asdict(settings),
        "episodes": [asdict(record) for record in history.records],
        "evaluations": [(iteration, measures["loss"]) for iteration, measures in history.evaluations],
        "best": history.best,
    }
    if isinstance(learner, ScaledRuleLearner):
        figures |= {"scales": learner.factors().tolist(), "scale_offsets": learner.rule.offsets.tolist()}
    write_json(folder / TRAINING, figures)


def eval_optimizer(
    rule_folder: Annotated[
        str,
        typer.Argument(metavar="RULE", help="Folder of `metakern train optimizer`, or the name of a rule that ships."),
    ] = "digits_lstm",
    output: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Folder for figures; default: RULE, or runs/eval/optimizer.")
    ] = None,
    problem: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help=f"{', '.join(PROBLEMS)}, or a function of yours that makes problems, FILE.py:FUNCTION; default: what "
            "the rule was trained on, or digits.",
        ),
    ] = None,
    networks: Annotated[int, typer.Option(min=2, metavar="N", help="Fresh networks, or functions.")] = 64,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps of each network.")] = 100,
    seed: Annotated[int, typer.Option(metavar="N", help="Decides networks and minibatches.")] = 1000,
    speed: Annotated[
        bool, typer.Option("--speed", metavar="", help="Also time meta-iterations against plain PyTorch.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", metavar="", help="Print errors alone.")] = False,
) -> None:
    """Train unseen networks by a learned optimizer, and by SGD, momentum, RMSprop and Adam at their best rates."""
    console = Console(quiet=quiet)
    try:
        check_installed(*LIBRARIES)
        rule, folder = _load_rule(rule_folder, output)
        problem = problem or _trained_on(Path(rule_folder))
        problems = problem_named(problem)
        scaled = _scaled(rule, Path(rule_folder), problems, networks, seed)
        make_folder(folder)
        word = word_for(problem)
        with Display(console, f"training unseen {word}", TRAININGS) as display:
            done = itertools.count(1)
            curves = list(
                compare_optimizers(
                    scaled, problems, num_tasks=networks, steps=steps, seed=seed,
                    advance=lambda what, curve: display.update(next(done), what, line=curve),
                )
            )  # fmt: skip
        comparison = None
        if speed:
            note = "timing meta-iterations"
            if not console.is_interactive:
                console.print(f"{note}, fused and in plain PyTorch", highlight=False)
            with console.status(note):
                unroll = math.gcd(steps, OptimizerSettings.unroll)
                comparison = compare_speed(rule, problems, steps=steps, unroll=unroll)
        facts = {"problem": problem, "networks": networks, "steps": steps, "seed": seed}
        with FolderLock(folder):
            _report(console, folder, curves, comparison, facts, word)
    except ERRORS as error:
        raise fail(error) from error


def _load_rule(name: str, output: Path | None) -> tuple[Rule, Path]:
    """Load a rule from a folder or by a shipped name; returns it and the folder for its figures."""
    if Path(name).is_dir():
        return load(name), output or Path(name)
    try:
        folder = shipped_folder(name)
    except ValueError as error:
        raise ValueError(f"{name!r} is not a folder, and {error}") from error
    return load(folder), output or Path("runs/eval") / LEARNER


def _scaled(rule: Rule, folder: Path, problems: Optimizees, networks: int, seed: int) -> Any:
    """The rule with the factors that its run learned for the kinds of these problems; itself if it learned none."""
    found = load_scales(folder)
    if found is None:
        return rule
    offsets, rate, label = found
    scaled = ScaledRule(rule, len(offsets), rate)
    scaled.offsets.data.copy_(offsets)
    scaled.labels = label(problems.split("test").sample(networks, torch.Generator().manual_seed(seed)))
    return scaled


def _trained_on(folder: Path) -> str:
    """The training problem named in the folder's training.json; digits if there is none."""
    try:
        return str(read_json(folder / TRAINING, RESULT_BYTES)["problem"])
    except (OSError, ValueError, KeyError, TypeError):
        return OptimizerSettings.problem


def _report(
    console: Console,
    folder: Path,
    curves: list[Curve],
    comparison: SpeedComparison | None,
    facts: Mapping[str, object],
    word: str,
) -> None:
    from metakern.runs.figures import plot_curves  # matplotlib takes a second to import

    print_table(console, optimizer_table(curves, word))
    console.print(verdict(curves), highlight=False, soft_wrap=True)
    figures: dict[str, object] = {
        **facts,
        "learning_rates": LEARNING_RATES,
        "optimizers": [curve.summary() for curve in curves],
    }
    if comparison:
        print_table(console, _speed_table(comparison))
        figures["speed"] = asdict(comparison) | {"ratio": comparison.ratio}
    write_json(folder / "results.json", figures)
    plot_curves(curves, folder / "curves.png", word)
    line = f"results are in {folder}/: results.json, curves.png"
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def verdict(curves: list[Curve]) -> str:
    """Say whether the first curve, the learned optimizer's, ends below all others; a diverged one beats none."""
    learned, *baselines = curves
    if not learned.mean < math.inf:
        return "The learned optimizer diverged."
    better = [curve.name for curve in baselines if not learned.mean < curve.mean]
    if better:
        return f"The learned optimizer does not beat: {', '.join(better)}."
    return "The learned optimizer beats every tuned baseline."


def optimizer_table(curves: list[Curve], word: str) -> Table:
    """Table of every optimizer's losses after the last step; the best mean is highlighted."""
    count, steps = curves[0].losses.shape[1], curves[0].losses.shape[0] - 1
    title = f"Training loss of {count} unseen {word} after {steps} steps"
    table = figures_table(title, "optimizer", "learning\nrate", "mean", "standard\ndeviation", "median", "worst")
    best = min(curves, key=lambda curve: curve.mean)
    for curve in curves:
        figures = curve.summary()
        rate = "-" if curve.lr is None else f"{curve.lr:.3g}"
        row = [_loss(figures[f"final_loss_{key}"]) for key in ("mean", "std", "median", "max")]
        table.add_row(curve.name, rate, *row, style=BEST if curve is best else "")
    return table


def _loss(value: Any) -> str:
    return f"{value:.2g}" if math.isfinite(value) else "diverged"


def _speed_table(comparison: SpeedComparison) -> Table:
    table = figures_table(
        f"Seconds per meta-iteration, {comparison.coordinates:,} coordinates, median of {comparison.repeats}",
        *("implementation", "seconds", "speed-up"),
        caption=f"meta-gradients differ by {comparison.difference:.0e} relative, allowed {comparison.tolerance:.0e}",
    )
    table.add_row("metakern, fused", f"{comparison.fused_seconds:.3f}", f"{comparison.ratio:.1f}x", style=BEST)
    table.add_row("plain PyTorch (LSTMCell)", f"{comparison.plain_seconds:.3f}", "1.0x")
    return table


def register(train_app: typer.Typer, eval_app: typer.Typer) -> None:
    """Register both commands."""
    train_command(train_app, LEARNER, OptimizerSettings, train_optimizer)
    eval_app.command(LEARNER)(eval_optimizer)
