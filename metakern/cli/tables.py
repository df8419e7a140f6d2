"""Tables of results; figures are never truncated, on a terminal or in a pipe."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from metakern.evaluation.adaptation import Adaptation

#: Minimum width of a name column; longer names wrap.
NAME_WIDTH = 8

#: Style of the row to highlight.
BEST = "bold green"


def figures_table(title: str, *columns: str, caption: str | None = None) -> Table:
    """An empty table whose columns do not shrink: names left-aligned in the first, figures in the others."""
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    return table


def width_of(table: Table) -> int:
    """Terminal width at which rich truncates nothing in a table; rich cuts columns that may not wrap."""
    width = 1
    for column in table.columns:
        lines = [line for cell in (column.header, *column.cells) for line in str(cell).split("\n")]
        widest = max(map(cell_len, lines))
        width += 3 + (widest if column.no_wrap else min(widest, NAME_WIDTH))
    return width


def print_table(console: Console, table: Table) -> None:
    """Print a table without truncation; lines may be longer than a narrow console."""
    before = console.width
    console.width = max(before, width_of(table))
    try:
        console.print(table, crop=False)
    finally:
        console.width = before


def adaptation_table(console: Console, adaptations: Sequence[Adaptation]) -> Table:
    """Mean and 95 % interval of every learner's loss and accuracy after every number of inner steps.

    Learners are shown side by side if the console is wide enough, otherwise below each other.
    """
    title = f"{adaptations[0].num_tasks} unseen tasks, ± half of the 95 % interval"
    table = _side_by_side(title, adaptations)
    return table if len(adaptations) == 1 or width_of(table) <= console.width else _below(title, adaptations)


def _side_by_side(title: str, adaptations: Sequence[Adaptation]) -> Table:
    named = len(adaptations) > 1
    columns = [
        (f"{each.name}\n{name}" if named else name, _cells(each, name))
        for each in adaptations
        for name in each.measures
    ]
    table = figures_table(title, "inner steps", *(head for head, _ in columns))
    table.columns[0].justify = "right"
    last = max(len(cells) for _, cells in columns) - 1
    for step in range(last + 1):
        row = [cells[step] if step < len(cells) else "" for _, cells in columns]
        table.add_row(str(step), *row, style=BEST if step == last else "")
    return table


def _below(title: str, adaptations: Sequence[Adaptation]) -> Table:
    names = list(dict.fromkeys(name for each in adaptations for name in each.measures))
    table = figures_table(title, "run", "inner\nsteps", *names)
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"  # long paths wrap
    for each in adaptations:
        columns = [_cells(each, name) if name in each.measures else [] for name in names]
        last = max(map(len, columns)) - 1
        for step in range(last + 1):
            row = [cells[step] if step < len(cells) else "" for cells in columns]
            table.add_row("" if step else each.name, str(step), *row, style=BEST if step == last else "")
        table.add_section()
    return table


def _cells(adaptation: Adaptation, name: str) -> list[str]:
    return [_cell(name, row["mean"], row["interval"]) for row in adaptation.summary()[name]]


def _cell(name: str, mean: float, half: float) -> str:
    if name == "accuracy":
        return f"{100 * mean:.1f} ± {100 * half:.1f} %"
    return f"{f'{mean:#.4g}'.rstrip('.')} ± {half:.2g}"  # the same number of digits in every row
