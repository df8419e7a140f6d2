"""Inserts the measured tables into docs/benchmarks.md and the headline ratios into the README, between their markers.

There is one table per measured instruction set.

python -m bench.report [RESULTS.json ...]
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import gpu_budget
from bench.conv_inner_loop.tables import conv_lines
from bench.few_shot.tables import few_shot_lines
from bench.headline import headline
from bench.paper.tables import paper_lines
from bench.step_tables import evolution_lines, hrnn_lines, mlp_update_lines, rules_lines
from bench.targets import measured

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "bench" / "results"
END = "<!-- /bench -->"

#: Results of `metakern eval optimizer digits_lstm --speed`.
DIGITS = FOLDER / "digits_lstm" / "results.json"


def benchmark_of(path: Path) -> str:
    """The benchmark of a results file; older files of lstm_step do not name it."""
    return str(json.loads(path.read_text()).get("benchmark", "lstm_step"))


#: Names of the instruction sets in tables, in the order of the tables.
CAPABILITIES = {"avx512": "AVX-512", "avx2": "AVX2", "baseline": "SSE2, the baseline of x86-64"}


def capability_of(path: Path) -> str:
    """The instruction set of a results file; empty on a GPU or if not recorded."""
    results = json.loads(path.read_text())
    described = results.get("machine", {}) | results.get("environment", {})
    return str(described.get("cpu_capability", ""))


def newest_results(folder: Path = FOLDER, benchmark: str = "lstm_step") -> dict[str, Path]:
    """The newest results file (by the date inside) per instruction set, for one benchmark and its kind of device.

    Partial measurements (``--cases``, ``--case``) do not count.
    """
    kind = "gpu" if benchmark == "gpu" else "cpu"
    newest: dict[str, tuple[str, Path]] = {}
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text())
        machine = results.get("machine", {})
        if benchmark_of(path) != benchmark or kind not in machine or "--case" in results.get("command", ""):
            continue
        capability = capability_of(path)
        newest[capability] = max(newest.get(capability, ("", path)), (str(machine["date"]), path))
    return {capability: path for capability, (_, path) in newest.items()}


def render(results: dict[str, Any], source: str) -> str:
    """The table in markdown, with its provenance and missed targets."""
    peers = list(results["cells"][0]["speedup"])
    header = ["operation", "coordinates", "metakern", *peers, *(f"against {peer}" for peer in peers), "of FMA floor"]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * 2}{'--:|' * (len(header) - 2)}"]
    for cell in results["cells"]:
        times = [f"{cell['contenders'][name]['ns_per_coordinate']:.0f} ns" for name in ("metakern", *peers)]
        ratios = [f"{cell['speedup'][peer]:.1f}x" for peer in peers]
        first = [cell["op"].replace("_", " + "), f"{cell['n']:,}"]
        lines.append(f"| {' | '.join([*first, *times, *ratios, format(cell['share_of_fma_floor'], '.0%')])} |")
    unroll = results["unroll"]
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
        _provenance(results, source),
    ]
    return "\n".join(lines + _missed(results))


def _provenance(results: dict[str, Any], source: str) -> str:
    """The command, machine, date and file of the figures."""
    machine = results["machine"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    return (
        f"`{results['command']}` on {machine['cpu']}, {threads}, {machine['cpu_capability']}, "
        f"torch {machine['versions']['torch']}, {machine['date']}; all figures in `{source}`."
    )


def _missed(results: dict[str, Any]) -> list[str]:
    """A paragraph with the missed targets, if any."""
    missed = [
        f"{t['name']}: {t['kind']} {t['relation']} {t['required']:g}, measured {measured(t, 1)}"
        for t in results["targets"]
        if not t["met"]
    ]
    return ["", f"Targets missed in this run: {'; '.join(missed)}."] if missed else []


def render_inner_loop(results: dict[str, Any], source: str) -> str:
    """Meta-iterations of metakern and of its peers, one task's adaptation, memory, and the targets missed."""
    peers = list(dict.fromkeys(name for cell in results["cells"] for name in cell["speedup"]))
    header = ["case", "metakern", *peers, "of sgemm"]
    lines = [f"| {' | '.join(header)} |", f"|---|{'--:|' * (len(header) - 1)}"]
    for cell in results["cells"]:
        ours = f"{cell['contenders']['metakern']['median_s'] * 1e3:.2f} ms"
        ratios = [f"{cell['speedup'][peer]:.1f}x" if peer in cell["speedup"] else "" for peer in peers]
        lines.append(f"| {' | '.join([cell['title'], ours, *ratios, format(cell['share_of_sgemm'], '.1%')])} |")
    lines += [
        "",
        "Median time of a meta-iteration, all query losses and the backward of their mean: by "
        "`metakern.meta_backward`, and by autograd from `metakern.meta_loss`; the compiled peer's is one call, too. "
        "The other columns say how many times as long the peers take, the last one the share of the FLOPs in a "
        f"second of a large float32 matrix product, {results['sgemm_gflops']:.0f} GFLOP/s in the same run.",
        *_first_results(results["cells"]),
        _adapt_sentence(results["adapt"]),
        *(_memory_sentence(memory) for memory in results["memory"]),
        "",
        _provenance(results, source),
    ]
    absent = [f"{name} ({note})" for name, note in results["libraries"].items() if note.startswith("not importable")]
    if absent:
        lines += ["", f"Not measured: {'; '.join(absent)}."]
    return "\n".join(lines + _missed(results))


def _first_results(cells: list[dict[str, Any]]) -> list[str]:
    """A sentence with the time to torch.compile's first result, if measured."""
    pairs = [cell["first_result_s"] for cell in cells if "compiled" in cell["first_result_s"]]
    if not pairs:
        return []
    ours, compiled = (sorted(pair[name] for pair in pairs) for name in ("metakern", "compiled"))
    return [
        f"The first result takes {compiled[0]:.0f} to {compiled[-1]:.0f} s with torch.compile, "
        f"{ours[0]:.3f} to {ours[-1]:.3f} s with metakern."
    ]


def _adapt_sentence(adapt: dict[str, Any]) -> str:
    """A sentence on one task, with learn2learn's calls."""
    times = {name: f"{time['median_s'] * 1e6:.0f} µs" for name, time in adapt["contenders"].items()}
    ours = times.pop("metakern.MAML")
    peers = ", ".join(f"{name} {time}" for name, time in times.items())
    return f"One task by `MAML.adapt`, forward and backward ({adapt['title']}): {ours}; {peers}."


def _memory_sentence(memory: dict[str, Any]) -> str:
    """A sentence on every contender's peak memory."""
    peaks = (f"{name} {run['peak_bytes'] / 2**20:.0f} MiB" for name, run in memory["contenders"].items())
    return f"Peak memory, {memory['title']}: {'; '.join(peaks)}."


def render_sinusoid(results: dict[str, Any], source: str) -> str:
    """Test losses of both ways of training, their paired difference and their seconds."""
    ways, case = results["ways"], results["training"]
    lines = [f"| steps at test | {' | '.join(ways)} | difference |", f"|--:|{'--:|' * (len(ways) + 1)}"]

    def shown(entry: dict[str, Any], digits: int) -> str:
        low, high = (f"{entry[key]:.{digits}f}" for key in ("low", "high"))
        return f"{entry['mean']:.{digits}f} ({low} to {high})"

    for steps, difference in results["difference"].items():
        losses = [shown(way["test_loss"][steps], 3) for way in ways.values()]
        lines.append(f"| {steps} | {' | '.join(losses)} | {shown(difference, 4)} |")
    seconds = (
        f"{name} {way['seconds']['mean']:.0f} s, {way['cpu_seconds']['mean']:.0f} s of them on the processor"
        for name, way in ways.items()
    )
    first = results["first_iterations"]
    lines += [
        "",
        f"Mean squared error on the query samples of {results['held_out_tasks']:,} held-out tasks, "
        f"{results['held_out_queries']} each: mean and 95 % interval (Student's t) of {results['seeds']} seeds; the "
        f"difference is paired by seed. Each run takes {results['iterations']:,} meta-iterations of {case['tasks']} "
        f"tasks, {case['support']} support and {case['query']} query samples, K = {case['steps']}, second order, "
        f"α = {case['lr']:g}, Adam with {results['outer_lr']:g}, from the same weights on the same tasks: "
        f"{'; '.join(seconds)}; making the tasks and Adam included. Over the first {first['iterations']} iterations "
        f"the losses of both agree to {first['float64']:.0e} in float64, to {first['float32']:.0e} in float32.",
        "",
        _provenance(results, source),
    ]
    return "\n".join(lines + _missed(results))


def render_optimizee_groups(results: dict[str, Any], source: str) -> str:
    """Seconds of a meta-iteration over problems one by one, grouped by shape, and grouped with one launch."""
    names = {"one by one": "one by one", "grouped": "grouped by shape", "one launch": "grouped, one launch"}
    lines = [f"| problems | kinds | {' | '.join(names.values())} |", f"|---|--:|{'--:|' * len(names)}"]
    for cell in results["cells"]:
        times = [f"{cell['contenders'][way]['median_s'] * 1e3:.0f} ms" for way in names]
        ratios = [f" ({cell['speedup_over_one_by_one'][way]:.1f}x)" for way in names]
        figures = [times[0], *(time + ratio for time, ratio in zip(times[1:], ratios[1:], strict=True))]
        lines.append(f"| {cell['tasks']} {cell['mixture']} | {cell['groups']} | {' | '.join(figures)} |")
    lines += [
        "",
        f"Median time of a meta-iteration of {results['steps']} inner steps with its backward, "
        f"minibatches of {results['batch_size']}; in parentheses how many times as fast as problems one by one. All "
        "three ways compute one meta-gradient. “Both” is of test functions and digit networks.",
        "",
        _provenance(results, source),
    ]
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


#: Measures of clustered problems, and the columns of their tables.
MEASURES = {"loss": "MSE", "accuracy": "accuracy", "log_loss": "log₁₀ loss"}
CLUSTERED_COLUMNS = (
    "way",
    "equal tasks",
    "difference from the first",
    "by one learner",
    "told the mode",
    "equal time",
    "reaches it after",
)


def render_clusters(results: dict[str, Any], source: str) -> str:
    """Every way of training against the uniform sampler, for equal tasks and equal time, by problem."""
    lines: list[str] = []
    for found in results["problems"].values():
        settings = found["settings"]
        lines += [
            f"**{settings['title']}**, test {MEASURES[settings['measure']]}, {settings['iterations']:,} "
            f"meta-iterations, Adam with {settings['outer_lr']:g}",
            "",
            f"| {' | '.join(CLUSTERED_COLUMNS)} |",
            f"|---|{'--:|' * (len(CLUSTERED_COLUMNS) - 1)}",
            *(f"| {' | '.join(way_cells(way, results['seeds']))} |" for way in found["ways"].values()),
            "",
        ]
    lines += [
        f"Mean and 95 % interval (Student's t) of {results['seeds']} seeds, of {results['held_out_tasks']:,} test "
        f"tasks that no choice was made by, {results['tasks']} tasks a meta-iteration. The intervals are over training "
        "runs, all tested on the same tasks. Differences are paired by seed. By one learner: without the average of "
        "the clusters' predictions. Every 100 iterations clusters also look at the support sets of 512 tasks, a sixth "
        "more than are trained on. Equal time: no more processor time than the first way took, one thread each. "
        "The numbers of clusters by least loss, their stages and the decay were chosen on validation tasks with seed "
        "0; soft assignment, KMeans alone and batches by cluster were not tuned. "
        "The last column: the share of the first way's iterations, and of its time, after which the validation curve, "
        "by one learner, first is where that of the first way ends.",
        "",
        _provenance(results, source),
    ]
    return "\n".join(lines + _missed(results))


def way_cells(way: dict[str, Any], seeds: int) -> list[str]:
    """A way's cells for :data:`CLUSTERED_COLUMNS`."""

    def interval(entry: dict[str, Any]) -> str:
        return f"{entry['mean']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})"

    found = [of for of in way["reaches_plain"] if of is not None]
    reaches = " / ".join(f"{sum(of[key] for of in found) / len(found):.0%}" for key in found[0]) if found else "never"
    reaches += f" ({len(found)} of {seeds} seeds)" if 0 < len(found) < seeds else ""
    told = interval(way["test_told"]) if "test_told" in way else ""
    figures = (way["test"], way["difference"], way["test_of_one"])
    equal = interval(way["equal_time"]["test"]) if "equal_time" in way else ""
    return [way["title"], *map(interval, figures), told, equal, reaches]


NOT_MEASURED = "not measured yet"


def render_gpu(results: dict[str, Any], source: str) -> str:
    """GPU results: a meta-iteration of the inner loop and an update of a list, by both backends."""
    lines = [
        "| operation | case | CUDA C++ | Triton | against the best peer |",
        "|---|---|--:|--:|--:|",
    ]
    loops = results.get("loops", {})
    for key, operation in (("mlp_inner_loop", "meta-iteration"), ("inner_update", "`inner_update`")):
        cells = {cell["title"]: cell for cell in loops.get(key, [])}
        rows = ((title, " | ".join(_gpu_figures(cells.get(title)))) for title in GPU_CASES[key])
        lines += [f"| {operation} | {title} | {figures} |" for title, figures in rows]
    if results:
        gpu, versions = results["machine"]["gpu"], results["machine"]["versions"]
        lines += [
            "",
            f"`{results['command']}` on {gpu}, CUDA {versions['cuda']}, torch {versions['torch']}, "
            f"{results['machine']['date']}; all figures in `{source}`.",
        ]
    return "\n".join(lines)


def _gpu_figures(cell: dict[str, Any] | None) -> list[str]:
    """Microseconds of both backends, and the speed-up of the faster one over the fastest peer."""
    ours = {} if cell is None else {n: cell["contenders"][n] for n in ("cuda", "triton") if n in cell["contenders"]}
    times = [f"{ours[n]['median_s'] * 1e6:.0f} µs" if n in ours else NOT_MEASURED for n in ("cuda", "triton")]
    ratios = [ratio for entry in ours.values() if (ratio := entry["speedup_over_fastest_peer"]) is not None]
    if cell is None or not ratios:
        return [*times, NOT_MEASURED]
    return [*times, f"{max(ratios):.1f}x ({cell['fastest_peer']})"]


def render_lines(lines: Callable[[dict[str, Any]], list[str]]) -> Callable[[dict[str, Any], str], str]:
    """A renderer that puts provenance and missed targets below ``lines(results)``."""
    return lambda results, source: "\n".join([*lines(results), "", _provenance(results, source), *_missed(results)])


def insert(text: str, name: str, table: str) -> str:
    """``text`` with ``table`` between the markers of ``name``.

    Raises:
        ValueError: unless both markers are there exactly once, in order
    """
    begin = f"<!-- bench:{name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(END)}", re.DOTALL)
    if text.count(begin) != 1 or len(pattern.findall(text)) != 1:
        raise ValueError(f"the file must hold {begin} and, behind it, {END}, once")
    return pattern.sub(lambda _: f"{begin}\n{table}\n{END}", text)


#: Renderers by a table's name in docs/benchmarks.md.
TABLES = {
    "lstm_step": render,
    "lstm_step_rules": render_lines(rules_lines),
    "hrnn_step": render_lines(hrnn_lines),
    "mlp_update_step": render_lines(mlp_update_lines),
    "evolution": render_lines(evolution_lines),
    "digits_lstm": render_optimizers,
    "mlp_inner_loop": render_inner_loop,
    "conv_inner_loop": render_lines(conv_lines),
    "sinusoid": render_sinusoid,
    "clusters": render_clusters,
    "few_shot": render_lines(few_shot_lines),
    "optimizee_groups": render_optimizee_groups,
    "paper": render_lines(paper_lines),
    "gpu": render_gpu,
}

#: Rows of the GPU table, measured or not.
GPU_CASES = {name: [case.title for case in gpu_budget.FULL.cases[name]] for name in ("mlp_inner_loop", "inner_update")}


def sources(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Results files per table, one per instruction set: the given ones, else the newest, if any.

    Raises:
        ValueError: for a file of a benchmark without a table
    """
    given: dict[str, dict[str, Path]] = {}
    for path in files:
        given.setdefault(benchmark_of(path), {})[capability_of(path)] = path.resolve()
    if unknown := given.keys() - TABLES.keys():
        raise ValueError(f"the files must be results of {', '.join(TABLES)}, got {', '.join(sorted(unknown))}")
    found = {name: newest_results(FOLDER, name) for name in TABLES} | {"digits_lstm": {"": DIGITS}} | given
    order = {capability: place for place, capability in enumerate(CAPABILITIES)}
    return {
        name: [paths[capability] for capability in sorted(paths, key=lambda c: (order.get(c, len(order)), c))]
        for name, paths in found.items()
        if paths
    }


def _title(file: Path) -> str:
    capability = capability_of(file)
    return CAPABILITIES.get(capability, capability or "instruction set not recorded")


def tables(name: str, files: Sequence[Path]) -> str:
    """The tables of a benchmark, one per file; with the instruction set as heading if there are several."""
    parts = []
    for file in files:
        source = str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else file.name
        table = TABLES[name](json.loads(file.read_text()), source)
        parts.append(f"**{_title(file)}**\n\n{table}" if len(files) > 1 else table)
    return "\n\n".join(parts)


def main(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Default: the newest of each instruction set in bench/results.")
    ] = None,
    page: Annotated[Path, typer.Option(help="The file that holds the tables' markers.")] = ROOT / "docs/benchmarks.md",
    readme: Annotated[Path | None, typer.Option(help="The file of the headline ratios; default: README.md.")] = None,
) -> None:
    """Put the measured tables into the documentation; what was not measured stays as it is."""
    text = insert(page.read_text(), "gpu", render_gpu({}, ""))
    found = sources(results or [])
    for name, files in found.items():
        text = insert(text, name, tables(name, files))
    page.write_text(text)
    if readme is None and not results:
        readme = ROOT / "README.md"
    if readme is not None:
        readme.write_text(insert(readme.read_text(), "headline", headline(found)))


if __name__ == "__main__":
    typer.run(main)
