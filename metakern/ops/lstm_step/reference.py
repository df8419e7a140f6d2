"""lstm_step in plain PyTorch: one step of the coordinatewise LSTM optimizer, as features × cells × head.

Andrychowicz et al. 2016, "Learning to learn by gradient descent by gradient descent", arXiv 1606.04474.

Axis legend: N coordinates, F features, H hidden units, L layers, R outputs of the head, E rows of the stages' state,
K task inputs.
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


class FeaturesStage(NamedTuple):
    """A stage that computes the inputs of the lowest cell; see csrc/math/features.h.

    Attributes:
        inputs: F, number of features.
        states: number of state values per coordinate.
        task_inputs: number of inputs per task.
        weights: number of weights, shared by all coordinates.
        apply: maps gradients [N], states [states, N], task inputs [task_inputs, N], weights [weights] and the scale to
            features [N, F] and new states [states, N].
    """

    inputs: int
    states: int
    task_inputs: int
    weights: int
    apply: Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


class HeadStage(NamedTuple):
    """A stage that updates the parameters from the outputs of the top cell; see csrc/math/heads.h.

    Attributes:
        outputs: R, rows of the head's linear map.
        states: as in :class:`FeaturesStage`.
        task_inputs: as in :class:`FeaturesStage`.
        weights: as in :class:`FeaturesStage`.
        apply: maps outputs [R, N], params and gradients [N], states, task inputs, weights and the scale to new params
            [N] and new states.
    """

    outputs: int
    states: int
    task_inputs: int
    weights: int
    apply: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def gradient_stage(preprocess: str) -> FeaturesStage:
    """The stage of a gradient preprocessing, with one or two features."""
    return FeaturesStage(
        num_features(preprocess),
        *(0, 0, 0),
        lambda grads, states, _tasks, _weights, scale: (preprocess_gradient(grads, preprocess, scale), states),
    )


#: Keeps RNNProp's features finite where the moments are zero.
MOMENTS_EPSILON = 1e-8


def moment_features(
    grads: Tensor, states: Tensor, task_inputs: Tensor, _: Tensor, _scale: float
) -> tuple[Tensor, Tensor]:
    """RNNProp's features, Lv et al. 2017, arXiv 1703.03633: the gradient and its moving mean, divided by √v̂.

    Args:
        grads: [N]
        states: the moving means m of the gradient and v of its square, [2, N]
        task_inputs: β1, β2 and the bias corrections 1 / (1 - β1^t), 1 / (1 - β2^t), [4, N]

    Returns:
        features [N, 2], new states [2, N]
    """
    (m, v), (beta1, beta2, correct1, correct2) = states, task_inputs
    m = beta1 * m + (1 - beta1) * grads
    v = beta2 * v + (1 - beta2) * grads.square()
    square = correct2 * v
    positive = square > 0  # the root's infinite derivative at zero is taken as zero
    root = torch.where(positive, torch.where(positive, square, torch.ones_like(square)).sqrt(), square)
    factor = 1 / (root + MOMENTS_EPSILON)
    features = torch.stack([grads * factor, correct1 * m * factor], dim=-1) + (grads - grads).unsqueeze(-1)
    return features, torch.stack([m, v])


def add_head(
    outputs: Tensor, params: Tensor, _grads: Tensor, states: Tensor, _tasks: Tensor, _weights: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """θ' = θ + scale · o, Andrychowicz et al. 2016."""
    return params + scale * outputs[0], states


def gate_head(
    outputs: Tensor, params: Tensor, grads: Tensor, states: Tensor, _tasks: Tensor, weights: Tensor, _scale: float
) -> tuple[Tensor, Tensor]:
    """Meta-LSTM's gates, Ravi & Larochelle 2017: θ' = σ(f') θ - σ(i') g.

    f' = o₀ + w₀ θ + w₁ f and i' = o₁ + w₂ θ + w₃ i. ``states`` are f and i before the sigmoid, [2, N].
    """
    gates = outputs + weights[0::2, None] * params + weights[1::2, None] * states
    forget, admit = gates.sigmoid()
    return forget * params - admit * grads, gates


#: Features stages by name; a kernel receives the index.
FEATURES = {name: gradient_stage(name) for name in PREPROCESS} | {
    "moments": FeaturesStage(2, 2, 4, 0, moment_features),
}

#: Head stages by name; a kernel receives the index.
HEADS = {"add": HeadStage(1, 0, 0, 0, add_head), "gates": HeadStage(2, 2, 0, 4, gate_head)}


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
    options = (FEATURES[preprocess], HEADS["add"], preprocess_scale, output_scale)
    new_params, new_h, new_c, _ = staged_step(params, grads, h, c, none, none, weights, *options)
    return new_params, new_h, new_c


def staged_step(
    params: Tensor,
    grads: Tensor,
    h: Tensor,
    c: Tensor,
    states: Tensor,
    task_inputs: Tensor,
    weights: Sequence[Tensor],
    features: FeaturesStage,
    head: HeadStage,
    features_scale: float,
    head_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, stacked cells, head: the general form of :func:`lstm_step`.

    Args:
        params: [N]; like the next three as in :func:`lstm_step`
        grads: [N]
        h: [L, N, H]
        c: [L, N, H]
        states: [E, N], rows of the features, then of the head
        task_inputs: [K, N], each task's repeated for its coordinates; rows of the features, then of the head
        weights: per layer four as in :func:`lstm_step`; the head's weight [R, H] and bias [R]; then the stages' own
            weights, if any: the features', then the head's
        features: the first stage
        head: the last stage
        features_scale: scale passed to the features stage
        head_scale: scale passed to the head stage

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
        task_inputs[: features.task_inputs],
        features_weights,
        features_scale,
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
        task_inputs[features.task_inputs :],
        head_weights,
        head_scale,
    )
    new_states = torch.cat([features_states, head_states])
    return new_params.to(params.dtype), torch.stack(new_h).to(h.dtype), torch.stack(new_c).to(c.dtype), new_states
