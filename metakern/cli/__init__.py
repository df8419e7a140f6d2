"""The command line: metakern train · eval · info · --version."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from metakern.cli import maml, optimizer
from metakern.core.backend import build_info
from metakern.core.version import __version__

app = typer.Typer(no_args_is_help=True)
train_app = typer.Typer(no_args_is_help=True, help="Meta-train a learner.")
eval_app = typer.Typer(no_args_is_help=True, help="Evaluate a trained learner.")
app.add_typer(train_app, name="train")
app.add_typer(eval_app, name="eval")
for learner in (maml, optimizer):
    learner.register(train_app, eval_app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"metakern {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, metavar="", help="Print the version.")
    ] = False,
) -> None:
    """Train and evaluate gradient-based meta-learners."""


@app.command()
def info() -> None:
    """What this installation can run: versions, compiler, instruction set in use, CUDA architectures."""
    table = Table(show_header=False)
    for name, value in build_info().items():
        table.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    Console().print(table)
