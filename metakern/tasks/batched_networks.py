"""Forward passes of T small classifiers side by side, by batched matrix products.

``torch.vmap`` gives the same numbers up to rounding, but its overhead exceeds the work of networks this small. Axis
legend: T networks, B samples, H hidden units, C output channels of the first convolution.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.core.memo import outside_modes


def affine(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x Wᵀ + b`` of every network: inputs [T, B, I], weight [T, O, I], bias [T, O]; to [T, B, O]."""
    return torch.baddbmm(bias.unsqueeze(1), inputs, weight.mT)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy [T] of logits [T, B, classes] and labels [T, B]."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(len(logits), -1).mean(1)


def convolutional(images: Tensor, weights: Sequence[Tensor], side: int) -> Tensor:
    """Outputs [T, B, O] of two 3×3 convolutions of stride 2 and padding 1 with ReLU, and a linear layer.

    Args:
        images: [T, B, side²]
        weights: of the three layers, each weight then bias: [T, C, 1, 3, 3], [T, C], [T, 2C, C, 3, 3], [T, 2C],
            [T, O, 2C (side/4)²], [T, O]
        side: of an image in pixels, a multiple of 4
    """
    w1, b1, w2, b2, w3, b3 = weights
    tasks, samples = images.shape[:2]
    channels, middle, last = w1.shape[1], (side // 2) ** 2, (side // 4) ** 2
    patches = F.pad(images, (0, 1)).index_select(2, _patches(side, images.device))
    maps = affine(patches.view(tasks, samples * middle, 9), w1.flatten(2), b1).relu()
    # Pixels before channels: a patch is then copied in runs of C numbers.
    maps = F.pad(maps.view(tasks, samples, middle, channels), (0, 0, 0, 1))
    patches = maps.index_select(2, _patches(side // 2, images.device)).view(tasks, samples * last, 9 * channels)
    maps = affine(patches, w2.flatten(3).mT.flatten(2), b2).relu()
    head = w3.unflatten(2, (2 * channels, last)).mT.flatten(2)
    return affine(maps.view(tasks, samples, last * 2 * channels), head, b3)


@functools.cache
@outside_modes()
def _patches(side: int, device: torch.device) -> Tensor:
    """Pixels of all 3×3 patches, one patch after another; ``side²`` stands for the padding of zeros."""
    pixels = torch.arange(side**2, device=device).view(side, side)
    return F.pad(pixels, (1, 0, 1, 0), value=side**2).unfold(0, 3, 2).unfold(1, 3, 2).flatten()


def recurrent(rows: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Outputs [T, B, O] of h' = tanh(U·row + b + V·h) over the rows and a linear layer on the last h.

    Args:
        rows: [T, B, S, I], S rows of I numbers
        weights: U [T, H, I], b [T, H], V [T, H, H], the linear layer's [T, O, H] and [T, O]
    """
    u, b, v, head, bias = weights
    inputs = affine(rows.flatten(1, 2), u, b).unflatten(1, rows.shape[1:3]).unbind(2)
    hidden = inputs[0].tanh()
    for row in inputs[1:]:
        hidden = torch.baddbmm(row, hidden, v.mT).tanh()
    return affine(hidden, head, bias)
