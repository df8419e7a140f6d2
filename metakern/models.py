"""Standard few-shot models: a multilayer perceptron, the four-block CNN (Conv4) and ResNet-12."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

#: Filters of the four blocks of ResNet-12: TADAM's (Oreshkin et al. 2018) and the wider ones of MetaOptNet (Lee et al.
#: 2019).
RESNET12_WIDTHS = (64, 128, 256, 512)
RESNET12_WIDE = (64, 160, 320, 640)


def mlp(*widths: int) -> nn.Sequential:
    """Multilayer perceptron: linear layers with ReLU between them. The fused inner loop serves it.

    Args:
        widths: inputs, units of every hidden layer, outputs

    Raises:
        ValueError: for fewer than two widths, and widths below 1.

    Example:
        >>> mlp(64, 20, 5)(torch.rand(3, 64)).shape
        torch.Size([3, 5])
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

    Weights start as in Finn's code (github.com/cbfinn/maml, ``construct_conv_weights`` in maml.py): from the uniform
    distribution within ±√(6 / (inputs + outputs)) of Glorot and Bengio 2010, where a channel of a convolution counts
    nine times; biases of the linear layer and of batch norm at zero. Batch norm's factors, which that code does not
    have, start at one. Its Omniglot network differs in pooling and in its linear layer, which starts from N(0, 1).

    Args:
        shape: image shape: channels, height, width; at least 16 pixels each way
        filters: filters of each convolution
        outputs: number of classes

    Raises:
        ValueError: for any other shape, and sizes below 1.

    Example:
        >>> conv4((1, 28, 28), filters=64, outputs=5)(torch.rand(3, 1, 28, 28)).shape
        torch.Size([3, 5])
    """
    _check_shape(shape)
    if filters < 1 or outputs < 1:
        raise ValueError(f"filters and outputs must be at least 1, got {filters} and {outputs}")
    channels, height, width = shape
    layers: list[nn.Module] = []
    for inputs in (channels, filters, filters, filters):
        convolution = nn.Conv2d(inputs, filters, 3, padding=1, bias=False)
        nn.init.xavier_uniform_(convolution.weight)
        layers += [convolution, nn.BatchNorm2d(filters, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2)]
    linear = nn.Linear(filters * (height // 16) * (width // 16), outputs)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(*layers, nn.Flatten(), linear)


class ResidualBlock(nn.Module):
    """Block of ResNet-12: three convolutions with batch norm, a 1x1 shortcut, leaky ReLU (0.1), max-pooling by 2.

    Example:
        >>> ResidualBlock(3, 64)(torch.rand(2, 3, 84, 84)).shape
        torch.Size([2, 64, 42, 42])
    """

    def __init__(self, inputs: int, filters: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(3):
            layers += [*_convolution(filters if index else inputs, filters, 3), nn.LeakyReLU(0.1)]
        self.body = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential(*_convolution(inputs, filters, 1))
        self.activation = nn.LeakyReLU(0.1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Images [S, inputs, H, W] to [S, filters, H // 2, W // 2]."""
        pooled: Tensor = self.pool(self.activation(self.body(x) + self.shortcut(x)))
        return pooled


def resnet12(shape: Sequence[int], outputs: int, widths: Sequence[int] = RESNET12_WIDTHS) -> nn.Sequential:
    """ResNet-12: four residual blocks, the mean over the image, a linear layer.

    Oreshkin et al. 2018 (TADAM), arXiv 1805.10123, with 64-128-256-512 filters; Lee et al. 2019 (MetaOptNet), arXiv
    1904.03758, have 64-160-320-640: :data:`RESNET12_WIDTHS` and :data:`RESNET12_WIDE`. Convolutions start as in
    MetaOptNet's code (github.com/kjunelee/MetaOptNet, models/ResNet12_embedding.py): from He's normal distribution by
    their outputs (``mode="fan_out"``), batch norms at one and zero; the linear layer, which MetaOptNet does not have,
    as PyTorch starts it. Batch norm takes the current batch's statistics, as in :func:`conv4`, and nothing is dropped:
    MetaOptNet's DropBlock is left out.

    Args:
        shape: image shape: channels, height, width; at least 16 pixels each way
        outputs: number of classes
        widths: filters of the four blocks

    Raises:
        ValueError: for any other shape, other than four widths, and sizes below 1.

    Example:
        >>> resnet12((3, 84, 84), outputs=5)(torch.rand(2, 3, 84, 84)).shape
        torch.Size([2, 5])
    """
    _check_shape(shape)
    if len(widths) != 4 or min(widths) < 1 or outputs < 1:
        got = f"{list(widths)} and {outputs}"
        raise ValueError(f"widths must be the filters of four blocks, and they and outputs at least 1, got {got}")
    blocks = [ResidualBlock(inputs, filters) for inputs, filters in pairwise((shape[0], *widths))]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], outputs))


def resnet12_widths(filters: int | None) -> tuple[int, ...]:
    """Filters of ResNet-12's blocks by those of the last: 640 gives :data:`RESNET12_WIDE`, others are halved.

    None gives :data:`RESNET12_WIDTHS`.

    Raises:
        ValueError: for counts that cannot be halved three times.

    Example:
        >>> resnet12_widths(640)
        (64, 160, 320, 640)
    """
    if filters is None:
        return RESNET12_WIDTHS
    if filters == RESNET12_WIDE[-1]:
        return RESNET12_WIDE
    if filters < 8 or filters % 8:
        raise ValueError(f"filters of resnet12 must be a multiple of 8, 512 or 640 as published, got {filters}")
    return filters // 8, filters // 4, filters // 2, filters


def _check_shape(shape: Sequence[int]) -> None:
    if len(shape) != 3 or shape[0] < 1 or min(shape[1:]) < 16:
        raise ValueError(f"shape must be channels, height and width of 16 pixels or more, got {list(shape)}")


def _convolution(inputs: int, filters: int, size: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution of ResNet-12, which keeps the image's size, and its batch norm."""
    convolution = nn.Conv2d(inputs, filters, size, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="leaky_relu")
    return convolution, nn.BatchNorm2d(filters, track_running_stats=False)
