"""Small networks that learn scikit-learn's handwritten digits, as problems for learned optimizers.

The problem of Andrychowicz et al. 2016, arXiv 1606.04474, section 3.2, on 8×8 digits in place of MNIST, and the kinds
of network that arXiv 2110.14459 trains: logistic regression, fully connected, convolutional and recurrent. The splits
share no images, so test networks learn from images that no training network has seen.

Axis legend: T networks, B samples of a minibatch.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from metakern.core.memo import outside_modes
from metakern.tasks.batched_networks import affine, convolutional, cross_entropy, recurrent
from metakern.tasks.digits import all_digits
from metakern.tasks.distribution import check_split
from metakern.tasks.network_problems import NetworkProblem
from metakern.tasks.optimizees import check_params

#: Ranges of image indices of each split of scikit-learn's 1,797 handwritten digits.
DIGITS_SPLITS = {"train": (0, 1000), "valid": (1000, 1397), "test": (1397, 1797)}


@functools.cache
@outside_modes()
def load_digits(split: str) -> tuple[Tensor, Tensor]:
    """Images [n, 64] in [0, 1] and labels [n] of a split of scikit-learn's handwritten digits, shuffled once."""
    check_split(split)
    images, labels = all_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    first, last = DIGITS_SPLITS[split]
    chosen = order[first:last]
    return images.flatten(1)[chosen], labels[chosen]


#: Side of an image in pixels, and number of classes.
SIDE, CLASSES = 8, 10

_ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}


def _in_order(problem: NetworkProblem, params: dict[str, Tensor]) -> list[Tensor]:
    """The params of networks in the order of their modules, checked."""
    params = check_params(params, problem.shapes)
    return [params[name] for name in problem.shapes]


class DigitsMLP(NetworkProblem):
    """Classifiers 64-20-10: one hidden layer, cross entropy, minibatches drawn with replacement.

    Args:
        hidden_size: units of the hidden layer
        activation: ``"sigmoid"``, ``"tanh"`` or ``"relu"``
        batch_size: B
        split: ``"train"``, ``"valid"`` or ``"test"``

    Example:
        >>> batch = DigitsMLP(hidden_size=20).sample(8, generator)
        >>> batch.loss(batch.init_params()).shape
        torch.Size([8])
    """

    def __init__(
        self, hidden_size: int = 20, activation: str = "sigmoid", batch_size: int = 128, split: str = "train"
    ) -> None:
        if hidden_size < 1 or batch_size < 1:
            raise ValueError(f"hidden_size and batch_size must be at least 1, got {hidden_size} and {batch_size}")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be sigmoid, tanh or relu, got {activation!r}")
        self.hidden_size, self.activation = hidden_size, activation
        super().__init__(self._make, load_digits, batch_size=batch_size, split=split)

    def _make(self) -> nn.Module:
        first, second = nn.Linear(SIDE * SIDE, self.hidden_size), nn.Linear(self.hidden_size, CLASSES)
        return nn.Sequential(first, _ACTIVATIONS[self.activation](), second)

    def losses(self, params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy [T] of params, by batched products instead of vmap."""
        w1, b1, w2, b2 = _in_order(self, params)
        hidden = getattr(torch, self.activation)(affine(inputs, w1, b1))
        return cross_entropy(affine(hidden, w2, b2), targets)


class DigitsRegression(NetworkProblem):
    """Logistic regressions 64-10: one linear layer, cross entropy; the one convex problem here.

    Args:
        batch_size: B
        split: ``"train"``, ``"valid"`` or ``"test"``

    Example:
        >>> batch = DigitsRegression().sample(8, generator)
        >>> batch.loss(batch.init_params()).shape
        torch.Size([8])
    """

    def __init__(self, batch_size: int = 128, split: str = "train") -> None:
        super().__init__(
            functools.partial(nn.Linear, SIDE * SIDE, CLASSES), load_digits, batch_size=batch_size, split=split
        )

    def losses(self, params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy [T] of params, by batched products instead of vmap."""
        return cross_entropy(affine(inputs, *_in_order(self, params)), targets)


class DigitsCNN(NetworkProblem):
    """Classifiers with two 3×3 convolutions of stride 2 and ReLU, 8×8 → 4×4 → 2×2, and a linear layer.

    Args:
        channels: output channels of the first convolution; the second has twice as many
        batch_size: B
        split: ``"train"``, ``"valid"`` or ``"test"``

    Example:
        >>> batch = DigitsCNN().sample(8, generator)
        >>> batch.loss(batch.init_params()).shape
        torch.Size([8])
    """

    def __init__(self, channels: int = 8, batch_size: int = 128, split: str = "train") -> None:
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        self.channels = channels
        super().__init__(functools.partial(_cnn, channels), load_digits, batch_size=batch_size, split=split)

    def losses(self, params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy [T] of params, by batched products instead of vmap."""
        return cross_entropy(convolutional(inputs, _in_order(self, params), SIDE), targets)


def _cnn(channels: int) -> nn.Module:
    convolution = functools.partial(nn.Conv2d, kernel_size=3, stride=2, padding=1)
    return nn.Sequential(
        nn.Unflatten(1, (1, SIDE, SIDE)),
        convolution(1, channels),
        nn.ReLU(),
        convolution(channels, 2 * channels),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * channels * (SIDE // 4) ** 2, CLASSES),
    )


class DigitsRNN(NetworkProblem):
    """Classifiers that read an image row by row: 8 steps of a tanh RNN, and a linear layer on the last hidden state.

    Args:
        hidden_size: units of the hidden state
        batch_size: B
        split: ``"train"``, ``"valid"`` or ``"test"``

    Example:
        >>> batch = DigitsRNN().sample(8, generator)
        >>> batch.loss(batch.init_params()).shape
        torch.Size([8])
    """

    def __init__(self, hidden_size: int = 20, batch_size: int = 128, split: str = "train") -> None:
        if hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, got {hidden_size}")
        self.hidden_size = hidden_size
        super().__init__(functools.partial(RowRNN, hidden_size), load_digits, batch_size=batch_size, split=split)

    def losses(self, params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy [T] of params, by batched products instead of vmap."""
        return cross_entropy(recurrent(inputs.unflatten(2, (SIDE, SIDE)), _in_order(self, params)), targets)


class RowRNN(nn.Module):
    """h' = tanh(U·row + V·h) over the rows of an image, then a linear layer; vmap does not support ``nn.RNN``."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.row = nn.Linear(SIDE, hidden_size)
        self.recurrent = nn.Linear(hidden_size, hidden_size, bias=False)
        self.head = nn.Linear(hidden_size, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 64]."""
        rows = self.row(images.unflatten(1, (SIDE, SIDE))).unbind(1)
        hidden = torch.tanh(rows[0])
        for row in rows[1:]:
            hidden = torch.tanh(row + self.recurrent(hidden))
        logits: Tensor = self.head(hidden)
        return logits
