"""Steps of the hierarchical RNN in plain Python floats: one unit a level, tensors "a" (2 coordinates) and "b" (1).

Every formula stands once, for numbers, with the weights spelled out. Wichrowska et al. 2017, arXiv 1703.04813.
"""

from __future__ import annotations

import math
from typing import Any

#: The state_dict of a rule of one unit a level.
WEIGHTS: dict[str, Any] = {
    "readouts": [[0.7], [0.2], [-0.4], [0.3], [0.9]],
    "scales": [0.25, 0.3, 0.2, 0.15],
    "scalars": [0.05, 1.2, 0.8, -1.0, 0.4],
    "parameter_gru.gates_weight": [
        [0.1, -0.2, 0.3, 0.1, 0.05, -0.1, 0.2, 0.1, -0.3, 0.2, 0.1, 0.4, 0.5],
        [-0.1, 0.2, 0.1, -0.3, 0.15, 0.1, -0.2, 0.3, 0.1, -0.1, 0.2, -0.5, 0.25],
    ],
    "parameter_gru.gates_bias": [0.3, -0.2],
    "parameter_gru.candidate_weight": [[0.4, 0.1, -0.2, 0.3, -0.1, 0.2, 0.1, -0.4, 0.2, 0.3, -0.1, 0.2, 0.6]],
    "parameter_gru.candidate_bias": [0.1],
    "parameter_gru.initial": [0.35],
    "tensor_gru.gates_weight": [
        [0.2, 0.1, -0.1, 0.3, 0.2, 0.1, -0.2, 0.1, 0.05, -0.05, 0.1, 0.2, 0.3, 0.4],
        [-0.3, 0.2, 0.1, 0.1, -0.2, 0.3, 0.1, 0.2, -0.1, 0.1, 0.15, -0.2, 0.1, 0.2],
    ],
    "tensor_gru.gates_bias": [0.1, 0.4],
    "tensor_gru.candidate_weight": [[0.5, -0.2, 0.1, 0.3, 0.1, -0.1, 0.2, 0.1, 0.3, -0.2, 0.1, 0.1, -0.3, 0.7]],
    "tensor_gru.candidate_bias": [-0.1],
    "tensor_gru.initial": [-0.6],
    "global_gru.gates_weight": [[0.3, -0.2], [0.1, 0.5]],
    "global_gru.gates_bias": [0.2, -0.3],
    "global_gru.candidate_weight": [[0.8, -0.4]],
    "global_gru.candidate_bias": [0.05],
    "global_gru.initial": [0.25],
    "tensor_to_parameter.weight": [[0.3], [-0.5], [0.2]],
    "tensor_to_parameter.bias": [0.1, 0.2, -0.1],
    "global_to_parameter.weight": [[-0.2], [0.4], [0.6]],
    "global_to_parameter.bias": [0.05, -0.1, 0.15],
    "global_to_tensor.weight": [[0.25], [-0.35], [0.45]],
    "global_to_tensor.bias": [0.1, -0.2, 0.3],
}

PARAMS = {"a": [1.5, -0.75], "b": [0.25]}
GRADS = [{"a": [0.5, -2.0], "b": [0.0]}, {"a": [0.25, 0.0], "b": [-3e-6]}]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gru(x: list[float], h: float, name: str, bias: list[float]) -> float:
    """One unit; ``bias`` is added to r, u and c."""
    w = {key.partition(".")[2]: value for key, value in WEIGHTS.items() if key.startswith(name)}
    dots = [sum(a * b for a, b in zip(row, [*x, h], strict=True)) for row in w["gates_weight"]]
    r = sigmoid(dots[0] + w["gates_bias"][0] + bias[0])
    u = sigmoid(dots[1] + w["gates_bias"][1] + bias[1])
    dot = sum(a * b for a, b in zip(w["candidate_weight"][0], [*x, r * h], strict=True))
    c = math.tanh(dot + w["candidate_bias"][0] + bias[2])
    return u * h + (1 - u) * c


def affine(h: float, name: str) -> list[float]:
    pairs = zip(WEIGHTS[f"{name}.weight"], WEIGHTS[f"{name}.bias"], strict=True)
    return [weight * h + bias for (weight,), bias in pairs]


def fresh(log_rates: dict[str, list[float]]) -> dict[str, Any]:
    """The memory before the first step."""
    memory: dict[str, Any] = {"h2": WEIGHTS["global_gru.initial"][0]}
    for name, rates in log_rates.items():
        memory[name] = {
            "h1": WEIGHTS["tensor_gru.initial"][0],
            "each": [{"h0": 0.35, "a": [0.0] * 4, "ms": [0.0] * 4, "rate": rate, "s": 0.0, "d": 0.0} for rate in rates],
        }
    return memory


def step(params: dict[str, list[float]], grads: dict[str, list[float]], memory: dict[str, Any]) -> dict[str, Any]:
    """One step: new params and attended points by name; changes the memory."""
    every = [each["rate"] for name in params for each in memory[name]["each"]]
    mean_rate = sum(every) / len(every)
    results: dict[str, Any] = {"params": {}, "attended": {}}
    h2, new_h1 = memory["h2"], []
    for name, theta in params.items():
        h1, each = memory[name]["h1"], memory[name]["each"]
        bias = [
            x + y for x, y in zip(affine(h1, "tensor_to_parameter"), affine(h2, "global_to_parameter"), strict=True)
        ]
        first = [all(m["ms"][k] == 0 for m in each) for k in range(4)]
        xs, deltas, attention, rates = [], [], [], []
        for g, m in zip(grads[name], each, strict=True):
            scaled = []
            for k in range(4):
                decay = m["d"] ** (1 / 2**k)
                m["a"][k] = (1 - decay) * g + decay * m["a"][k]
                s = 0.0 if first[k] else m["s"]
                m["ms"][k] = (1 - s) * (m["a"][k] ** 2 + 1e-12) + s * m["ms"][k]
                scaled.append(math.asinh(m["a"][k] / math.sqrt(m["ms"][k] + 1e-16)))
            logs = [math.log(ms + 1e-16) for ms in m["ms"]]
            x = [*scaled, *(scaled[k] * scaled[k + 1] for k in range(3)), *(log - sum(logs) / 4 for log in logs)]
            x.append(m["rate"] - mean_rate)
            m["h0"] = gru(x, m["h0"], "parameter_gru", bias)
            xs.append([m["h0"], *x])
            ((w_u,), (w_lr,), (w_scale,), (w_input,), (w_a,)) = WEIGHTS["readouts"]
            b, b_s, b_d, offset, momentum = WEIGHTS["scalars"]
            deltas.append(m["h0"] * w_u + sum(a * b for a, b in zip(scaled, WEIGHTS["scales"], strict=True)))
            attention.append(m["h0"] * w_a)
            rates.append(min(max(m["rate"] + m["h0"] * w_lr + b, -33.0), 33.0))
            keep = sigmoid(momentum)
            m["rate"] = keep * m["rate"] + (1 - keep) * rates[-1]
            m["s"], m["d"] = sigmoid(m["h0"] * w_scale + b_s), sigmoid(m["h0"] * w_input + b_d)
        rms = math.sqrt(sum(d * d for d in deltas) / len(deltas) + 1e-16)
        rms_a = math.sqrt(sum(d * d for d in attention) / len(attention) + 1e-16)
        results["params"][name] = [
            t - math.exp(r + offset) * d / rms for t, r, d in zip(theta, rates, deltas, strict=True)
        ]
        results["attended"][name] = [
            t - math.exp(r) * d / rms_a for t, r, d in zip(theta, rates, attention, strict=True)
        ]
        means = [sum(column) / len(column) for column in zip(*xs, strict=True)]
        memory[name]["h1"] = gru(means, h1, "tensor_gru", affine(h2, "global_to_tensor"))
        new_h1.append(memory[name]["h1"])
    memory["h2"] = gru([sum(new_h1) / len(new_h1)], h2, "global_gru", [0.0] * 3)
    return results
