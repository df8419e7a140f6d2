"""hrnn_step in plain PyTorch: one step of the hierarchical RNN optimizer for the coordinates of all tensors.

Wichrowska et al. 2017, "Learned optimizers that scale and generalize", arXiv 1703.04813. This is the level of single
parameters; the RNNs of tensors and tasks run outside and come in as ``biases``.

Axis legend: M tensors, T tasks, n coordinates of one tensor of one task (a *segment*), H hidden units of the parameter
GRU, K = 4 scales, R = 11 + H rows of the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: K, the number of time scales of the gradient's moving mean.
SCALES = 4

#: Number of inputs of the parameter GRU: K scaled gradients, K - 1 products, K logarithms, the log rate.
FEATURES = 3 * SCALES

#: Bound of the log learning rate.
MAX_LOG_RATE = 33.0

#: Added to the squared mean gradient, to the mean square under a root or logarithm, and to the mean square of δ.
SQUARE_EPSILON, ROOT_EPSILON, RMS_EPSILON = 1e-12, 1e-16, 1e-16

#: Rows of the readouts' weight: the direction δ, the log learning rate, the scale decay, the input decay, and for rules
#: with attention the direction of the next gradient's point.
READOUTS = ("direction", "rate", "scale_decay", "input_decay", "attention")


class Weights(NamedTuple):
    """The weights in order. Keep in step with csrc/hrnn_step/problem.h.

    Attributes:
        gates: W_g [2H, 12 + H], rows r then u, columns x then h
        candidate: W_c [H, 12 + H]
        readouts: [4, H], or [5, H] with attention; rows as in :data:`READOUTS`
        scales: w_s [4], weights of ĝ in δ
        scalars: [5]: the biases of the log rate, the scale decay and the input decay; the offset o of the log rate; m
            before its sigmoid
    """

    gates: Tensor
    candidate: Tensor
    readouts: Tensor
    scales: Tensor
    scalars: Tensor


class Step(NamedTuple):
    """Results of one step.

    Attributes:
        params: θ' of every tensor
        states: the new state of every tensor
        means: [M, T, H + 13], means over each segment of h' (H), x (12) and ℓ'
        attended: the points of the next gradients, one tensor per tensor of params; empty without attention
    """

    params: list[Tensor]
    states: list[Tensor]
    means: Tensor
    attended: list[Tensor]


def num_rows(hidden: int) -> int:
    """R: h (H), the moving means a (4), their squares ms (4), the log rate ℓ, the scale decay s, the input decay d."""
    return hidden + 2 * SCALES + 3


def weight_shapes(hidden: int, attention: bool) -> Weights:
    """The shape of every weight."""
    columns = FEATURES + hidden
    shapes = ((2 * hidden, columns), (hidden, columns), (4 + attention, hidden), (SCALES,), (5,))
    return Weights(*shapes)  # type: ignore[arg-type]


def hrnn_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    biases: Tensor,
    mean_rate: Tensor,
    weights: Sequence[Tensor],
) -> Step:
    """One step of every tensor.

    Args:
        params: [T, n] each, with an n of its own; any floating dtype, cast to that of the weights for the arithmetic
        grads: [T, n] each
        states: [T, R, n] each, rows in the order of :func:`num_rows`
        biases: [M, T, 3H], all that is added to the pre-activations of r, u and c
        mean_rate: [T], mean of ℓ over all coordinates of a task
        weights: see :class:`Weights`
    """
    named = Weights(*weights)
    if not params:
        return Step([], [], biases.new_zeros(*biases.shape[:2], biases.shape[2] // 3 + FEATURES + 1), [])
    steps = [
        _segment_step(p, g, state, bias, mean_rate, named)
        for p, g, state, bias in zip(params, grads, states, biases, strict=True)
    ]
    new_params, new_states, means, attended = map(list, zip(*steps, strict=True))
    return Step(new_params, new_states, torch.stack(means), [p for p in attended if p is not None])


def _segment_step(
    params: Tensor, grads: Tensor, state: Tensor, bias: Tensor, mean_rate: Tensor, w: Weights
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One tensor, [T, n]: new params, new state, means [T, H + 13], attended points."""
    theta, g = params.to(state.dtype), grads.to(state.dtype)
    hidden = w.candidate.shape[0]
    h, a, ms, rate, s, d = state.transpose(0, 1).split([hidden, SCALES, SCALES, 1, 1, 1])
    rate_bias, scale_bias, input_bias, offset, momentum = w.scalars
    a, ms, scaled = scaled_gradients(g, a, ms, s, d)
    x = features(scaled, ms, rate, mean_rate)
    h = bias_gru(x, h, bias, w)
    direction, rate_step, scale_decay, input_decay, *attention = _product(w.readouts, h)
    delta = direction + _product(w.scales.unsqueeze(0), scaled)[0]
    step_rate = clip_straight_through(rate[0] + rate_step + rate_bias)
    kept = momentum.sigmoid()
    new_rate = kept * rate[0] + (1 - kept) * step_rate
    new = theta - (step_rate + offset).exp() * normalised(delta)
    decays = [(scale_decay + scale_bias).sigmoid(), (input_decay + input_bias).sigmoid()]
    new_state = torch.cat([h, a, ms, torch.stack([new_rate, *decays])]).transpose(0, 1)
    means = _mean(torch.cat([h, x, new_rate.unsqueeze(0)])).T
    attended = None
    if attention:
        attended = (theta - step_rate.exp() * normalised(attention[0])).to(params.dtype)
    return new.to(params.dtype), new_state, means, attended


def scaled_gradients(g: Tensor, a: Tensor, ms: Tensor, s: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moving means a of the gradient at four scales, of their squares, and ĝ = asinh(a / √(ms + 1e-16)).

    The scales' decays are d, √d, √√d and √√√d; the root's infinite derivative at zero is taken as zero.

    s counts as zero while ms is zero. By the paper's formula that is asked of a whole tensor: "while ms is all zero".
    It comes to the same: after one step ms is at least 1e-12 in every coordinate, so it is zero in all or in none.

    Args:
        g: [T, n]
        a: [4, T, n]
        ms: [4, T, n]
        s: [1, T, n]
        d: [1, T, n]
    """
    decays = [d]
    for _ in range(SCALES - 1):
        decays.append(_root(decays[-1]))
    decay = torch.cat(decays)
    a = (1 - decay) * g + decay * a
    kept = torch.where(ms == 0, torch.zeros_like(s), s)
    ms = (1 - kept) * (a.square() + SQUARE_EPSILON) + kept * ms
    # The usual log(x + √(1 + x²)) cancels for large negative x; torch's asinh is odd.
    return a, ms, (a / (ms + ROOT_EPSILON).sqrt()).asinh()


def features(scaled: Tensor, ms: Tensor, rate: Tensor, mean_rate: Tensor) -> Tensor:
    """Inputs x of the GRU [12, T, n]: ĝ, its products of neighbouring scales, centred log ms, centred ℓ.

    Args:
        scaled: ĝ [4, T, n]
        ms: [4, T, n]
        rate: ℓ [1, T, n]
        mean_rate: [T]
    """
    logs = (ms + ROOT_EPSILON).log()
    return torch.cat([scaled, scaled[:-1] * scaled[1:], logs - logs.mean(0), rate - mean_rate[:, None]])


def bias_gru(x: Tensor, h: Tensor, bias: Tensor, w: Weights) -> Tensor:
    """The GRU with an external bias; the reset gate r is applied to h before the product.

    r, u = σ(W_g [x; h] + bias), c = tanh(W_c [x; r h] + bias), h' = u h + (1 - u) c.

    Args:
        x: [12, T, n]
        h: [H, T, n]
        bias: [T, 3H]
        w: the weights
    """
    hidden = h.shape[0]
    of_gates, of_candidate = bias.T.unsqueeze(-1).split([2 * hidden, hidden])
    gates = _product(w.gates, torch.cat([x, h])) + of_gates
    r, u = gates.sigmoid().chunk(2)
    candidate = _product(w.candidate, torch.cat([x, r * h])) + of_candidate
    new: Tensor = u * h + (1 - u) * candidate.tanh()
    return new


def normalised(delta: Tensor) -> Tensor:
    """δ / √(mean δ² + 1e-16), the mean over each segment. delta [T, n]."""
    return delta / (_mean(delta.square()) + RMS_EPSILON).sqrt().unsqueeze(-1)


def clip_straight_through(rate: Tensor) -> Tensor:
    """Clip to ±33 with the gradient of the identity; NaN where the rate is not finite."""
    return rate.detach().clamp(-MAX_LOG_RATE, MAX_LOG_RATE) + (rate - rate.detach())


def _root(x: Tensor) -> Tensor:
    """√x whose derivative at zero is zero."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, torch.ones_like(x)).sqrt(), x.detach())


def _product(weight: Tensor, rows: Tensor) -> Tensor:
    """W [O, I] times rows [I, T, n], to [O, T, n]."""
    product: Tensor = (weight @ rows.flatten(1)).unflatten(1, rows.shape[1:])
    return product


def _mean(x: Tensor) -> Tensor:
    """Mean over the last axis; zero for an empty one."""
    return x.sum(-1) / max(x.shape[-1], 1)
