"""Few-shot regression: families of functions to fit from a few points, and mixtures of families.

Every family is y = a·s(x - c) + b, where s is its shape; the tasks of a family differ in a, c and b. The ranges are
those of the multimodal benchmark of Vuorio et al. 2019 (MMAML), arXiv 1910.13616; what the paper leaves open is taken
from its public code: the frequency of the sinusoid is 1, every centre c and offset b is from U[-3, 3], the factors of
tanh and abs are from U[-3, 3], and the noise is on the targets of the support and of the query points.

Axis legend: T tasks, S support and Q query samples of a task, K families of a mixture.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from metakern.tasks.distribution import SPLITS, Episodes, ShortRepr, check_num_tasks, check_split

#: The interval that x is drawn from.
INPUTS = (-5.0, 5.0)

Range = tuple[float, float]


class Family(ShortRepr):
    """Functions a·s(x - c) + b of one shape s; define a family by a subclass that sets the class attributes.

    x is from U[-5, 5]. There are infinitely many tasks. Each split rotates the draws of a, c and b within their ranges
    by another third, so that no two splits share a task even for generators of the same seed.

    Args:
        support: S
        query: Q
        noise: standard deviation of the Gaussian noise on all targets, support and query; 0 for exact functions

    Raises:
        ValueError: for fewer than 1 support or query sample, and for negative noise.

    Example:
        >>> isinstance(Sinusoid(), Family)
        True
    """

    #: The shape function s, elementwise.
    shape: ClassVar[Callable[[Tensor], Tensor]]
    #: Ranges of the uniform draws of a, c and b.
    factor: ClassVar[Range]
    centre: ClassVar[Range] = (-3.0, 3.0)
    offset: ClassVar[Range] = (-3.0, 3.0)
    #: Added to the magnitude of a after its draw.
    least: ClassVar[float] = 0.0

    def __init__(self, support: int = 5, query: int = 5, noise: float = 0.3) -> None:
        if support < 1 or query < 1:
            raise ValueError(f"support and query must be at least 1, got {support} and {query}")
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise must be a standard deviation, 0 or more, got {noise}")
        self.support, self.query, self.noise, self._turn = support, query, noise, 0.0

    def sample(self, num_tasks: int, generator: torch.Generator) -> Episodes:
        """Draw ``num_tasks`` functions: inputs and targets [T, S, 1] and [T, Q, 1], float32."""
        check_num_tasks(num_tasks)
        table = torch.tensor(self._row(), device=generator.device)
        return _draw(self, table.expand(num_tasks, 1, -1), type(self).shape, generator, None)

    def split(self, name: str) -> Self:
        """The functions of one of the splits."""
        check_split(name)
        other = copy.copy(self)
        other._turn = SPLITS.index(name) / len(SPLITS)
        return other

    def _row(self) -> list[float]:
        """Row of the table for :func:`_draw`: lower ends and lengths of the three ranges, least, noise, rotation."""
        ranges = (self.factor, self.centre, self.offset)
        lows, lengths = [low for low, _ in ranges], [high - low for low, high in ranges]
        return [*lows, *lengths, self.least, self.noise, self._turn]


class Sinusoid(Family):
    """A·sin(x - φ), A from U[0.1, 5], φ from U[0, π]; with ``noise=0`` that of Finn et al. 2017, arXiv 1703.03400.

    Example:
        >>> Sinusoid(support=5, query=5).sample(32, generator).support_x.shape
        torch.Size([32, 5, 1])
    """

    shape = torch.sin
    factor = (0.1, 5.0)
    centre = (0.0, math.pi)
    offset = (0.0, 0.0)


class Linear(Family):
    """a·x + b, both from U[-3, 3].

    Example:
        >>> Linear().sample(32, generator).support_x.shape
        torch.Size([32, 5, 1])
    """

    shape = torch.Tensor.clone
    factor = (-3.0, 3.0)
    centre = (0.0, 0.0)


class Quadratic(Family):
    """±a·(x - c)² + b, a from U[0.02, 0.15], both signs equally likely.

    Example:
        >>> Quadratic().sample(32, generator).support_x.shape
        torch.Size([32, 5, 1])
    """

    shape = torch.square
    factor = (-0.13, 0.13)
    least = 0.02


class Tanh(Family):
    """a·tanh(x - c) + b, a from U[-3, 3].

    Example:
        >>> Tanh().sample(32, generator).support_x.shape
        torch.Size([32, 5, 1])
    """

    shape = torch.tanh
    factor = (-3.0, 3.0)


class Abs(Family):
    """a·|x - c| + b, a from U[-3, 3].

    Example:
        >>> Abs().sample(32, generator).support_x.shape
        torch.Size([32, 5, 1])
    """

    shape = torch.abs
    factor = (-3.0, 3.0)


class Mixture(ShortRepr):
    """Tasks of K families; ``modes`` of a batch holds the index of every task's family.

    Every task draws its family independently, so the shares vary between batches. (MMAML's public code takes equally
    many tasks of every family in each batch.)

    Args:
        components: the families, with S and Q in common
        weights: their probabilities, up to a common factor; default: all the same

    Raises:
        ValueError: for no components, components of different S or Q, and weights that are not K nonnegative numbers
            with a positive sum.

    Example:
        >>> tasks = Mixture([Sinusoid(), Linear()], weights=[0.75, 0.25])
        >>> tasks.sample(32, generator).modes.shape
        torch.Size([32])
    """

    def __init__(self, components: Sequence[Family], weights: Sequence[float] | None = None) -> None:
        if not components:
            raise ValueError("components must hold at least one family, got none")
        sizes = {(family.support, family.query) for family in components}
        if len(sizes) > 1:
            raise ValueError(f"components must have the same support and query, got {sorted(sizes)}")
        self.components = tuple(components)
        self.weights = torch.tensor([1.0] * len(components) if weights is None else weights, dtype=torch.float32)
        fits = self.weights.shape == (len(components),) and bool(self.weights.isfinite().all())
        if not fits or self.weights.min() < 0 or self.weights.sum() == 0:
            raise ValueError(
                f"weights must be {len(components)} numbers of at least 0, one for each component, with a positive "
                f"sum, got {weights}"
            )
        self._table = torch.tensor([family._row() for family in components])

    def sample(self, num_tasks: int, generator: torch.Generator) -> Episodes:
        """Draw ``num_tasks`` functions: inputs and targets [T, S, 1] and [T, Q, 1], float32, and ``modes`` [T]."""
        check_num_tasks(num_tasks)
        device = generator.device
        modes = torch.multinomial(self.weights.to(device), num_tasks, replacement=True, generator=generator)
        tasks = torch.arange(num_tasks, device=device)

        def shape(z: Tensor) -> Tensor:
            return torch.stack([type(family).shape(z) for family in self.components])[modes, tasks]

        return _draw(self.components[0], self._table.to(device)[modes].unsqueeze(1), shape, generator, modes)

    @property
    def mode_names(self) -> tuple[str, ...]:
        """Names of the families: their class names in lower case."""
        return tuple(type(family).__name__.lower() for family in self.components)

    def split(self, name: str) -> Mixture:
        """The functions of one of the splits, in the same shares."""
        return Mixture([family.split(name) for family in self.components], self.weights.tolist())


def mixture(num_modes: int, support: int = 5, query: int = 5, noise: float = 0.3) -> Mixture:
    """MMAML's mixture of 2 (sinusoid, linear), 3 (and quadratic) or 5 families (and tanh, abs), in equal shares.

    Raises:
        ValueError: for another number of modes, and as the families do.

    Example:
        >>> batch = mixture(3).sample(32, generator)  # sinusoids, lines and parabolas
    """
    if num_modes not in (2, 3, 5):
        raise ValueError(f"num_modes must be 2, 3 or 5, got {num_modes}")
    families = (Sinusoid, Linear, Quadratic, Tanh, Abs)[:num_modes]
    return Mixture([family(support, query, noise) for family in families])


def _draw(
    sizes: Family, table: Tensor, shape: Callable[[Tensor], Tensor], generator: torch.Generator, modes: Tensor | None
) -> Episodes:
    """Draw episodes; ``table`` [T, 1, 9] holds every task's :meth:`Family._row`."""
    low, length, least, noise, turn = table.split([3, 3, 1, 1, 1], dim=-1)
    num_tasks, samples, device = table.shape[0], sizes.support + sizes.query, generator.device
    draws = (torch.rand(num_tasks, 1, 3, generator=generator, device=device) + turn) % 1
    factor, centre, offset = torch.addcmul(low, draws, length).split(1, dim=-1)
    x = torch.empty(num_tasks, samples, 1, device=device).uniform_(*INPUTS, generator=generator)
    y = torch.addcmul(offset, factor + torch.copysign(least, factor), shape(x - centre))
    y += torch.randn(x.shape, generator=generator, device=device) * noise
    parts = [part.contiguous() for z in (x, y) for part in z.split([sizes.support, sizes.query], dim=1)]
    return Episodes(parts[0], parts[2], parts[1], parts[3], modes)
