"""Tables of docs/benchmarks.md: hrnn_step, mlp_update_step, rules on lstm_step's stages, and evolution strategies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def _table(header: Sequence[str], named: int, rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first ``named`` columns are text."""
    ruler = f"|{'---|' * named}{'--:|' * (len(header) - named)}"
    return [f"| {' | '.join(header)} |", ruler, *(f"| {' | '.join(row)} |" for row in rows)]


def _against(cell: dict[str, Any], coordinates: int) -> list[str]:
    """Times of metakern and its peers in ns per coordinate, and the ratios; empty where a peer was left out."""
    times = []
    for name in ("metakern", "eager", "compiled"):
        time = cell["contenders"].get(name)
        times.append("" if time is None else f"{time['median_s'] / coordinates * 1e9:.0f} ns")
    ratios = [f"{cell['speedup'][name]:.1f}x" if name in cell["speedup"] else "" for name in ("eager", "compiled")]
    return times + ratios


COLUMNS = ("metakern", "eager", "compiled", "against eager", "against compiled")


def hrnn_lines(results: dict[str, Any]) -> list[str]:
    """hrnn_step: a row for each set of tensors and each operation."""
    rows = [
        [
            cell["tensors"],
            cell["op"].replace("_", " + "),
            *_against(cell, cell["n"]),
            f"{cell['share_of_floor']:.0%}",
        ]
        for cell in results["cells"]
    ]
    header = ("tensors", "operation", *COLUMNS, "of the floor")
    return [
        *_table(header, 2, rows),
        "",
        f"Median time per coordinate and step. The floor: {results['floor']}; the kernels' own exponentials take less "
        "than torch.exp, so that a share may pass 100 %. A step keeps "
        f"{results['kept_bytes']:.0f} bytes a coordinate for its backward.",
    ]


def mlp_update_lines(results: dict[str, Any]) -> list[str]:
    """mlp_update_step: a row for each case."""
    rows = []
    for cell in results["cells"]:
        copied = cell["share_of_copy"]
        shares = [f"{cell['share_of_sgemm']:.0%}", "" if copied is None else f"{copied:.0%}"]
        rows.append([cell["title"], *_against(cell, cell["coordinates"]), *shares])
    return [
        *_table(("case", *COLUMNS, "of sgemm", "of copy"), 1, rows),
        "",
        "Median time per coordinate and step; shares of the FLOPs in a second of a large float32 matrix product, and "
        "of the bytes in a second of a large copy, both of the same run.",
    ]


def rules_lines(results: dict[str, Any]) -> list[str]:
    """RNNProp and Meta-LSTM against lstm_step of the same sizes."""
    rows = []
    for cell in results["cells"]:
        for op, found in cell["ops"].items():
            kept = f"{cell['kept_bytes_per_coordinate']['rule']:.0f}"
            multiple = f"{found['multiple_of_lstm_step']:.2f}"
            rows.append([cell["rule"], op.replace("_", " + "), f"{cell['n']:,}", multiple, kept])
    return [
        *_table(("rule", "operation", "coordinates", "times lstm_step's time", "bytes kept"), 2, rows),
        "",
        "Medians, against `lstm_step` with as many units and layers. Bytes kept for backward, a coordinate and step.",
    ]


def evolution_lines(results: dict[str, Any]) -> list[str]:
    """A truncation of antithetic pairs against two forward unrolls."""
    rows = []
    for cell in results["costs"]:
        times = [f"{cell['contenders'][name]['median_s'] * 1e3:.0f} ms" for name in ("pes", "forward")]
        rows.append([cell["rule"], f"{cell['tasks']} {cell['problem']}", *times, f"{cell['over_two_forward']:.2f}"])
    return [
        *_table(("rule", "problems", "PES", "forward unroll", "PES over two unrolls"), 2, rows),
        "",
        f"Median time of a truncation of {results['unroll']} steps: one estimate of `pes` with as many antithetic "
        "pairs as there are problems, restarts included, and the unroll of the problems by the unperturbed rule.",
    ]
