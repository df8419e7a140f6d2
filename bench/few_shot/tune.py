"""Tries settings of a method on validation tasks; test tasks are not looked at, nothing is written.

python -m bench.few_shot.tune meta-lstm --shots 5 --set outer_lr=3e-3 --set outer_lr=1e-2,rule_options=hidden_size:10
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, get_type_hints

import torch
import typer
from rich.console import Console

from bench.few_shot.cases import METHODS, SAMPLERS, SHOTS, UNIFORM, Case, Plan
from bench.few_shot.learning import train
from metakern.cli.fewshot import MAMLSettings
from metakern.runs.problems import rule_options

#: The seed of tries, which is none of the benchmark's.
SEED = 100


def changes(text: str) -> tuple[tuple[str, Any], ...]:
    """Settings from ``name=value,name=value``; within rule_options ``:`` stands for ``=`` and ``;`` for a comma."""
    found = rule_options(text)
    if unknown := found.keys() - get_type_hints(MAMLSettings).keys():
        raise typer.BadParameter(f"set must name settings of train maml, got {', '.join(sorted(unknown))}")
    return tuple(
        (name, value.replace(":", "=").replace(";", ",") if name == "rule_options" else value)
        for name, value in found.items()
    )


def main(
    method: Annotated[str, typer.Argument(help=f"{', '.join(METHODS)}.")],
    shots: Annotated[int, typer.Option(help=f"{SHOTS[0]} or {SHOTS[1]}.")] = SHOTS[-1],
    sampler: Annotated[str, typer.Option(help=f"{', '.join(SAMPLERS)}.")] = UNIFORM,
    changed: Annotated[list[str] | None, typer.Option("--set", help="Settings of a try, name=value,...")] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Of a try.")] = Plan.iterations,
) -> None:
    """Train a method once with each set of settings, and print its accuracy on validation tasks."""
    if method not in METHODS or sampler not in SAMPLERS or shots not in SHOTS:
        raise typer.BadParameter(f"no case has method {method}, sampler {sampler} and {shots} shots")
    torch.set_num_threads(1)
    console = Console(soft_wrap=True)
    for text in changed or [""]:
        case = Case(method, shots, sampler, changes(text))
        found = train(case, SEED, replace(Plan(points=4), iterations=iterations), lambda _: None, test=False)
        figures = ", ".join(f"{point['accuracy']:.3f}" for point in found["curve"])
        tried = f"{method}, {shots}-shot, {sampler}, {text or 'as in the benchmark'}"
        console.print(f"{tried}: {figures}; {found['seconds']:.0f} s", highlight=False, markup=False)


if __name__ == "__main__":
    typer.run(main)
