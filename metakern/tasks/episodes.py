"""Few-shot episodes: N-way classification of images from S examples of each class.

Vinyals et al. 2016, arXiv 1606.04080. Axis legend: T tasks, C classes of a split, N ways, S support and Q query images
of each class of a task, M images of a split, D domains.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from metakern.tasks.distribution import Episodes, ShortRepr, check_num_tasks, check_split


class ImageClasses:
    """Images of C classes, in one tensor.

    Args:
        images: [M, ...], on the CPU, grouped by class; floating point, or ``uint8`` for 0 to 1 in steps of 1/255
        counts: number of images of each class, C numbers

    Raises:
        ValueError: for no classes, and for counts that do not add up to M.

    Example:
        >>> ImageClasses.from_labels(torch.rand(100, 1, 28, 28), torch.arange(100) % 10)
        ImageClasses(classes=10, images=[100, 1, 28, 28])
    """

    def __init__(self, images: Tensor, counts: Sequence[int]) -> None:
        if len(counts) == 0 or min(counts) < 0 or sum(counts) != len(images):
            raise ValueError(f"counts must add up to the {len(images)} images and be at least one, got {list(counts)}")
        self.images, self.counts = images, torch.tensor(counts)
        self.starts = self.counts.cumsum(0) - self.counts  # [C]: where the images of a class begin

    @classmethod
    def from_list(cls, images: Sequence[Tensor]) -> ImageClasses:
        """From the images [n, ...] of each class; n may differ between classes.

        Raises:
            ValueError: for no classes, and for images of different shapes or dtypes.
        """
        kinds = {(tuple(x.shape[1:]), x.dtype) for x in images}
        if len(kinds) != 1:
            found = ", ".join(f"{list(shape)} {dtype}" for shape, dtype in sorted(kinds, key=str)) or "no class"
            raise ValueError(f"images must be of one shape and dtype in every class, got {found}")
        return cls(torch.cat(list(images)), [len(x) for x in images])

    @classmethod
    def from_labels(cls, images: Tensor, labels: Tensor) -> ImageClasses:
        """From images [M, ...] in any order and their classes, ``labels`` [M], which may be any integers.

        Raises:
            ValueError: unless there is one label for every image.
        """
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be [{len(images)}], one for every image, got {list(labels.shape)}")
        order = labels.argsort(stable=True)
        return cls(images[order], labels.unique(return_counts=True)[1].tolist())

    def __len__(self) -> int:
        return len(self.counts)

    def __repr__(self) -> str:
        return f"ImageClasses(classes={len(self)}, images={list(self.images.shape)})"

    def rotated(self) -> ImageClasses:
        """4·C classes of images [..., H, W]: these, then the same rotated by 90, 180 and 270 degrees.

        Santoro et al. 2016, arXiv 1605.06065, augment the characters of Omniglot this way.
        """
        turned = [self.images.rot90(turns, (-2, -1)) for turns in range(4)]
        return ImageClasses(torch.cat(turned), self.counts.tolist() * 4)


class FewShotEpisodes(ShortRepr):
    """N-way classification with S support and Q query images of each class.

    Every task draws its classes, their labels and its images, all without replacement. Support and query sets are
    ordered by label.

    Args:
        classes: the classes of every split: :class:`ImageClasses`, or the images [n, ...] of each class; the splits
            should have no class in common
        ways: N
        support: S
        query: Q
        domains: transformations of images [M, ...] as stored in ``classes``; every task draws one and applies it to all
            its images, and ``modes`` of a batch holds its index. A transformed copy of all images is kept for each.
            Default: no transformation
        flat: images as vectors
        split: the split to draw classes from

    Raises:
        ValueError: for sizes below 1, a split that is not in ``classes``, one of fewer than ``ways`` classes, and one
            with a class of fewer than ``support + query`` images.

    Example:
        >>> classes = {name: [torch.rand(20, 1, 28, 28) for _ in range(8)] for name in ("train", "valid", "test")}
        >>> batch = FewShotEpisodes(classes, ways=5, support=1, query=15).sample(4, generator)
        >>> batch.support_x.shape
        torch.Size([4, 5, 1, 28, 28])
    """

    def __init__(
        self,
        classes: Mapping[str, ImageClasses | Sequence[Tensor]],
        *,
        ways: int = 5,
        support: int = 1,
        query: int = 15,
        domains: Sequence[Callable[[Tensor], Tensor]] = (),
        flat: bool = False,
        split: str = "train",
    ) -> None:
        if ways < 1 or support < 1 or query < 1:
            raise ValueError(f"ways, support and query must be at least 1, got {ways}, {support} and {query}")
        self.classes = {k: v if isinstance(v, ImageClasses) else ImageClasses.from_list(v) for k, v in classes.items()}
        self.ways, self.support, self.query = ways, support, query
        self.domains, self.flat = tuple(domains), flat
        self._choose(split)

    @staticmethod
    def from_dataset(
        dataset: Any, *, shares: tuple[float, float, float] = (0.64, 0.16, 0.2), seed: int = 0, **options: Any
    ) -> FewShotEpisodes:
        """Episodes of any data set of pairs (image, class), such as torchvision's, split by class.

        All images are read once and kept in memory.

        Args:
            dataset: has a length, and ``dataset[i]`` is (image, class). Images are of one shape and dtype: tensors
                [...], or Pillow images or NumPy arrays, [H, W] or [H, W, channels], which become [channels, H, W];
                floating point, or ``uint8`` for 0 to 1. A class is an integer, a tensor of one, or a name
            shares: of the classes, for training, validation and test; they add up to 1. The classes, in a random
                order, are cut at these shares, rounded
            seed: of that order
            options: those of :class:`FewShotEpisodes`

        Raises:
            TypeError: unless ``dataset`` has a length and items that are pairs of an image and a class.
            ValueError: for shares that do not add up to 1, images of several shapes or dtypes, too few classes for
                three splits, and as :class:`FewShotEpisodes` does.

        Example:
            >>> images, labels = torch.rand(30, 1, 8, 8), torch.arange(30) % 10
            >>> tasks = FewShotEpisodes.from_dataset(
            ...     list(zip(images, labels)), shares=(0.6, 0.2, 0.2), ways=2, support=1, query=2
            ... )
            >>> {split: len(classes) for split, classes in tasks.classes.items()}
            {'train': 6, 'valid': 2, 'test': 2}
        """
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"shares must be at least 0 and add up to 1, got {shares}")
        by_class = _by_class(dataset)
        names = sorted(by_class)
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
        ends = [round(len(names) * end) for end in (shares[0], shares[0] + shares[1])]
        parts = order[: ends[0]], order[ends[0] : ends[1]], order[ends[1] :]
        if not all(parts):
            sizes = ", ".join(str(len(part)) for part in parts)
            raise ValueError(f"each split needs a class, but shares {shares} of {len(names)} classes are {sizes}")
        chosen = (ImageClasses.from_list([by_class[names[index]] for index in part]) for part in parts)
        return FewShotEpisodes(dict(zip(("train", "valid", "test"), chosen, strict=True)), **options)

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
        """The same episodes with the classes of another split."""
        check_split(name)
        other = copy.copy(self)
        other._choose(name)
        return other

    @property
    def mode_names(self) -> tuple[str, ...]:
        """Names of the domains, from the functions' names; empty without domains."""
        return tuple(getattr(domain, "__name__", str(domain)) for domain in self.domains)

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
        images = images.view(rows.shape[0], -1, *([images[0].numel()] if self.flat else images.shape[1:]))
        return images.float().div_(255) if images.dtype == torch.uint8 else images


def _by_class(dataset: Any) -> dict[int | str, Tensor]:
    """The images [n, ...] of each class of a data set of pairs."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"dataset must have a length and items, got {type(dataset).__name__}")
    found: dict[int | str, list[Tensor]] = {}
    kinds = set()
    for index in range(len(dataset)):
        item = dataset[index]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise TypeError(f"dataset[{index}] must be a pair of an image and a class, got {type(item).__name__}")
        image, label = _image_tensor(item[0], index), item[1]
        found.setdefault(label if isinstance(label, str) else int(label), []).append(image)
        kinds.add((tuple(image.shape), image.dtype))
    if len(kinds) != 1:
        shown = ", ".join(f"{list(shape)} {dtype}" for shape, dtype in sorted(kinds, key=str)) or "no image"
        raise ValueError(f"images of a data set must be of one shape and dtype (resize them in it), got {shown}")
    return {label: torch.stack(images) for label, images in found.items()}


def _image_tensor(image: Any, index: int) -> Tensor:
    found: Tensor = image
    if not isinstance(image, Tensor):
        pixels = np.array(image)
        if pixels.ndim not in (2, 3) or pixels.dtype.kind not in "fu":
            raise TypeError(
                f"the image of dataset[{index}] must be a tensor, a Pillow image, or an array [H, W] or [H, W, "
                f"channels] of floating point or uint8, got {type(image).__name__}"
            )
        found = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., np.newaxis]).permute(2, 0, 1)
    if found.dtype != torch.uint8 and not found.is_floating_point():
        raise TypeError(f"the image of dataset[{index}] must be floating point or uint8, got {found.dtype}")
    return found


def _distinct(counts: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """For each entry n of ``counts`` [...], k different integers below n in random order: [..., k]."""
    draws = torch.rand(*counts.shape, int(counts.max()), generator=generator)
    draws.masked_fill_(torch.arange(draws.shape[-1]) >= counts.unsqueeze(-1), -1)
    return draws.topk(k).indices
