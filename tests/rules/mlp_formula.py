"""One step of the per-parameter MLP optimizer, written from the paper's formulas for one tensor of one task.

Metz et al. 2022, arXiv 2203.11860. Slow and plain: nothing is shared with metakern.ops.mlp_update_step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

BASES = {"m": [0.9, 0.99, 0.999], "v": [0.999], "factors": [0.9, 0.99, 0.999]}


def decays(offsets: Tensor) -> dict[str, list[Tensor]]:
    """β by name from the offsets of all seven."""
    rest, found = iter(offsets), {}
    for name, bases in BASES.items():
        found[name] = [(1 - torch.exp(10 * (math.log(1 - b) / 10 + next(rest)))).clamp(0, 1) for b in bases]
    return found


def averaged(old: list[Tensor], new: Tensor, betas: list[Tensor]) -> list[Tensor]:
    return [b * x + (1 - b) * new for b, x in zip(betas, old, strict=True)]


def features(p: Tensor, g: Tensor, memory: dict[str, Any]) -> list[Tensor]:
    """The 28 features, like ``p`` each, before normalisation."""
    m, (v,), r, c = memory["m"], memory["v"], memory["r"], memory["c"]
    of_v = (v + 1e-6) ** -0.5
    if p.dim() > 1:
        small, large = memory["axes"]
        rows, columns = [x.unsqueeze(large) for x in r], [x.unsqueeze(small) for x in c]
        means = [x.mean(small, keepdim=True) for x in rows]
        scaled = [x / (mean + 1e-9) for x, mean in zip(rows, means, strict=True)]
        of_g = of_m = [
            a.clamp(min=1e-9) ** -0.5 * b.clamp(min=1e-9) ** -0.5 for a, b in zip(scaled, columns, strict=True)
        ]
    else:
        rows = columns = r
        of_g, of_m = [(x + 1e-9).clamp(min=1e-9) ** -0.5 for x in r], [(x + 1e-6) ** -0.5 for x in r]
    found = [g, p, *m, v, *[x * of_v for x in m], of_v, *[g * x for x in of_g], *rows, *columns]
    found += [(x + 1e-8) ** -0.5 for x in [*rows, *columns]] + [x * y for x, y in zip(m, of_m, strict=True)]
    return [x.expand(p.shape) for x in found]


def step(
    rule: Any, w: Tensors, p: Tensor, g: Tensor, memory: dict[str, Any] | None, count: int
) -> tuple[Tensor, dict[str, Any]]:
    """New params and memory."""
    betas, squares = decays(w.get("decay_offsets", rule.decay_offsets.to(p.dtype))), g * g + 1e-30
    order = sorted(range(p.dim()), key=lambda axis: p.shape[axis])
    axes = tuple(order[-2:])  # the second largest axis, the largest
    rows = squares if p.dim() < 2 else squares.mean(axes[1])
    columns = squares.new_zeros(0) if p.dim() < 2 else squares.mean(axes[0])
    before = memory or {
        **{"m": [torch.zeros_like(p)] * 3, "v": [torch.zeros_like(p)]},
        **{"r": [torch.zeros_like(rows)] * 3, "c": [torch.zeros_like(columns)] * 3},
    }
    after = {
        "m": averaged(before["m"], g, betas["m"]),
        "v": averaged(before["v"], g * g, betas["v"]),
        "r": averaged(before["r"], rows, betas["factors"]),
        "c": averaged(before["c"], columns, betas["factors"]),
        "axes": axes,
    }
    normalised = [x * (1e-5 + (x * x).mean()) ** -0.5 for x in features(p, g, after)]
    time = [math.tanh(count / tau - 1) for tau in (1, 3, 10, 30, 100, 300, 1000, 3000, 1e4, 3e4, 1e5)]
    x = torch.stack([*normalised, *(torch.full_like(p, t) for t in time)], -1)
    layers = ["input", *[f"linear_{i}" for i in range(rule.hidden_layers - 1)], "output"]
    for layer in layers:
        x = x @ w[f"network.{layer}.weight"].T + w[f"network.{layer}.bias"]
        if layer != "output":
            x = torch.relu(x)
    lr = rule.lr / (rule.width_multiplier if p.dim() > 1 else 1)
    update = lr * rule.step_mult * x[..., 0] * torch.exp(rule.exp_mult * x[..., 1])
    if rule.decay_update:
        new = p - update
        return new - lr * rule.weight_decay * new, after
    return p - update - lr * rule.weight_decay * p, after
