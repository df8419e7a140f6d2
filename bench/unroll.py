"""One unroll, forward and backward, in a process of its own: its time and its peak memory, as JSON on stdout.

python -m bench.unroll metakern|eager N STEPS REPEATS THREADS
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.contenders import Contender, Eager, Fused, make_rule

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


def _status(key: str) -> int:
    """A memory figure of this process in bytes: VmRSS, the memory it holds now, or VmHWM, the most it ever held."""
    match = re.search(rf"^{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def measure(kind: str, n: int, steps: int, repeats: int) -> dict[str, Any]:
    """Peak resident memory of the first unroll above what the process held before it; seconds of the others."""
    contender = KINDS[kind](make_rule())
    unroll(contender, 1000, 3, seed=0)  # loads code, starts threads
    baseline = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    loss, gradients = unroll(contender, n, steps, seed=1)
    peak = _status("VmHWM") - baseline
    seconds = []
    for repeat in range(repeats):
        start = time.perf_counter()
        unroll(contender, n, steps, seed=repeat)
        seconds.append(time.perf_counter() - start)
    norm = float(torch.cat([g.flatten() for g in gradients]).norm())
    return {"peak_bytes": peak, "seconds": seconds, "loss": loss, "gradient_norm": norm}


def in_subprocess(kind: str, n: int, steps: int, repeats: int) -> dict[str, Any]:
    """:func:`measure` in a fresh process with as many threads as this one."""
    arguments = [kind, str(n), str(steps), str(repeats), str(torch.get_num_threads())]
    run = subprocess.run(
        [sys.executable, "-m", "bench.unroll", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    if run.returncode:
        raise RuntimeError(f"the unroll {arguments} failed:\n{run.stderr}")
    result: dict[str, Any] = json.loads(run.stdout)
    return result


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[5]))
    print(json.dumps(measure(sys.argv[1], *(int(argument) for argument in sys.argv[2:5]))))
