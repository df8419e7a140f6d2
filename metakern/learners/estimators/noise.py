"""Perturbations of the rule's weights: what every estimator keeps between truncations.

Axis legend: T problems, W weights of the rule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

#: Draws standard normal numbers [T, W].
Draw = Callable[[], Tensor]


class Noise(ABC):
    """ε, in units of σ, and the sum of perturbations that the difference of a pair's losses is multiplied by.

    Attributes:
        epsilon: ε, [T, W]; the two of a pair have the weights w + σε and w - σε
        factor: A, [T, W]
    """

    keeps_positive: ClassVar[bool] = (
        False  # whether both of a pair start a truncation from the state of the positive one
    )

    epsilon: Tensor
    factor: Tensor

    @property
    def begun(self) -> bool:
        """Whether there has been a truncation."""
        return hasattr(self, "epsilon")

    @abstractmethod
    def restart(self, slots: Sequence[int]) -> None:
        """New problems begin at ``slots``."""

    @abstractmethod
    def begin(self, draw: Draw) -> None:
        """A truncation begins; the number of draws must not depend on restarts, so that processes draw alike."""

    def load(self, epsilon: Tensor, factor: Tensor) -> None:
        """Restore saved values."""
        self.epsilon, self.factor = epsilon, factor


class TruncatedES(Noise):
    """Truncated evolution strategies: fresh ε for each truncation, which starts from one state.

    Biased: what a truncation does to later ones does not count.
    """

    keeps_positive = True

    def begin(self, draw: Draw) -> None:
        """A = ε, drawn anew."""
        self.epsilon = self.factor = draw()

    def restart(self, slots: Sequence[int]) -> None:
        """Nothing changes: ε belongs to the truncation."""


class PES(Noise):
    """Persistent evolution strategies: each of a pair keeps its own state, and A sums the ε of a problem's life.

    Unbiased. Vicol, Metz & Sohl-Dickstein 2021, arXiv 2112.13835, algorithm 2.
    """

    def begin(self, draw: Draw) -> None:
        """A ← A + ε."""
        epsilon = draw()
        self.factor = self.factor + epsilon if self.begun else epsilon
        self.epsilon = epsilon

    def restart(self, slots: Sequence[int]) -> None:
        """A ← ε where a new problem begins."""
        self.factor = self.factor.clone()
        self.factor[list(slots)] = self.epsilon[list(slots)]


class NoiseReuse(Noise):
    """Noise-reuse evolution strategies: one ε for a problem's whole life.

    Unbiased. Li et al. 2023, arXiv 2304.12180; as ES-Single, Vicol 2023, arXiv 2304.11153.
    """

    _next: Tensor

    def begin(self, draw: Draw) -> None:
        """Draw what the problems that begin in this truncation will take."""
        self._next = draw()
        if not self.begun:
            self.epsilon = self.factor = draw()

    def restart(self, slots: Sequence[int]) -> None:
        """Fresh ε where a new problem begins."""
        self.epsilon = self.epsilon.clone()
        self.epsilon[list(slots)] = self._next[list(slots)]
        self.factor = self.epsilon
