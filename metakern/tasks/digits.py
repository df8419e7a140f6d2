"""Few-shot episodes of scikit-learn's 1,797 handwritten digits, 8×8: they come with the library, nothing is downloaded.

Axis legend: T tasks, N ways, M images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.core.memo import outside_modes
from metakern.core.requirements import required
from metakern.tasks.episodes import FewShotEpisodes, ImageClasses

#: The digits of each split. A 6 that is turned looks like a 9, so one split has both; none of the others is a digit of
#: another split when it is turned.
DIGITS = {"train": (0, 1, 5, 6, 8, 9), "valid": (2, 3), "test": (4, 7)}


def invert(images: Tensor) -> Tensor:
    """Ink and paper exchanged."""
    return 1 - images


def blur(images: Tensor) -> Tensor:
    """Every pixel of images [M, 1, 8, 8] is the mean of the 3×3 around it; beyond the border there is nothing."""
    return F.avg_pool2d(images, 3, stride=1, padding=1)


def permute(images: Tensor) -> Tensor:
    """The 64 pixels in another order, always the same."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    return images.flatten(1)[:, order].view_as(images)


#: What a task may see its images through.
DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": torch.clone,
    "inverted": invert,
    "blurred": blur,
    "permuted": permute,
}


class Digits(FewShotEpisodes):
    """N-way episodes of digits; each digit under each of four rotations is a class.

    24 classes are to train on, 8 to validate and 8 to test. A split has digits of its own, :data:`DIGITS`: no digit of
    the test was ever seen. A 0, 1 or 8 that is turned by 180 degrees is hardly another class, nor is a 6 from a turned
    9: the training split has these, so its accuracy stays below 1 (and that of validation too, for the turned 2).

    Args:
        domains: names out of :data:`DOMAINS`; every task sees its images through one of them, and ``modes`` says
            through which, counted as they are given here. Default: the images as they are, without ``modes``
        flat: images as vectors [64], otherwise [1, 8, 8]; float32 from 0, paper, to 1
        options: ``ways``, at most 8 for validation and test, ``support``, ``query`` and ``split`` of
            :class:`FewShotEpisodes`

    Raises:
        ValueError: for unknown domains, and as :class:`FewShotEpisodes` does.
    """

    def __init__(self, *, domains: Sequence[str] = (), flat: bool = True, **options: Any) -> None:
        unknown = [name for name in domains if name not in DOMAINS]
        if unknown:
            raise ValueError(f"domains must be out of {', '.join(DOMAINS)}, got {', '.join(map(repr, unknown))}")
        self._domain_names = tuple(domains)
        super().__init__(_classes(), domains=[DOMAINS[name] for name in domains], flat=flat, **options)

    @property
    def mode_names(self) -> tuple[str, ...]:
        """The names of the domains."""
        return self._domain_names


@functools.cache
@outside_modes()
def all_digits() -> tuple[Tensor, Tensor]:
    """The images [1797, 8, 8] in [0, 1], float32, and the digits that they show, 64-bit integers; not to be changed."""
    with required():
        from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.images).float() / 16, torch.from_numpy(data.target).long()


@functools.cache
@outside_modes()
def _classes() -> dict[str, ImageClasses]:
    """The classes of each split, images [M, 1, 8, 8] in [0, 1]."""
    images, labels = all_digits()
    return {
        split: ImageClasses.from_list([images[labels == digit].unsqueeze(1) for digit in digits]).rotated()
        for split, digits in DIGITS.items()
    }
