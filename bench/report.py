"""Puts the measured table into the README, between its markers.

python -m bench.report [RESULTS.json]
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- bench:lstm_step -->", "<!-- /bench -->"


def newest_results(folder: Path = ROOT / "bench" / "results") -> Path:
    """The results file with the latest date inside.

    Raises:
        FileNotFoundError: where there is none
    """
    files = list(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no results; run python -m bench.compare first")
    return max(files, key=lambda path: str(json.loads(path.read_text())["machine"]["date"]))


def render(results: dict[str, Any], source: str) -> str:
    """The table in markdown, with what it was measured on and the targets that were missed."""
    peers = list(results["cells"][0]["speedup"])
    header = ["operation", "coordinates", "metakern", *peers, *(f"against {peer}" for peer in peers), "of FMA floor"]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * 2}{'--:|' * (len(header) - 2)}"]
    for cell in results["cells"]:
        times = [f"{cell['contenders'][name]['ns_per_coordinate']:.0f} ns" for name in ("metakern", *peers)]
        ratios = [f"{cell['speedup'][peer]:.1f}x" for peer in peers]
        first = [cell["op"].replace("_", " + "), f"{cell['n']:,}"]
        lines.append(f"| {' | '.join([*first, *times, *ratios, format(cell['share_of_fma_floor'], '.0%')])} |")
    unroll, machine = results["unroll"], results["machine"]
    ours, peer = unroll["metakern"], unroll["eager"]
    lines += [
        "",
        f"Median time per coordinate and step, H = {results['hidden_size']}, L = {results['num_layers']}. "
        f"A {unroll['steps']}-step unroll of {unroll['n']:,} coordinates, forward and backward: "
        f"{ours['median_s']:.2f} s and {ours['peak_bytes'] / 2**30:.2f} GiB, "
        f"eager {peer['median_s']:.2f} s and {peer['peak_bytes'] / 2**30:.2f} GiB.",
        f"The FMA floor is the time of the FLOPs at {results['sgemm_gflops']:.0f} GFLOP/s, what a large float32 matrix "
        "product reached in the same run.",
        "",
        f"`{results['command']}` on {machine['cpu']}, {machine['threads']} threads, {machine['cpu_capability']}, "
        f"torch {machine['versions']['torch']}, {machine['date']}; all figures in `{source}`.",
    ]
    missed = [f"{t['name']} ({t['measured']:.2f})" for t in results["targets"] if not t["met"]]
    if missed:
        lines += ["", f"Targets missed in this run: {'; '.join(missed)}."]
    return "\n".join(lines)


def insert(text: str, table: str) -> str:
    """``text`` with ``table`` between the markers.

    Raises:
        ValueError: where the markers are not there exactly once, in order
    """
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if text.count(BEGIN) != 1 or len(pattern.findall(text)) != 1:
        raise ValueError(f"the file must hold {BEGIN} and, behind it, {END}, once")
    return pattern.sub(lambda _: f"{BEGIN}\n{table}\n{END}", text)


def main(
    results: Annotated[Path | None, typer.Argument(help="Default: the newest in bench/results.")] = None,
    readme: Annotated[Path, typer.Option(help="The file that holds the markers.")] = ROOT / "README.md",
) -> None:
    """Put the measured table into the README."""
    path = (results or newest_results()).resolve()
    source = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    readme.write_text(insert(readme.read_text(), render(json.loads(path.read_text()), source)))


if __name__ == "__main__":
    typer.run(main)
