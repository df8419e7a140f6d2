"""Few-shot episodes of scikit-learn's 1,797 handwritten digits, 8×8, which come with that library (no download).

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

#: The digits of each split. A rotated 6 looks like a 9, so one split has both; no other digit looks like one of another
#: split when rotated.
DIGITS = {"train": (0, 1, 5, 6, 8, 9), "valid": (2, 3), "test": (4, 7)}


def invert(images: Tensor) -> Tensor:
    """Images with ink and paper swapped."""
    return 1 - images


def blur(images: Tensor) -> Tensor:
    """Box blur of images [M, 1, 8, 8]: means over 3×3 pixels, with zeros beyond the border."""
    return F.avg_pool2d(images, 3, stride=1, padding=1)


def permute(images: Tensor) -> Tensor:
    """Images with their 64 pixels in a fixed random order."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    return images.flatten(1)[:, order].view_as(images)


#: Image transformations of the domains, by name.
DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": torch.clone,
    "inverted": invert,
    "blurred": blur,
    "permuted": permute,
}


class Digits(FewShotEpisodes):
    """N-way episodes of digits; each digit under each of four rotations is a class.

    There are 24 classes to train on, 8 to validate and 8 to test. The splits share no digits, :data:`DIGITS`. A 0, 1 or
    8 rotated by 180 degrees hardly differs from the original, nor a 6 from a rotated 9: the training split has these,
    so its accuracy stays below 1 (as does that of validation, because of the rotated 2).

    Args:
        domains: names from :data:`DOMAINS`; the images of a task are transformed by one of them, and ``modes`` holds
            its index in this list. Default: the images as they are, without ``modes``
        flat: images as vectors [64], otherwise [1, 8, 8]; float32 from 0, paper, to 1, ink
        options: ``ways``, at most 8 for validation and test, ``support``, ``query`` and ``split`` of
            :class:`FewShotEpisodes`

    Raises:
        ValueError: for unknown domains, and as :class:`FewShotEpisodes` does.

    Example:
        >>> tasks = Digits(ways=5, support=1, query=15)
        >>> batch = tasks.split("train").sample(4, generator)
        >>> batch.support_x.shape, batch.query_y.shape
        (torch.Size([4, 5, 64]), torch.Size([4, 75]))
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
    """All images [1797, 8, 8] in [0, 1], float32, and their labels, 64-bit integers; cached: do not change them."""
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
