"""Few-shot episodes of Omniglot: 1,623 characters of 50 alphabets, each drawn by 20 people (Lake et al. 2015).

The images are not part of this package: get images_background.zip and images_evaluation.zip from the folder python of
https://github.com/brendenlake/omniglot.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metakern.tasks._images import image_files, load_images, subfolders
from metakern.tasks.episodes import FewShotEpisodes, ImageClasses

#: The two folders of the data set, and the number of characters in each.
FOLDERS = {"images_background": 964, "images_evaluation": 659}

#: Number of drawings of every character.
DRAWINGS = 20

#: Number of characters for training and validation, the first in order; the others are for the test.
TRAINING = 1200

#: Alphabets for validation, among these characters.
VALIDATION = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")

SIZE = 28


class Omniglot(FewShotEpisodes):
    """N-way episodes of Omniglot's characters, from ``root``/images_background/ALPHABET/CHARACTER/*.png.

    The split is that of Vinyals et al. 2016, arXiv 1606.04080, as in the code of prototypical networks (Snell et al.
    2017, arXiv 1703.05175) and in torchmeta. The 1,623 characters are ordered by name, images_background before
    images_evaluation: the last 423 are for the test; of the first 1,200, the 172 of five alphabets
    (:data:`VALIDATION`) are for validation and the others for training. Finn et al. 2017 drew 1,200 at random, 100 of
    them for validation.

    Images are [1, 28, 28], float32, from 0, paper, to 1, ink. They are decoded once and kept in
    ``root``/.metakern-cache.

    Args:
        root: the folder that holds images_background and images_evaluation
        rotations: make each character four classes, one per rotation, in every split: 4,112 to train on, 688 to
            validate, 1,692 to test
        options: those of :class:`FewShotEpisodes`; ``support + query`` is at most 20

    Raises:
        FileNotFoundError: for a missing folder.
        ValueError: for missing characters or drawings, damaged images, and as :class:`FewShotEpisodes` does.

    Example:
        >>> tasks = Omniglot("data/omniglot", ways=20, support=1)  # doctest: +SKIP
    """

    def __init__(self, root: str | Path, *, rotations: bool = True, **options: Any) -> None:
        root = Path(root)
        characters = [character for folder in FOLDERS for character in _characters(root / folder)]
        files = [file for character in characters for file in _drawings(character)]
        strokes = 255 - load_images(root, files, "omniglot", "L", SIZE)  # ink is black on disk
        by_character = strokes.split(DRAWINGS)
        chosen: dict[str, list[Any]] = {"train": [], "valid": [], "test": []}
        for index, (character, drawings) in enumerate(zip(characters, by_character, strict=True)):
            validates = character.parent.name in VALIDATION
            chosen["test" if index >= TRAINING else "valid" if validates else "train"].append(drawings)
        classes = {split: ImageClasses.from_list(images) for split, images in chosen.items()}
        super().__init__({k: v.rotated() if rotations else v for k, v in classes.items()}, **options)


def _characters(folder: Path) -> list[Path]:
    """The folders of the characters of one of :data:`FOLDERS`, in order."""
    expected = (
        f"{FOLDERS[folder.name]} folders ALPHABET/CHARACTER of *.png in {folder}, as {folder.name}.zip holds them"
    )
    if not folder.is_dir():
        raise FileNotFoundError(f"expected {expected}, but there is no such folder")
    characters = [character for alphabet in subfolders(folder) for character in subfolders(alphabet)]
    if len(characters) != FOLDERS[folder.name]:
        raise ValueError(f"expected {expected}, found {len(characters)}")
    return characters


def _drawings(character: Path) -> list[Path]:
    files = image_files(character, ".png")
    if len(files) != DRAWINGS:
        raise ValueError(f"expected {DRAWINGS} drawings *.png in {character}, found {len(files)}")
    return files
