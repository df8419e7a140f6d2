"""One step of the hierarchical RNN, written from the paper's formulas for one task, coordinate by row.

Wichrowska et al. 2017, arXiv 1703.04813. Slow and plain: nothing is shared with metakern.ops.hrnn_step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def gru(x: Tensor, h: Tensor, w: Tensors, name: str, bias: Tensor | float = 0.0) -> Tensor:
    """BiasGRU on rows: x [n, I], h [n, H], bias [3H]."""
    hidden = h.shape[1]
    split = [bias[: 2 * hidden], bias[2 * hidden :]] if isinstance(bias, Tensor) else [0.0, 0.0]
    both = torch.cat([x, h], 1)
    gates = torch.sigmoid(both @ w[f"{name}.gates_weight"].T + w[f"{name}.gates_bias"] + split[0])
    r, u = gates[:, :hidden], gates[:, hidden:]
    reset = torch.cat([x, r * h], 1)
    c = torch.tanh(reset @ w[f"{name}.candidate_weight"].T + w[f"{name}.candidate_bias"] + split[1])
    return u * h + (1 - u) * c


def affine(x: Tensor, w: Tensors, name: str) -> Tensor:
    return w[f"{name}.weight"] @ x + w[f"{name}.bias"]


def root(x: Tensor) -> Tensor:
    """√x; the derivative at zero is taken as zero."""
    return torch.where(x > 0, torch.where(x > 0, x, 1.0) ** 0.5, 0.0)


def asinh(x: Tensor) -> Tensor:
    return torch.sign(x) * torch.log(x.abs() + torch.sqrt(1 + x * x))


def clipped(x: Tensor) -> Tensor:
    return x + (x.clamp(-33, 33) - x).detach()


def fresh(w: Tensors, sizes: dict[str, int], log_rates: Tensors) -> dict[str, Any]:
    """The memory before the first step of one task: by tensor the state, and the global h."""
    memory: dict[str, Any] = {"global": w["global_gru.initial"]}
    for name, n in sizes.items():
        zeros = w["scales"].new_zeros(n)
        memory[name] = {
            "h0": w["parameter_gru.initial"].expand(n, -1),
            "h1": w["tensor_gru.initial"],
            "a": [zeros] * 4,
            "ms": [zeros] * 4,
            "rate": log_rates[name],
            "s": zeros,
            "d": zeros,
        }
    return memory


def step(w: Tensors, params: Tensors, grads: Tensors, memory: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """New params of one task, flat [n] by name, and the new memory; with attention also memory[name]["attended"]."""
    new: Tensors = {}
    after: dict[str, Any] = {}
    coordinates = sum(p.numel() for p in params.values())
    mean_rate = sum(memory[name]["rate"].sum() for name in params) / coordinates
    h2 = memory["global"]
    for name, theta in params.items():
        m, g = memory[name], grads[name]
        d, a, ms, scaled = m["d"], [], [], []
        for k in range(4):
            a.append((1 - d) * g + d * m["a"][k])
            s = m["s"] * 0 if bool((m["ms"][k] == 0).all()) else m["s"]
            ms.append((1 - s) * (a[k] ** 2 + 1e-12) + s * m["ms"][k])
            scaled.append(asinh(a[k] / torch.sqrt(ms[k] + 1e-16)))
            d = root(d)
        logs = [torch.log(each + 1e-16) for each in ms]
        mean_log = (logs[0] + logs[1] + logs[2] + logs[3]) / 4
        x = torch.stack(
            [
                *scaled,
                *(scaled[k] * scaled[k + 1] for k in range(3)),
                *(log - mean_log for log in logs),
                m["rate"] - mean_rate,
            ],
            dim=1,
        )
        bias = affine(m["h1"], w, "tensor_to_parameter") + affine(h2, w, "global_to_parameter")
        h0 = gru(x, m["h0"], w, "parameter_gru", bias)
        readouts = h0 @ w["readouts"].T
        b, b_s, b_d, offset, momentum = w["scalars"]
        delta = readouts[:, 0] + torch.stack(scaled, 1) @ w["scales"]
        delta = delta / torch.sqrt((delta**2).mean() + 1e-16)
        rate = clipped(m["rate"] + readouts[:, 1] + b)
        keep = torch.sigmoid(momentum)
        new[name] = theta - torch.exp(rate + offset) * delta
        means = torch.cat([h0.mean(0), x.mean(0)]).unsqueeze(0)
        h1 = gru(means, m["h1"].unsqueeze(0), w, "tensor_gru", affine(h2, w, "global_to_tensor"))[0]
        after[name] = {
            "h0": h0,
            "h1": h1,
            "a": a,
            "ms": ms,
            "rate": keep * m["rate"] + (1 - keep) * rate,
            "s": torch.sigmoid(readouts[:, 2] + b_s),
            "d": torch.sigmoid(readouts[:, 3] + b_d),
        }
        if readouts.shape[1] == 5:
            attended = readouts[:, 4] / torch.sqrt((readouts[:, 4] ** 2).mean() + 1e-16)
            after[name]["attended"] = theta - torch.exp(rate) * attended
    of_tensors = torch.stack([after[name]["h1"] for name in params]).mean(0, keepdim=True)
    after["global"] = gru(of_tensors, h2.unsqueeze(0), w, "global_gru")[0]
    return new, after


def log_rates(rule: Any, shapes: dict[str, Any]) -> Tensors:
    """The initial ℓ that a rule draws, flat by name, in float64."""
    state = rule.init_state({name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()})
    return {name: entry["coordinates"][-3].detach() for name, entry in zip(shapes, state.per_tensor, strict=True)}


def in_range(rates: Tensor) -> bool:
    low, high = math.log(1e-6), math.log(1e-2)
    return bool(((rates >= low) & (rates <= high)).all())
