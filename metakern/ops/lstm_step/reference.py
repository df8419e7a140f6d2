"""lstm_step in plain PyTorch: one step of the coordinatewise LSTM optimizer.

Andrychowicz et al. 2016, "Learning to learn by gradient descent by gradient descent", arXiv 1606.04474.

Axis legend: N coordinates, F features (1 or 2), H hidden units, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: Names of the gradient preprocessings; a kernel receives the index. Keep in step with csrc/math/preprocess.h.
PREPROCESS = ("none", "log_sign", "log_and_clip")

#: What log_and_clip adds inside its logarithm: the float32 machine epsilon, for every dtype.
LOG_AND_CLIP_EPSILON = 1.1920928955078125e-07


def num_features(preprocess: str) -> int:
    """Features that a preprocessing makes of one gradient."""
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

    By the formulas alone an infinite gradient would saturate the gates and yield a step that looks sound; so the
    coordinate shows it. The term that is added is zero elsewhere.
    """
    return gradient_features(grads, preprocess, scale) + (grads - grads).unsqueeze(-1)


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
    dtype = weights[0].dtype
    x = preprocess_gradient(grads.to(dtype), preprocess, preprocess_scale)
    new_h, new_c = [], []
    for layer in range(h.shape[0]):
        x, c_layer = lstm_cell(x, h[layer].to(dtype), c[layer].to(dtype), weights[4 * layer : 4 * layer + 4])
        new_h.append(x)
        new_c.append(c_layer)
    out = F.linear(x, weights[-2], weights[-1]).squeeze(-1)
    new_params = (params.to(dtype) + output_scale * out).to(params.dtype)
    return new_params, torch.stack(new_h).to(h.dtype), torch.stack(new_c).to(c.dtype)
