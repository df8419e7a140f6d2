"""Few-shot episodes: of which of N classes is an image, told from S images of each.

Vinyals et al. 2016, arXiv 1606.04080. Axis legend: T tasks, C classes of a split, N ways, S support and Q query images
of each class of a task, M images of a split, D domains.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from metakern.tasks.distribution import Episodes, check_num_tasks, check_split


class ImageClasses:
    """Images of C classes, in one tensor.

    Args:
        images: for every class its images [n, ...], n as it may be; floating point, or ``uint8`` for 0 to 1 in steps of
            1/255

    Raises:
        ValueError: for no classes, and for images of different shapes or types.
    """

    def __init__(self, images: Sequence[Tensor]) -> None:
        if not images:
            raise ValueError("images must hold at least one class, got none")
        kinds = {(tuple(x.shape[1:]), x.dtype) for x in images}
        if len(kinds) > 1:
            raise ValueError(f"images of all classes must have one shape and dtype, got {sorted(map(str, kinds))}")
        self.images = torch.cat(list(images))  # [M, ...]
        self.counts = torch.tensor([len(x) for x in images])  # [C]
        self.starts = self.counts.cumsum(0) - self.counts  # [C]: where the images of a class begin

    @classmethod
    def from_labels(cls, images: Tensor, labels: Tensor) -> ImageClasses:
        """Images [M, ...] whose classes ``labels`` [M] names, by any integers; classes in ascending order.

        Raises:
            ValueError: where there is not one label for every image.
        """
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be [{len(images)}], one for every image, got {list(labels.shape)}")
        return cls([images[labels == label] for label in labels.unique()])

    def __len__(self) -> int:
        return len(self.counts)

    def map(self, function: Callable[[Tensor], Tensor]) -> ImageClasses:
        """The classes with ``function`` of all images [M, ...]."""
        return ImageClasses(function(self.images).split(self.counts.tolist()))

    def rotated(self) -> ImageClasses:
        """4·C classes of images [..., H, W]: those here, then those turned by 90, 180 and 270 degrees.

        So Santoro et al. 2016 (arXiv 1605.06065) multiply the characters of Omniglot.
        """
        classes = self.images.split(self.counts.tolist())
        return ImageClasses([x.rot90(turns, (-2, -1)) for turns in range(4) for x in classes])


class FewShotEpisodes:
    """N-way classification with S support and Q query images of each class.

    Every task draws its classes, which of them has which label, and its images, all without replacement. Support and
    query sets are ordered by label.

    Args:
        classes: for every split its classes: :class:`ImageClasses`, or the images [n, ...] of each; the splits should
            have no class in common
        ways: N
        support: S
        query: Q
        domains: functions of images [M, ...]; every task sees all its images through one of them, drawn for each task,
            and ``modes`` of a batch says through which. Default: the images as they are
        split: whose classes are drawn

    Raises:
        ValueError: for sizes below 1, a split that is not in ``classes``, one of fewer than ``ways`` classes, and one
            with a class of fewer than ``support + query`` images.
    """

    def __init__(
        self,
        classes: Mapping[str, ImageClasses | Sequence[Tensor]],
        *,
        ways: int = 5,
        support: int = 1,
        query: int = 15,
        domains: Sequence[Callable[[Tensor], Tensor]] = (),
        split: str = "train",
    ) -> None:
        if ways < 1 or support < 1 or query < 1:
            raise ValueError(f"ways, support and query must be at least 1, got {ways}, {support} and {query}")
        self.classes = {k: v if isinstance(v, ImageClasses) else ImageClasses(v) for k, v in classes.items()}
        self.ways, self.support, self.query, self.domains = ways, support, query, tuple(domains)
        self._choose(split)

    def sample(self, num_tasks: int, generator: torch.Generator) -> Episodes:
        """Draw tasks: images [T, N·S, ...] and [T, N·Q, ...], float32 unless the images are of another floating type.

        Labels are 64-bit integers from 0 to N - 1, [T, N·S] and [T, N·Q]; ``modes`` [T] where there are domains.
        """
        check_num_tasks(num_tasks)
        classes = self._chosen
        chosen = _distinct(torch.full((num_tasks,), len(classes)), self.ways, generator)  # [T, N]
        rows = _distinct(classes.counts[chosen], self.support + self.query, generator)  # [T, N, S + Q]
        rows += classes.starts[chosen].unsqueeze(-1)
        modes = None
        if self.domains:
            modes = torch.randint(len(self.domains), (num_tasks,), generator=generator)
            rows += (modes * (len(self._images) // len(self.domains))).view(-1, 1, 1)
        (support_x, support_y), (query_x, query_y) = (
            (self._look_up(part), torch.arange(self.ways).repeat_interleave(part.shape[2]).repeat(num_tasks, 1))
            for part in rows.split([self.support, self.query], dim=2)
        )
        return Episodes(support_x, support_y, query_x, query_y, modes)

    def split(self, name: str) -> Self:
        """The same episodes of the classes of another split."""
        check_split(name)
        other = copy.copy(self)
        other._choose(name)
        return other

    def _choose(self, split: str) -> None:
        if split not in self.classes:
            raise ValueError(f"split must be one of those of classes, {', '.join(self.classes)}, got {split!r}")
        chosen = self.classes[split]
        if len(chosen) < self.ways:
            raise ValueError(f"ways must be at most {len(chosen)}, the classes of split {split!r}, got {self.ways}")
        few = int(chosen.counts.argmin())
        if chosen.counts[few] < self.support + self.query:
            raise ValueError(
                f"support + query must be at most {chosen.counts[few]}, the images of class {few} of split {split!r}, "
                f"got {self.support} + {self.query}"
            )
        self._chosen = chosen
        self._images = torch.cat([f(chosen.images) for f in self.domains]) if self.domains else chosen.images

    def _look_up(self, rows: Tensor) -> Tensor:
        """The images [T, N·k, ...] of rows [T, N, k]."""
        images = self._images.index_select(0, rows.flatten())
        images = images.view(rows.shape[0], -1, *images.shape[1:])
        return images.float().div_(255) if images.dtype == torch.uint8 else images


def _distinct(counts: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """For each entry n of ``counts`` [...], k different integers below n in random order: [..., k]."""
    draws = torch.rand(*counts.shape, int(counts.max()), generator=generator)
    draws.masked_fill_(torch.arange(draws.shape[-1]) >= counts.unsqueeze(-1), -1)
    return draws.topk(k).indices
