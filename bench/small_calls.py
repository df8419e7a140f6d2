"""Measure what small calls cost: a rule's step against ``a + a``, meta_loss against meta_backward, the import.

Minima of many short repetitions: what is asked is the cost of the calls themselves, without the system's interruptions.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer

import metakern
from bench.machine import describe
from bench.mlp_inner_loop.cases import sinusoid
from metakern.rules import CoordinatewiseLSTM

_REPETITIONS, _CALLS = 300, 20


def least(call: Callable[[], Any]) -> float:
    """Seconds of a call: the least mean of 20 calls in a row, of 300."""
    best = float("inf")
    for _ in range(_REPETITIONS):
        start = time.perf_counter()
        for _ in range(_CALLS):
            call()
        best = min(best, (time.perf_counter() - start) / _CALLS)
    return best


@torch.no_grad()
def rule_steps() -> dict[str, float]:
    """``a + a`` at 16 elements, and a step of CoordinatewiseLSTM without a graph at 16 and 1,000 coordinates."""
    rule, a = CoordinatewiseLSTM(), torch.randn(16)
    found = {"a + a": least(lambda: a + a)}
    for n in (16, 1000):
        params, grads = torch.randn(n), torch.randn(n)
        state = rule.init_state(params)
        found[f"rule(), N = {n}"] = least(lambda p=params, g=grads, s=state: rule(p, g, s))  # type: ignore[misc]
    return found


def meta_iterations() -> dict[str, dict[str, float]]:
    """``meta_loss(...).mean().backward()`` and ``meta_backward(...)`` on the sinusoid cases."""
    found = {}
    for first_order in (False, True):
        case = sinusoid(first_order=first_order)
        model, (support, query) = case.model(), case.batch(0)
        found[case.title] = {
            "meta_loss": least(lambda m=model, s=support, q=query, o=case.options: _with_graph(m, s, q, o)),  # type: ignore[misc]
            "meta_backward": least(
                lambda m=model, s=support, q=query, o=case.options: metakern.meta_backward(m, s, q, **o)  # type: ignore[misc]
            ),
        }
    return found


def _with_graph(model: torch.nn.Module, support: Any, query: Any, options: dict[str, Any]) -> None:
    metakern.meta_loss(model, support, query, **{"loss": F.mse_loss, **options}).mean().backward()


class _Empty(torch.autograd.Function):
    """Nothing, in the form of a call that is differentiated by six parameters."""

    @staticmethod
    def forward(ctx: Any, *params: torch.Tensor) -> torch.Tensor:
        ctx.params = params
        return params[0].new_zeros(4)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(p) for p in ctx.params)


def graphs() -> dict[str, float]:
    """Seconds of graphs that compute nothing: torch's share of what meta_loss costs beyond meta_backward.

    The least is one parameter's mean and backward. Then come six parameters in a node of C++ (``torch.stack``), and in
    a node of Python, as every autograd.Function is.
    """
    params = list(sinusoid().model().parameters())
    alike: list[torch.Tensor] = [torch.nn.Parameter(torch.zeros(40)) for _ in params]

    def cleared(call: Callable[[], Any]) -> float:
        def once() -> None:
            for p in (*params, *alike):
                p.grad = None
            call()

        return least(once)

    return {
        "one parameter, mean, backward": cleared(lambda: alike[0].mean().backward()),
        "six parameters, a node of C++, mean, backward": cleared(lambda: torch.stack(alike).mean().backward()),
        "six parameters, an autograd.Function, mean, backward": cleared(
            lambda: _Empty.apply(*params).mean().backward()
        ),
        "six parameters, an autograd.Function, forward alone": least(lambda: _Empty.apply(*params)),
    }


def import_seconds() -> dict[str, float]:
    """Processor time of ``import torch, numpy`` and of ``import metakern`` after them: the least of 5 processes."""
    code = "import time, torch, numpy; a = time.process_time(); import metakern; print(a, time.process_time() - a)"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(5)
    ]
    torch_alone, own = (min(float(run[i]) for run in runs) for i in range(2))
    return {"torch and numpy": torch_alone, "metakern": own}


def main(output: Annotated[Path, typer.Option(help="JSON to write.")]) -> None:
    """Measure small calls."""
    steps, iterations = rule_steps(), meta_iterations()
    results = {
        "command": "python -m bench.small_calls --output FILE",
        "host": describe(),  # not "machine": that marks results with a table in docs/benchmarks.md
        "seconds": steps,
        "rule() at N = 16 against a + a": steps["rule(), N = 16"] / steps["a + a"],
        "meta-iterations": iterations,
        "graphs that compute nothing": graphs(),
        "import": import_seconds(),
    }
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    typer.run(main)
