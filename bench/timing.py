"""Timing in one process: alternating contenders, samples of sufficient length, quantiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

#: Minimum length of a timing sample in seconds; short calls are repeated.
SAMPLE_SECONDS = 2e-3

Calls = Sequence[Callable[[], Any]]


def wall_seconds(work: Callable[[], Any]) -> float:
    """Seconds of a function call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """Median, 20% and 80% quantile and minimum of seconds, and their count."""
    q20, median, q80 = torch.tensor(samples, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return {
        "median_s": float(median),
        "q20_s": float(q20),
        "q80_s": float(q80),
        "min_s": min(samples),
        "samples": len(samples),
    }


def alternate(
    contenders: Mapping[str, Calls],
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
    sample_seconds: float = SAMPLE_SECONDS,
    progress: Callable[[float], None] = lambda _: None,
    clock: Callable[[Callable[[], Any]], float] = wall_seconds,
    warm: bool = False,
) -> dict[str, dict[str, float]]:
    """Time every contender in turn, round after round, for about ``seconds`` in all.

    Args:
        contenders: for each name, the same call on several inputs, which are used in turn.
        seconds: budget; at least ``min_rounds`` and at most ``max_rounds`` rounds are measured.
        min_rounds: see above
        max_rounds: see above
        sample_seconds: minimum length of a sample; shorter calls are repeated. The first calls of a sample see caches
            and branch predictors as another contender left them; a long sample measures a loop's steady state.
        progress: called with the finished share.
        clock: measures the seconds that a function keeps the device busy.
        warm: whether all contenders have run already, for calls of seconds: they are not warmed up again.

    Returns:
        :func:`quantiles` of the seconds per call, by name
    """
    position = dict.fromkeys(contenders, 0)

    def sample(name: str, repeats: int) -> float:
        calls, first = contenders[name], position[name]
        position[name] += repeats

        def work() -> None:
            for index in range(first, first + repeats):
                calls[index % len(calls)]()

        return clock(work) / repeats

    repeats = {}
    for name, calls in contenders.items():
        if not warm:
            sample(name, len(calls))  # touches every input, loads code
        repeats[name] = 1 if warm else max(1, round(sample_seconds / max(sample(name, 2), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    for done in range(1, max_rounds + 1):
        for name in contenders:
            samples[name].append(sample(name, repeats[name]))
        elapsed = time.perf_counter() - start
        progress(min(1.0, max(elapsed / max(seconds, 1e-9), done / max_rounds)))
        if elapsed >= seconds and done >= min_rounds:
            break
    progress(1.0)
    return {name: quantiles(values) for name, values in samples.items()}
