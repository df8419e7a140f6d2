"""The README's table of headline ratios, from the newest results of every benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Cell = dict[str, Any]


class Row(NamedTuple):
    """One line of the table: a cell of one benchmark's results.

    Attributes:
        title: what is measured
        benchmark: whose results
        chosen: whether a cell is the one
        loop: the peer that runs one task or one operation after another
    """

    title: str
    benchmark: str
    chosen: Callable[[Cell], bool]
    loop: str


ROWS = (
    Row(
        "MAML, a meta-iteration: 32 sinusoid tasks, 5 steps, second order",
        "mlp_inner_loop",
        lambda cell: cell["title"] == "sinusoid 1-40-40-1, T = 32, K = 5, second order",
        "loop",
    ),
    Row(
        "MAML, a meta-iteration: 32 tasks of 5 classes, 64-64-64-5, 5 steps, second order",
        "mlp_inner_loop",
        lambda cell: cell["title"] == "5-way 64-64-64-5, T = 32, K = 5, second order",
        "loop",
    ),
    Row(
        "LSTM optimizer, forward + backward, 100,000 coordinates",
        "lstm_step",
        lambda cell: cell["op"] == "forward_backward" and cell["n"] == 100_000,
        "eager",
    ),
    Row(
        "hierarchical RNN, forward + backward, 4 tensors of 25,000",
        "hrnn_step",
        lambda cell: cell["op"] == "forward_backward" and cell["tensors"] == "4 x 25,000",
        "eager",
    ),
    Row(
        "per-parameter MLP, forward + backward, 10⁶ parameters",
        "mlp_update_step",
        lambda cell: cell["title"] == "forward + backward, 39-32-32-2, 1e6 parameters of convolutions and matrices",
        "eager",
    ),
)


def headline(newest: Mapping[str, Sequence[Path]]) -> str:
    """The table in Markdown.

    Args:
        newest: results files by benchmark, that of the widest instruction set first

    Raises:
        LookupError: for results without the cell of a row
    """
    lines = ["| | plain PyTorch | torch.compile | measured |", "|---|--:|--:|---|"]
    for row in ROWS:
        if not newest.get(row.benchmark):
            continue
        results = json.loads(newest[row.benchmark][0].read_text())
        speedup = next((cell["speedup"] for cell in results["cells"] if row.chosen(cell)), None)
        if speedup is None:
            raise LookupError(f"{newest[row.benchmark][0].name} has no cell for {row.title!r}")
        ratios = [f"{speedup[peer]:.1f}x" if peer in speedup else "" for peer in (row.loop, "compiled")]
        machine = results["machine"]
        where = f"`{results['command']}`, {machine['cpu_capability']}, {machine['date'][:10]}"
        lines.append(f"| {row.title} | {' | '.join(ratios)} | {where} |")
    machine = json.loads(newest[ROWS[0].benchmark][0].read_text())["machine"]
    return "\n".join(
        [
            *lines,
            "",
            "How many times as long plain PyTorch takes, one task or one operation after another, and torch.compile "
            f"of all at once. {machine['cpu']}, {machine['threads']} threads, torch {machine['versions']['torch']}.",
        ]
    )
