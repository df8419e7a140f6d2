"""Time and peak memory of a meta-iteration with many inner steps, in a separate process; prints JSON.

python -m bench.mlp_inner_loop.memory CONTENDER TASKS STEPS REPEATS THREADS
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import torch

from bench.mlp_inner_loop.cases import Case, embedding
from bench.mlp_inner_loop.contenders import iterate, make_contender, results
from bench.peers import find_libraries
from bench.processes import peak_bytes
from bench.timing import wall_seconds


def memory_case(tasks: int, steps: int) -> Case:
    """MLP 64-64-64-5, whose parameters and activations have about the same size."""
    return embedding(tasks, steps)


def measure(name: str, tasks: int, steps: int, repeats: int) -> dict[str, Any]:
    """Additional peak resident memory of the first meta-iteration; seconds of the others.

    Raises:
        LookupError: for a contender that is not available
    """
    case, libraries = memory_case(tasks, steps), find_libraries()[0]
    small = memory_case(1, 2)
    contender, warm = make_contender(name, case, libraries), make_contender(name, small, libraries)
    if contender is None or warm is None:
        raise LookupError(f"{name} is not here")
    iterate(warm, small.batch(0))  # loads code, starts threads
    batch = case.batch(1)
    peak, (losses, *grads) = peak_bytes(partial(results, contender, batch))
    seconds = [wall_seconds(partial(iterate, contender, batch)) for _ in range(repeats)]
    norm = float(torch.cat([g.flatten() for g in grads]).norm())
    return {"peak_bytes": peak, "seconds": seconds, "loss": float(losses.mean()), "gradient_norm": norm}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[5]))
    print(json.dumps(measure(sys.argv[1], *(int(argument) for argument in sys.argv[2:5]))))
