"""The command line: metakern train · eval · info."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table

from metakern import build_info
from metakern.cli import maml, optimizer

app = typer.Typer(no_args_is_help=True, help="Train and evaluate gradient-based meta-learners.")
train_app = typer.Typer(no_args_is_help=True, help="Meta-train a learner.")
eval_app = typer.Typer(no_args_is_help=True, help="Evaluate a trained learner.")
app.add_typer(train_app, name="train")
app.add_typer(eval_app, name="eval")
for learner in (maml, optimizer):
    learner.register(train_app, eval_app)


@app.command()
def info() -> None:
    """What this installation can run: versions, compiler, instruction set in use, CUDA architectures."""
    table = Table(show_header=False)
    for name, value in build_info().items():
        table.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    Console().print(table)
