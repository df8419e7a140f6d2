"""Puts the measured tables into the README, between their markers.

python -m bench.report [RESULTS.json]
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).parent.parent
END = "<!-- /bench -->"

#: What `metakern eval optimizer digits_lstm --speed` wrote.
DIGITS = ROOT / "bench" / "results" / "digits_lstm" / "results.json"


def newest_results(folder: Path = ROOT / "bench" / "results") -> Path:
    """The file with the latest date inside among those of bench.compare, which measures a processor.

    Raises:
        FileNotFoundError: where there is none
    """
    machines = {path: json.loads(path.read_text()).get("machine", {}) for path in folder.glob("*.json")}
    dates = {path: str(machine["date"]) for path, machine in machines.items() if "cpu" in machine}
    if not dates:
        raise FileNotFoundError(f"{folder} holds no results; run python -m bench.compare first")
    return max(dates, key=dates.__getitem__)


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
    missed = [
        f"{t['name']}: {t['kind']} {t['relation']} {t['required']:g}, measured {t['measured']:.1f}"
        for t in results["targets"]
        if not t["met"]
    ]
    if missed:
        lines += ["", f"Targets missed in this run: {'; '.join(missed)}."]
    return "\n".join(lines)


def render_optimizers(results: dict[str, Any], source: str) -> str:
    """The learned optimizer beside its baselines, and the seconds of a meta-iteration, from `metakern eval`."""
    lines = ["| optimizer | learning rate | training loss | standard deviation |", "|---|--:|--:|--:|"]
    for row in results["optimizers"]:
        rate = "" if row["lr"] is None else f"{row['lr']:.3g}"
        lines.append(f"| {row['optimizer']} | {rate} | {row['final_loss_mean']:.2g} | {row['final_loss_std']:.1g} |")
    speed, environment = results["speed"], results["environment"]
    lines += [
        "",
        f"Mean over {results['networks']} networks after {results['steps']} steps. One meta-iteration of "
        f"{speed['coordinates']:,} coordinates takes {speed['fused_seconds']:.2f} s, in plain PyTorch "
        f"{speed['plain_seconds']:.2f} s: {speed['ratio']:.1f}x, the whole of it, the networks' own forward and "
        "backward included.",
        "",
        f"`{results['command']}` on {environment['cpu']}, {environment['threads']} threads, "
        f"torch {environment['torch']}, {results['date']}; all figures in `{source}`.",
    ]
    return "\n".join(lines)


def insert(text: str, name: str, table: str) -> str:
    """``text`` with ``table`` between the markers of ``name``.

    Raises:
        ValueError: where the markers are not there exactly once, in order
    """
    begin = f"<!-- bench:{name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(END)}", re.DOTALL)
    if text.count(begin) != 1 or len(pattern.findall(text)) != 1:
        raise ValueError(f"the file must hold {begin} and, behind it, {END}, once")
    return pattern.sub(lambda _: f"{begin}\n{table}\n{END}", text)


def main(
    results: Annotated[Path | None, typer.Argument(help="Default: the newest in bench/results.")] = None,
    readme: Annotated[Path, typer.Option(help="The file that holds the markers.")] = ROOT / "README.md",
) -> None:
    """Put the measured tables into the README."""
    path = (results or newest_results()).resolve()
    text = readme.read_text()
    for name, renderer, file in (("lstm_step", render, path), ("digits_lstm", render_optimizers, DIGITS)):
        source = str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else file.name
        text = insert(text, name, renderer(json.loads(file.read_text()), source))
    readme.write_text(text)


if __name__ == "__main__":
    typer.run(main)
