"""The experiment's tables for docs/benchmarks.md, from bench/results/paper.json."""

from __future__ import annotations

from typing import Any

#: The ways that metakern is compared with beside the sequential one.
SLOWER = ("vmap", "compiled")

#: All ways, in the order of figures.
TIMED = ("sequential", *SLOWER, "metakern", "metakern, clusters")

RULE_TITLES = {"lstm": "coordinatewise LSTM", "hrnn": "hierarchical RNN"}
CAPABILITY_TITLES = {"avx512": "AVX-512", "avx2": "AVX2", "baseline": "SSE2"}


def paper_lines(results: dict[str, Any]) -> list[str]:
    """Tables of the times and of the meta-losses."""
    return [*_times(results), *_learning(results)]


def _times(results: dict[str, Any]) -> list[str]:
    if not results["times"]:
        return []
    lines = [
        "| optimizer | way | seconds | tasks/s | metakern is faster by | optimizee | rule | meta-backward | MiB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for capability, times in results["times"].items():
        for rule, entry in times["rules"].items():
            title = f"{RULE_TITLES[rule]}, {CAPABILITY_TITLES[capability]}"
            for name, figures in entry["contenders"].items():
                ratio, shares = entry["speedup"].get(name), entry["profile"].get(name, {})
                faster = "" if ratio is None else f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
                parts = [f"{shares[key]:.0%}" if key in shares else "" for key in ("optimizee", "rule", "backward")]
                peak = entry.get("peak_bytes", {}).get(name)
                memory = "" if peak is None else f"{peak / 2**20:.0f}"
                cells = [title, name, f"{figures['median_s']:.3f}", f"{figures['tasks_per_second']:.0f}", faster]
                lines.append(f"| {' | '.join([*cells, *parts, memory])} |")
    first = next(iter(results["times"].values()))
    entry = next(iter(first["rules"].values()))
    worst = max(
        x
        for times in results["times"].values()
        for of in times["rules"].values()
        for differ in of["differences"].values()
        for x in differ.values()
    )
    lines += [
        "",
        f"A meta-iteration of {first['steps']} steps with its backward on {entry['tasks']} networks, "
        f"{first['tasks_of_a_kind']} each of {', '.join(first['kinds'])}, {entry['coordinates']:,} coordinates, each "
        f"network with data of its own; {first['machine']['threads']} threads; medians in turns, ratios with those of "
        f"the 20 and 80 % quantiles. Meta-losses and meta-gradients of all ways agree to {worst:.0e}. Sequential: one "
        "task after another in eager PyTorch. vmap: the tasks of one kind side by side. compiled: torch.compile of "
        "that, one graph for a step of each kind.",
        "",
    ]
    return lines


def _learning(results: dict[str, Any]) -> list[str]:
    if not results["learning"]:
        return []
    lines = [
        "| optimizer | training | test meta-loss | difference | loss after the episode | reaches it after |",
        "|---|---|--:|--:|--:|--:|",
    ]

    def interval(entry: dict[str, Any]) -> str:
        return f"{entry['mean']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})"

    for rule, entry in results["learning"].items():
        for way in entry["ways"].values():
            cells = [RULE_TITLES[rule], way["title"], interval(way["test"]), interval(way["difference"])]
            reaches = _reaches(way["reaches"])
            lines.append(f"| {' | '.join([*cells, interval(way['test_final']), reaches])} |")
    goals = ", ".join(
        f"{entry['goal']['mean']:.3f} for the {RULE_TITLES[r]}" for r, entry in results["learning"].items()
    )
    lines += [
        "",
        f"Meta-loss: the mean over {results['steps']} steps of log(f + 0.001). {results['iterations']} meta-iterations "
        f"of {results['tasks']} tasks, {results['seeds']} seeds, mean and 95 % interval (Student's t); "
        f"{results['test_tasks']} test tasks of other sizes and images, listed in `bench/paper/test_tasks.py`, that no "
        "choice was made on. The last column: the share of the iterations, and the processor seconds of one thread, "
        f"after which the validation meta-loss first is where one rule ends ({goals}).",
    ]
    return lines + _derived(results)


def _derived(results: dict[str, Any]) -> list[str]:
    """A sentence for each instruction set and rule: seconds of every way to the meta-loss that one rule ends at."""
    lines = []
    for capability, of in results["derived_seconds"].items():
        for rule, seconds in of.items():
            figures = ", ".join(f"{name} {value:,.0f} s" for name, value in seconds.items())
            lines.append(f"{RULE_TITLES[rule]} on {CAPABILITY_TITLES[capability]}: {figures}")
    if not lines:
        return []
    text = "; ".join(lines)
    return [
        "",
        f"To one rule's last meta-loss, derived from metakern's seconds and the ratios of a meta-iteration: {text}.",
    ]


def _reaches(found: list[dict[str, float] | None]) -> str:
    """Mean share of the iterations and seconds, over the seeds that get there."""
    there = [of for of in found if of is not None]
    if not there:
        return "never"
    share, seconds = (sum(of[key] for of in there) / len(there) for key in ("share", "seconds"))
    missing = f" ({len(there)} of {len(found)} seeds)" if len(there) < len(found) else ""
    return f"{share:.0%}, {seconds:.0f} s{missing}"
