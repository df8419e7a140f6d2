"""One step of Guided Adam tensor by tensor, from its docstring.

Axis legend: T tasks, ``*shape`` the shape of one parameter tensor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def guided_adam(
    rule: Any, w: Tensors, params: Tensors, grads: Tensors, memory: dict[str, Any], step: int, tasks: bool
) -> Tensors:
    """New params; ``memory`` keeps the moving means of every tensor."""
    if tasks:
        count = len(next(iter(params.values())))
        rows = []
        for task in range(count):
            one = ({name: x[task] for name, x in xs.items()} for xs in (params, grads))
            rows.append(guided_adam(rule, w, *one, memory.setdefault(task, {}), step, False))
        return {name: torch.stack([row[name] for row in rows]) for name in params}
    t = step + 1
    whole = sum((p * p).sum() for p in params.values()) / sum(p.numel() for p in params.values()) + 1e-6
    numbers = w["scalars"][0]
    of_mean, of_square = torch.sigmoid(numbers[4]), torch.sigmoid(numbers[5])
    seen, kept, sizes = {}, {}, {}
    for name, p in params.items():
        g = grads[name]
        zero = torch.zeros_like(g)
        old = memory.get(name, dict.fromkeys("msvdu", zero) | {"tensor": [0.0] * 4, "rate": p.new_zeros(())})
        m, s = of_mean * old["m"] + (1 - of_mean) * g, 0.98 * old["s"] + 0.02 * g
        v = of_square * old["v"] + (1 - of_square) * g * g
        root = (v / (1 - of_square**t) + 1e-16).sqrt()
        fast, late, now, before = m / (1 - of_mean**t) / root, s / (1 - 0.98**t) / root, g / root, -old["u"]

        def mean(x: Tensor) -> Tensor:
            return x.sum() / x.numel()

        agreement = mean(now * before) / (mean(now * now) * mean(before * before) + 1e-30).sqrt()
        energy = mean(g * g)
        averages = [
            decay * x + (1 - decay) * y
            for decay, x, y in zip(
                (0.8, 0.96, 0.8, 0.98), old["tensor"], (agreement, agreement, energy, energy), strict=True
            )
        ]
        even = [x / (1 - decay**t) for x, decay in zip(averages, (0.8, 0.96, 0.8, 0.98), strict=True)]
        own = torch.maximum(mean(p * p), 0.01 * whole)
        slow_energy = (even[3] + 1e-30).log()
        seen[name] = [
            agreement,
            2 * even[0],
            2 * even[1],
            (mean(fast * fast) + 1e-4).log() / 4 + 0.5,
            (mean(late * late) + 1e-4).log() / 4 + 1,
            mean(fast * late) / (mean(fast * fast) * mean(late * late) + 1e-12).sqrt(),
            (((even[2] + 1e-30).log() - slow_energy) / 2).clamp(-3, 3),
            old["rate"] / 2,
            (((energy + 1e-30).log() - slow_energy) / 4).clamp(-3, 3),
            (own / whole).log() / 4,
            p.new_tensor(float(p.dim() > 1)),
            p.new_tensor(math.log(p.numel()) / 4 - 1),
            p.new_tensor(math.log(t) / 4 - 1),
            p.new_tensor(math.exp(-t / 10)),
        ]
        kept[name] = (fast, late, now)
        sizes[name] = (own.log() / 2, whole.log() / 2)
        memory[name] = {"m": m, "s": s, "v": v, "d": old["d"], "tensor": averages, "rate": old["rate"]}
    new = {}
    for name, p in params.items():
        shared = [sum(row[i] for row in seen.values()) / len(seen) for i in range(8)]
        x = torch.stack([*seen[name], *shared])
        hidden = torch.tanh(x @ w["hidden_weight"] + w["hidden_bias"][0])
        o = torch.tanh(x @ w["direct_weight"] + hidden @ w["output_weight"] + w["output_bias"][0])
        rate = (memory[name]["rate"] + 0.1 * o[0]).clamp(-6, 6)
        memory[name]["rate"] = rate
        share = torch.sigmoid(numbers[1])
        log_size = numbers[0] + rate + 1.5 * o[1] + share * sizes[name][0] + (1 - share) * sizes[name][1]
        if rule.total_steps is not None:
            log_size = log_size + math.log(
                0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, step / rule.total_steps))) / 2
            )
        fast, late, now = kept[name]
        waiting = memory[name]["d"] - log_size.exp() * (fast + o[2] * late + o[3] * now)
        at_once, released = torch.sigmoid(numbers[3]), torch.clamp(numbers[2].exp() / t, max=1)
        change = at_once * (waiting - memory[name]["d"]) + (1 - at_once) * released * waiting
        memory[name] |= {"d": (1 - released) * waiting, "u": change}
        new[name] = p + change
    return new
