"""Standard few-shot models: a multilayer perceptron and the four-block CNN (Conv4)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mlp(*widths: int) -> nn.Sequential:
    """Multilayer perceptron: linear layers with ReLU between them. The fused inner loop serves it.

    Args:
        widths: inputs, units of every hidden layer, outputs

    Raises:
        ValueError: for fewer than two widths, and widths below 1.
    """
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths must be inputs, hidden layers, outputs, at least 1 each, got {list(widths)}")
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def conv4(shape: Sequence[int], filters: int, outputs: int) -> nn.Sequential:
    """Conv4: four blocks of convolution, batch norm over the current batch, ReLU and pooling; then a linear layer.

    Vinyals et al. 2016, arXiv 1606.04080, as Finn et al. 2017, arXiv 1703.03400, train it: 64 filters for Omniglot, 32
    for miniImageNet. The convolutions have no biases: batch norm would cancel them, and their gradients would be mere
    rounding error, which cannot be compared.

    Args:
        shape: image shape: channels, height, width; at least 16 pixels each way
        filters: filters of each convolution
        outputs: number of classes

    Raises:
        ValueError: for any other shape, and sizes below 1.
    """
    if len(shape) != 3 or shape[0] < 1 or min(shape[1:]) < 16:
        raise ValueError(f"shape must be channels, height and width of 16 pixels or more, got {list(shape)}")
    if filters < 1 or outputs < 1:
        raise ValueError(f"filters and outputs must be at least 1, got {filters} and {outputs}")
    channels, height, width = shape
    layers: list[nn.Module] = []
    for inputs in (channels, filters, filters, filters):
        norm = nn.BatchNorm2d(filters, track_running_stats=False)
        layers += [nn.Conv2d(inputs, filters, 3, padding=1, bias=False), norm, nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters * (height // 16) * (width // 16), outputs))
