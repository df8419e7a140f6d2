"""Time and peak memory of one unroll, forward and backward, in a separate process; prints JSON.

python -m bench.lstm_step.unroll metakern|eager N STEPS REPEATS THREADS
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench import processes
from bench.lstm_step.contenders import Contender, Eager, Fused, make_rule
from bench.processes import peak_bytes
from bench.timing import wall_seconds

#: Contenders that can be unrolled.
KINDS: dict[str, Callable[..., Contender]] = {"metakern": Fused, "eager": Eager}


def unroll(contender: Contender, n: int, steps: int, seed: int) -> tuple[float, list[torch.Tensor]]:
    """Truncated backpropagation of the summed loss of N coordinates through ``steps`` steps.

    The optimizee is ½ Σ (a (θ - b))² with random a and b; its gradients are detached, as in first-order training.
    """
    rule = make_rule()
    generator = torch.Generator().manual_seed(seed)
    a, b, params = (torch.randn(n, generator=generator) for _ in range(3))
    size = (rule.num_layers, n, rule.hidden_size)
    state = contender.pack(torch.zeros(size), torch.zeros(size))
    loss = torch.zeros(())
    for _ in range(steps):
        grads = (a * a * (params - b)).detach()
        params, state = contender.step(params, grads, state)
        loss = loss + 0.5 * (a * (params - b)).square().mean()
    return float(loss.detach()), list(torch.autograd.grad(loss, contender.weights))


def measure(kind: str, n: int, steps: int, repeats: int) -> dict[str, Any]:
    """Additional peak resident memory of the first unroll; seconds of the others."""
    contender = KINDS[kind](make_rule())
    unroll(contender, 1000, 3, seed=0)  # loads code, starts threads
    peak, (loss, gradients) = peak_bytes(lambda: unroll(contender, n, steps, seed=1))
    seconds = [wall_seconds(partial(unroll, contender, n, steps, seed)) for seed in range(repeats)]
    norm = float(torch.cat([g.flatten() for g in gradients]).norm())
    return {"peak_bytes": peak, "seconds": seconds, "loss": loss, "gradient_norm": norm}


def in_subprocess(kind: str, n: int, steps: int, repeats: int) -> dict[str, Any]:
    """:func:`measure` in a fresh process with as many threads as this one."""
    return processes.in_subprocess("bench.lstm_step.unroll", kind, n, steps, repeats)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[5]))
    print(json.dumps(measure(sys.argv[1], *(int(argument) for argument in sys.argv[2:5]))))
