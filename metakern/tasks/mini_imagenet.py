"""Few-shot episodes of miniImageNet: 100 classes of ImageNet with 600 images each (Vinyals et al. 2016).

The images are not part of this package. With access to ImageNet, make them by the lists of Ravi & Larochelle,
https://github.com/twitter-research/meta-learning-lstm, folder data/miniImagenet.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from metakern.tasks._images import image_files, load_images, subfolders
from metakern.tasks.episodes import FewShotEpisodes, ImageClasses

#: Names of the splits on disk.
NAMES = {"train": "train", "valid": "val", "test": "test"}

#: Classes of each split.
CLASSES = {"train": 64, "valid": 16, "test": 20}

#: Images of every class.
IMAGES = 600

SIZE = 84

_SUFFIXES = (".jpg", ".jpeg", ".png")


class MiniImageNet(FewShotEpisodes):
    """N-way episodes of miniImageNet.

    The split is that of Ravi & Larochelle 2017: 64 classes to train, 16 to validate, 20 to test. ``root`` has one of
    two layouts:

    - lists: train.csv, val.csv and test.csv with the columns filename and label, and the images in the folder images
    - folders: train, val and test with a folder of .jpg images for every class, as train/n01532829

    Images are [3, 84, 84], red, green and blue from 0 to 1, float32; those of another size are resized by Lanczos's
    filter. They are decoded once and kept in ``root``/.metakern-cache, 1.3 GB.

    Args:
        root: the folder of the data set
        options: those of :class:`FewShotEpisodes`

    Raises:
        FileNotFoundError: for a missing folder, list or image.
        ValueError: for damaged lists or images, missing classes or images, classes that are in two splits, and as
            :class:`FewShotEpisodes` does.

    Example:
        >>> tasks = MiniImageNet("data/miniImageNet", ways=5, support=1)  # doctest: +SKIP
    """

    def __init__(self, root: str | Path, **options: Any) -> None:
        root = Path(root)
        layout = _from_list if (root / "train.csv").is_file() else _from_folders
        found = {split: layout(root, split) for split in NAMES}
        _check(root, found)
        super().__init__({split: _load(root, split, files) for split, files in found.items()}, **options)


def _load(root: Path, split: str, found: Mapping[str, list[Path]]) -> ImageClasses:
    files = [file for label in sorted(found) for file in found[label]]
    images = load_images(root, files, f"mini-imagenet-{NAMES[split]}", "RGB", SIZE)
    return ImageClasses(images, [len(found[label]) for label in sorted(found)])


def _from_folders(root: Path, split: str) -> dict[str, list[Path]]:
    """The images of each class of a split."""
    folder = root / NAMES[split]
    if not folder.is_dir():
        raise FileNotFoundError(
            f"expected train.csv, val.csv, test.csv and a folder images in {root}, or folders train, val and test with "
            f"a folder of *.jpg for every class, but there is no {folder}"
        )
    return {label.name: image_files(label, *_SUFFIXES) for label in subfolders(folder)}


def _from_list(root: Path, split: str) -> dict[str, list[Path]]:
    """The images of each class of a split."""
    path = root / f"{NAMES[split]}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"expected a list of images {path} beside train.csv, but there is none")
    if not (root / "images").is_dir():
        raise FileNotFoundError(f"expected a folder {root / 'images'} with the images of {path}, but there is none")
    found: dict[str, list[Path]] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            rows = csv.DictReader(file)
            if not {"filename", "label"} <= set(rows.fieldnames or ()):
                raise ValueError(f"expected the columns filename and label in {path}, found {rows.fieldnames}")
            for row in rows:
                if not row["filename"] or not row["label"]:
                    raise ValueError(f"expected a filename and a label in line {rows.line_num} of {path}, found {row}")
                if Path(row["filename"]).is_absolute():
                    raise ValueError(
                        f"expected the name of a file in {root / 'images'} in line {rows.line_num} of {path}, found "
                        f"{row['filename']}"
                    )
                found.setdefault(row["label"], []).append(root / "images" / row["filename"])
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"expected a list of filename and label, but {path} is damaged: {error}") from error
    return found


def _check(root: Path, found: Mapping[str, Mapping[str, list[Path]]]) -> None:
    """Raise ValueError unless every class is in exactly one split and every image occurs exactly once."""
    for split, classes in found.items():
        if len(classes) != CLASSES[split]:
            raise ValueError(f"expected {CLASSES[split]} classes in {NAMES[split]} of {root}, found {len(classes)}")
        for label, files in classes.items():
            if len(set(files)) != IMAGES or len(files) != IMAGES:
                raise ValueError(
                    f"expected {IMAGES} images of class {label} in {NAMES[split]} of {root}, found {len(set(files))}"
                    + (", some of them twice" if len(set(files)) < len(files) else "")
                )
    for one, other in combinations(found, 2):
        if both := found[one].keys() & found[other].keys():
            raise ValueError(f"expected no class in two splits of {root}, but {min(both)} is in {one} and {other}")
