"""lstm_step in plain PyTorch: one step of the coordinatewise LSTM optimizer, as features × cells × head.

Andrychowicz et al. 2016, "Learning to learn by gradient descent by gradient descent", arXiv 1606.04474.

Axis legend: N coordinates, F features, H hidden units, L layers, R outputs of the head, E rows of the stages' state,
K coordinate inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Names of the gradient preprocessings; a kernel receives the index. Keep in step with csrc/math/preprocess.h.
PREPROCESS = ("none", "log_sign", "log_and_clip")

#: Term in log_and_clip's logarithm: the float32 machine epsilon, for every dtype.
LOG_AND_CLIP_EPSILON = 1.1920928955078125e-07


def num_features(preprocess: str) -> int:
    """Number of features F of a preprocessing."""
    return 1 if preprocess == "none" else 2


def gradient_features(grads: Tensor, preprocess: str, scale: float) -> Tensor:
    """Turn gradients [N] into features [N, F], by the formulas of arXiv 1606.04474 and its authors' later code.

    - ``log_sign``: (log|g|/p, sign g) where |g| >= e^-p, (-1, e^p g) elsewhere
    - ``log_and_clip``: (max(log(|g| + eps)/p, -1), clip(e^p g, -1, 1))
    - ``none``: (g,)
    """
    size = grads.abs()
    if preprocess == "log_sign":
        large = size >= math.exp(-scale)
        logarithm = torch.where(large, size, torch.ones_like(size)).log() / scale
        features = [
            torch.where(large, logarithm, -torch.ones_like(size)),
            torch.where(large, grads.sign(), grads * math.exp(scale)),
        ]
    elif preprocess == "log_and_clip":
        features = [
            ((size + LOG_AND_CLIP_EPSILON).log() / scale).clamp(min=-1),
            (grads * math.exp(scale)).clamp(-1, 1),
        ]
    else:
        features = [grads]
    return torch.stack(features, dim=-1)


def preprocess_gradient(grads: Tensor, preprocess: str, scale: float) -> Tensor:
    """LSTM inputs [N, F]: the features, all NaN where the gradient is not finite.

    By the formulas alone an infinite gradient would saturate the gates and yield a plausible step. The added term is
    zero for finite gradients.
    """
    return gradient_features(grads, preprocess, scale) + (grads - grads).unsqueeze(-1)


class Scalars(NamedTuple):
    """The numbers that a call gives to its stages; each stage uses some.

    Attributes:
        features_scale: p of the gradient preprocessing
        beta1: decay of the gradient's moving mean
        beta2: decay of the moving mean of its square
        head_scale: factor of the update
    """

    features_scale: float = 10.0
    beta1: float = 0.95
    beta2: float = 0.95
    head_scale: float = 0.1


class FeaturesStage(NamedTuple):
    """A stage that computes the inputs of the lowest cell; see csrc/math/features.h.

    Attributes:
        inputs: F, number of features.
        states: number of state values per coordinate; they start at zero.
        coordinate_inputs: number of further inputs per coordinate.
        weights: number of weights, shared by all coordinates.
        apply: maps gradients [N], states [states, N], coordinate inputs [coordinate_inputs, N], weights [weights] and
            the scalars to features [N, F] and new states [states, N].
    """

    inputs: int
    states: int
    coordinate_inputs: int
    weights: int
    apply: Callable[[Tensor, Tensor, Tensor, Tensor, Scalars], tuple[Tensor, Tensor]]


class HeadStage(NamedTuple):
    """A stage that updates the parameters from the outputs of the top cell; see csrc/math/heads.h.

    Attributes:
        outputs: R, rows of the head's linear map.
        states: as in :class:`FeaturesStage`.
        coordinate_inputs: as in :class:`FeaturesStage`.
        weights: as in :class:`FeaturesStage`.
        apply: maps outputs [R, N], params and gradients [N], states, coordinate inputs, weights and the scalars to new
            params [N] and new states.
    """

    outputs: int
    states: int
    coordinate_inputs: int
    weights: int
    apply: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Scalars], tuple[Tensor, Tensor]]


def gradient_stage(preprocess: str) -> FeaturesStage:
    """The stage of a gradient preprocessing, with one or two features."""
    return FeaturesStage(
        num_features(preprocess),
        *(0, 0, 0),
        lambda grads, states, _inputs, _weights, scalars: (
            preprocess_gradient(grads, preprocess, scalars.features_scale),
            states,
        ),
    )


def loss_features(
    grads: Tensor, states: Tensor, coordinate_inputs: Tensor, _weights: Tensor, scalars: Scalars
) -> tuple[Tensor, Tensor]:
    """Meta-LSTM's four features, Ravi & Larochelle 2017: the loss, [1, N], and the gradient, both by ``log_sign``."""
    both = [preprocess_gradient(x, "log_sign", scalars.features_scale) for x in (coordinate_inputs[0], grads)]
    return torch.cat(both, dim=-1), states


#: Keeps RNNProp's features finite where the moments are zero.
MOMENTS_EPSILON = 1e-8

#: Width of RNNProp's linear map.
MOMENTS_WIDTH = 20


def moments(grads: Tensor, states: Tensor, scalars: Scalars) -> tuple[Tensor, Tensor]:
    """RNNProp's normalised gradient and mean, Lv et al. 2017, arXiv 1703.03633: (g, m̂) / (√v̂ + 1e-8).

    m' = β₁m + (1−β₁)g, v' = β₂v + (1−β₂)g², and likewise a and b with 1 in place of g: after t steps they are 1 − β₁ᵗ
    and 1 − β₂ᵗ, so m̂ = m'/a', v̂ = v'/b', and no coordinate counts its steps.

    Args:
        grads: [N]
        states: m, v, a, b, [4, N]
        scalars: β₁ and β₂

    Returns:
        [N, 2], new states [4, N]
    """
    (m, v, a, b), (_, beta1, beta2, _) = states, scalars
    m, a = beta1 * m + (1 - beta1) * grads, beta1 * a + (1 - beta1)
    v, b = beta2 * v + (1 - beta2) * grads.square(), beta2 * b + (1 - beta2)
    square = v / b
    positive = square > 0  # the root's infinite derivative at zero is taken as zero
    root = torch.where(positive, torch.where(positive, square, torch.ones_like(square)).sqrt(), square)
    factor = 1 / (root + MOMENTS_EPSILON)
    return torch.stack([grads * factor, m / a * factor], dim=-1), torch.stack([m, v, a, b])


def moment_features(
    grads: Tensor, states: Tensor, _inputs: Tensor, weights: Tensor, scalars: Scalars
) -> tuple[Tensor, Tensor]:
    """RNNProp's features: a linear map with ELU of :func:`moments`; ``weights`` are [20, 2], flat, and a bias [20]."""
    found, new_states = moments(grads, states, scalars)
    matrix, bias = weights[: 2 * MOMENTS_WIDTH].view(MOMENTS_WIDTH, 2), weights[2 * MOMENTS_WIDTH :]
    return F.elu(F.linear(found + (grads - grads).unsqueeze(-1), matrix, bias)), new_states


def add_head(
    outputs: Tensor, params: Tensor, _grads: Tensor, states: Tensor, _inputs: Tensor, _weights: Tensor, scalars: Scalars
) -> tuple[Tensor, Tensor]:
    """θ' = θ + scale · o, Andrychowicz et al. 2016."""
    return params + scalars.head_scale * outputs[0], states


def tanh_head(
    outputs: Tensor, params: Tensor, _grads: Tensor, states: Tensor, _inputs: Tensor, _weights: Tensor, scalars: Scalars
) -> tuple[Tensor, Tensor]:
    """θ' = θ + scale · tanh(o), Lv et al. 2017."""
    return params + scalars.head_scale * outputs[0].tanh(), states


def gate_head(
    outputs: Tensor, params: Tensor, grads: Tensor, states: Tensor, _inputs: Tensor, weights: Tensor, _scalars: Scalars
) -> tuple[Tensor, Tensor]:
    """Meta-LSTM's gates, Ravi & Larochelle 2017: θ' = σ(f') θ - σ(i') g.

    f' = o₀ + w₀ θ + w₁ f and i' = o₁ + w₂ θ + w₃ i. ``states`` are f and i before the sigmoid, [2, N].
    """
    gates = outputs + weights[0::2, None] * params + weights[1::2, None] * states
    forget, admit = gates.sigmoid()
    return forget * params - admit * grads, gates


#: Features stages by name; a kernel receives the index.
FEATURES = {name: gradient_stage(name) for name in PREPROCESS} | {
    "moments": FeaturesStage(MOMENTS_WIDTH, 4, 0, 3 * MOMENTS_WIDTH, moment_features),
    "log_sign_with_loss": FeaturesStage(4, 0, 1, 0, loss_features),
}

#: Head stages by name; a kernel receives the index.
HEADS = {
    "add": HeadStage(1, 0, 0, 0, add_head),
    "gates": HeadStage(2, 2, 0, 4, gate_head),
    "tanh": HeadStage(1, 0, 0, 0, tanh_head),
}


def lstm_cell(x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One LSTM cell, gates in PyTorch's order i, f, g, o. x [N, F or H], h and c [N, H]; returns h', c'."""
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    i, f, g, o = (F.linear(x, weight_ih, bias_ih) + F.linear(h, weight_hh, bias_hh)).chunk(4, dim=-1)
    new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * new_c.tanh(), new_c


def lstm_step(
    params: Tensor,
    grads: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    *,
    preprocess: str = "log_sign",
    preprocess_scale: float = 10.0,
    output_scale: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Preprocess, run the stacked cells, apply the head, update.

    Args:
        params: [N], any floating dtype; like the state, cast to the dtype of the weights for the arithmetic.
        grads: [N]
        h: [L, N, H]
        c: [L, N, H]
        weights: per layer weight_ih [4H, F or H], weight_hh [4H, H], bias_ih [4H], bias_hh [4H]; then the head's
            weight [1, H] and bias [1]
        preprocess: one of :data:`PREPROCESS`
        preprocess_scale: p of the preprocessing
        output_scale: factor of the head's output

    Returns:
        new params [N], new h [L, N, H], new c [L, N, H]
    """
    none = params.new_zeros(0, params.numel(), dtype=weights[0].dtype)
    stages = (FEATURES[preprocess], HEADS["add"])
    scalars = Scalars(features_scale=preprocess_scale, head_scale=output_scale)
    new_params, new_h, new_c, _ = staged_step(params, grads, h, c, none, none, weights, *stages, scalars)
    return new_params, new_h, new_c


def staged_step(
    params: Tensor,
    grads: Tensor,
    h: Tensor,
    c: Tensor,
    states: Tensor,
    coordinate_inputs: Tensor,
    weights: Sequence[Tensor],
    features: FeaturesStage,
    head: HeadStage,
    scalars: Scalars,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, stacked cells, head: the general form of :func:`lstm_step`.

    Args:
        params: [N]; like the next three as in :func:`lstm_step`
        grads: [N]
        h: [L, N, H]
        c: [L, N, H]
        states: [E, N], rows of the features, then of the head
        coordinate_inputs: [K, N]; rows of the features, then of the head
        weights: per layer four as in :func:`lstm_step`; the head's weight [R, H] and bias [R]; then the stages' own
            weights, if any: the features', then the head's
        features: the first stage
        head: the last stage
        scalars: numbers for the stages

    Returns:
        new params [N], new h [L, N, H], new c [L, N, H], new states [E, N]
    """
    dtype, layers = weights[0].dtype, h.shape[0]
    own = iter(weights[4 * layers + 2 :])
    features_weights, head_weights = (next(own) if s.weights else weights[0].new_zeros(0) for s in (features, head))
    wide_params, wide_grads = params.to(dtype), grads.to(dtype)
    x, features_states = features.apply(
        wide_grads,
        states[: features.states],
        coordinate_inputs[: features.coordinate_inputs],
        features_weights,
        scalars,
    )
    new_h, new_c = [], []
    for layer in range(layers):
        x, c_layer = lstm_cell(x, h[layer].to(dtype), c[layer].to(dtype), weights[4 * layer : 4 * layer + 4])
        new_h.append(x)
        new_c.append(c_layer)
    new_params, head_states = head.apply(
        F.linear(x, weights[4 * layers], weights[4 * layers + 1]).movedim(-1, 0),
        wide_params,
        wide_grads,
        states[features.states :],
        coordinate_inputs[features.coordinate_inputs :],
        head_weights,
        scalars,
    )
    new_states = torch.cat([features_states, head_states])
    return new_params.to(params.dtype), torch.stack(new_h).to(h.dtype), torch.stack(new_c).to(c.dtype), new_states
