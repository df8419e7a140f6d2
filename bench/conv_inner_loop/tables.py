"""The table of docs/benchmarks.md."""

from __future__ import annotations

from typing import Any

#: Contenders whose ratios have a column if they took part in any case.
PEERS = ("metakern, vectorize=False", "loop", "learn2learn", "higher", "torchopt", "vmap", "compiled")


def conv_lines(results: dict[str, Any]) -> list[str]:
    """A row for every case: metakern's time, how many times as long the others take, the share of sgemm."""
    cells = results["cells"]
    peers = [name for name in PEERS if any(name in cell["speedup"] or name in cell["wrong"] for cell in cells)]
    header = ["case", "metakern", *peers, "of sgemm"]
    lines = [f"| {' | '.join(header)} |", f"|---|{'--:|' * (len(header) - 1)}"]
    for cell in cells:
        ours = f"{cell['contenders']['metakern']['median_s'] * 1e3:.0f} ms"
        ratios = [_ratio(cell, name) for name in peers]
        lines.append(f"| {' | '.join([cell['title'], ours, *ratios, format(cell['share_of_sgemm'], '.0%')])} |")
    lines += [
        "",
        "Median time of a meta-iteration, all query losses and the backward of their mean. The other columns say how "
        "many times as long the others take, “wrong” that their meta-gradients are; the last one the share of the "
        f"FLOPs in a second of a large float32 matrix product, {results['sgemm_gflops']:.0f} GFLOP/s in the same run.",
    ]
    absent = [f"{name} ({note})" for name, note in results["libraries"].items() if note.startswith("not ")]
    return [*lines, "", f"Without {'; '.join(absent)}."] if absent else lines


def _ratio(cell: dict[str, Any], name: str) -> str:
    if name in cell["wrong"]:
        return "wrong"
    return f"{cell['speedup'][name]:.2f}x" if name in cell["speedup"] else ""
