"""The few-shot benchmark's table for the documentation, from bench/results/few-shot.json."""

from __future__ import annotations

from typing import Any

SAMPLER_TITLES = {"uniform": "uniform", "clusters": "balanced over clusters"}


def few_shot_lines(results: dict[str, Any]) -> list[str]:
    """One row a method and sampler: accuracy for equal tasks and for equal time, and seconds, by shots."""
    by_case = {(case["method"], case["sampler"], case["shots"]): case for case in results["cases"]}
    shots = list(dict.fromkeys(of for _, _, of in by_case))
    titles = [f"{number}-shot, {what}" for number in shots for what in ("equal tasks", "equal time", "seconds")]
    lines = [f"| inner update | sampler | {' | '.join(titles)} |", f"|---|---|{'--:|' * len(titles)}"]
    for method, sampler in dict.fromkeys((method, sampler) for method, sampler, _ in by_case):
        found = [by_case[method, sampler, number] for number in shots]
        title = f"{found[0]['title']}, {found[0]['steps']} steps"
        cells = [title, SAMPLER_TITLES[sampler], *(cell for case in found for cell in _cells(case))]
        lines.append(f"| {' | '.join(cells)} |")
    maml = {number: by_case["maml", "uniform", number] for number in shots}
    budget = " and ".join(f"{case['seconds']['mean']:.1f} s ({number}-shot)" for number, case in maml.items())
    lines += [
        "",
        "Accuracy on 5-way digits, the images of a task in one of four domains: mean and 95 % interval (Student's t) "
        f"of {results['seeds']} seeds, on {results['test_tasks']:,} test tasks of digits that no training task has. "
        f"Equal tasks: {results['tasks']:,} training tasks, {results['num_tasks']} a meta-iteration. "
        f"Equal time: no more processor time than MAML took for them, {budget}; in "
        "parentheses the training tasks that it was enough for. Seconds: processor time of training on the equal "
        "tasks, one thread. An MLP 64-32-5, whose start every method learns. The LSTM rule and Meta-LSTM take "
        "gradients as constants, MAML, Meta-SGD and ANIL are exact to second order. Balanced over clusters: as many "
        "tasks of each of four clusters of support gradients in a meta-iteration.",
    ]
    return lines


def _cells(case: dict[str, Any]) -> list[str]:
    timed = case["equal_time"]
    return [
        _interval(case["test"]),
        f"{_interval(timed['test'])} ({timed['tasks']:,})",
        f"{case['seconds']['mean']:.1f}",
    ]


def _interval(entry: dict[str, Any]) -> str:
    return f"{entry['mean']:.3f} ± {(entry['high'] - entry['low']) / 2:.3f}"
