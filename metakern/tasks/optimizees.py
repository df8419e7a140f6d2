"""Problems for learned optimizers to solve: T of one kind at once, their parameters in one tensor [T, P].

Problems of Andrychowicz et al. 2016, arXiv 1606.04474, section 3. Axis legend: T problems, P parameters of one
problem, B samples of a minibatch.
"""

from __future__ import annotations

import functools
import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.tasks.distribution import check_num_tasks, check_split


class OptimizeeBatch(Protocol):
    """T problems of one kind, each with its data, solved side by side."""

    num_tasks: int

    def init_params(self) -> Tensor:
        """Fresh starting points [T, P]; every call draws anew."""
        ...

    def loss(self, params: Tensor) -> Tensor:
        """Losses [T] of ``params`` [T, P] on the next minibatch of each problem."""
        ...

    def full_loss(self, params: Tensor) -> Tensor:
        """Losses [T] of ``params`` [T, P] on all data of each problem."""
        ...


class Optimizees(Protocol):
    """A distribution of problems. A user's own is a class with these two members."""

    def sample(self, num_tasks: int, generator: torch.Generator) -> OptimizeeBatch:
        """Draw ``num_tasks`` problems; ``generator`` decides them and all randomness within them."""
        ...

    def split(self, name: str) -> Optimizees:
        """The same distribution over other data: "train", "valid" or "test"."""
        ...


class Quadratics:
    """f(θ) = ‖Wθ - y‖², the entries of W [dim, dim] and y [dim] drawn from N(0, 1)."""

    def __init__(self, dim: int = 10) -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim = dim

    def sample(self, num_tasks: int, generator: torch.Generator) -> QuadraticBatch:
        """Draw W and y of ``num_tasks`` problems."""
        check_num_tasks(num_tasks)
        weight = torch.randn(num_tasks, self.dim, self.dim, generator=generator)
        return QuadraticBatch(weight, torch.randn(num_tasks, self.dim, generator=generator), generator)

    def split(self, name: str) -> Quadratics:
        """Itself: problems are drawn without end, so no two splits share one."""
        check_split(name)
        return self


class QuadraticBatch:
    """T quadratics; every loss is on all data."""

    def __init__(self, weight: Tensor, target: Tensor, generator: torch.Generator) -> None:
        self.weight = weight  # [T, dim, dim]
        self.target = target  # [T, dim]
        self.num_tasks = weight.shape[0]
        self._generator = generator

    def init_params(self) -> Tensor:
        """Standard normal starting points [T, dim]."""
        return torch.randn(self.target.shape, generator=self._generator)

    def loss(self, params: Tensor) -> Tensor:
        """Losses [T] of params [T, dim]."""
        return (torch.bmm(self.weight, params.unsqueeze(-1)).squeeze(-1) - self.target).square().sum(-1)

    full_loss = loss


#: Images of each split of scikit-learn's 1,797 handwritten digits.
DIGITS_SPLITS = {"train": (0, 1000), "valid": (1000, 1397), "test": (1397, 1797)}


@functools.cache
def load_digits(split: str) -> tuple[Tensor, Tensor]:
    """Images [n, 64] in [0, 1] and labels [n] of a split of scikit-learn's handwritten digits, shuffled once."""
    from sklearn.datasets import load_digits as load

    check_split(split)
    data = load()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    first, last = DIGITS_SPLITS[split]
    chosen = order[first:last]
    return torch.from_numpy(data.data).float()[chosen] / 16, torch.from_numpy(data.target).long()[chosen]


class DigitsMLP:
    """Classifiers 64-20-10 of handwritten digits: one hidden layer, cross entropy, minibatches drawn with replacement.

    The problem of arXiv 1606.04474, section 3.2, on scikit-learn's 8×8 digits in place of MNIST. A split has images of
    its own, so that a test network learns from images that no training network has seen.

    Args:
        hidden_size: units of the hidden layer
        activation: ``"sigmoid"``, ``"tanh"`` or ``"relu"``
        batch_size: B
        split: ``"train"``, ``"valid"`` or ``"test"``
    """

    def __init__(
        self, hidden_size: int = 20, activation: str = "sigmoid", batch_size: int = 128, split: str = "train"
    ) -> None:
        if hidden_size < 1 or batch_size < 1:
            raise ValueError(f"hidden_size and batch_size must be at least 1, got {hidden_size} and {batch_size}")
        if activation not in ("sigmoid", "tanh", "relu"):
            raise ValueError(f"activation must be sigmoid, tanh or relu, got {activation!r}")
        self.hidden_size, self.activation, self.batch_size = hidden_size, activation, batch_size
        self.images, self.labels = load_digits(split)

    def split(self, name: str) -> DigitsMLP:
        """The same networks on the images of another split."""
        return DigitsMLP(self.hidden_size, self.activation, self.batch_size, name)

    def sample(self, num_tasks: int, generator: torch.Generator) -> DigitsBatch:
        """``num_tasks`` networks; they differ in their starting points and minibatches."""
        check_num_tasks(num_tasks)
        return DigitsBatch(self, num_tasks, generator)


class DigitsBatch:
    """T digit classifiers with parameters [T, P]: per network weight1, bias1, weight2, bias2, flattened in turn."""

    def __init__(self, problem: DigitsMLP, num_tasks: int, generator: torch.Generator) -> None:
        self.problem, self.num_tasks, self._generator = problem, num_tasks, generator
        inputs, hidden = problem.images.shape[1], problem.hidden_size
        self.shapes = [(hidden, inputs), (hidden,), (10, hidden), (10,)]
        self._sizes = [math.prod(shape) for shape in self.shapes]

    def init_params(self) -> Tensor:
        """Starting points [T, P] as ``nn.Linear`` draws them: U(±1/√fan_in)."""
        inputs, hidden = self.shapes[0][1], self.shapes[0][0]
        bounds = [inputs**-0.5, inputs**-0.5, hidden**-0.5, hidden**-0.5]
        draws = [torch.rand(self.num_tasks, size, generator=self._generator) for size in self._sizes]
        return torch.cat([(2 * draw - 1) * bound for draw, bound in zip(draws, bounds, strict=True)], dim=1)

    def loss(self, params: Tensor) -> Tensor:
        """Cross entropy [T] of params [T, P] on the next minibatch of each network."""
        shape = (self.num_tasks, self.problem.batch_size)
        index = torch.randint(len(self.problem.labels), shape, generator=self._generator)
        return self._cross_entropy(params, self.problem.images[index], self.problem.labels[index])

    def full_loss(self, params: Tensor) -> Tensor:
        """Cross entropy [T] of params [T, P] on all images of the split."""
        images, labels = self.problem.images, self.problem.labels
        return self._cross_entropy(
            params, images.expand(self.num_tasks, *images.shape), labels.expand(self.num_tasks, -1)
        )

    def _cross_entropy(self, params: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        w1, b1, w2, b2 = (
            piece.view(self.num_tasks, *shape)
            for piece, shape in zip(params.split(self._sizes, dim=1), self.shapes, strict=True)
        )
        hidden = torch.baddbmm(b1.unsqueeze(1), images, w1.mT)
        hidden = getattr(torch, self.problem.activation)(hidden)
        logits = torch.baddbmm(b2.unsqueeze(1), hidden, w2.mT)
        return (
            F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(self.num_tasks, -1).mean(1)
        )
