"""Small image files in the layouts of Omniglot and miniImageNet; what the loaders count is set to their size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metakern.tasks import mini_imagenet, omniglot

#: Alphabets of each folder and how many characters each has: in order, 7 to train and validate, and 3 to test.
ALPHABETS = {
    "images_background": {"Armenian": 2, "Braille": 3},
    "images_evaluation": {"Angelic": 1, "Gurmukhi": 2, "ULOG": 2},
}

#: Labels of each split of the pictures in the manner of miniImageNet.
LABELS = {"train": ["n03", "n01", "n02"], "val": ["n11", "n10"], "test": ["n21", "n20"]}


def write_omniglot(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters of 3 drawings, 105×105 black on white: the i-th has a bar of 4·(i + 1) rows at the top."""
    monkeypatch.setattr(omniglot, "FOLDERS", {folder: sum(of.values()) for folder, of in ALPHABETS.items()})
    monkeypatch.setattr(omniglot, "DRAWINGS", 3)
    monkeypatch.setattr(omniglot, "TRAINING", 7)
    index = 0
    for folder, alphabets in ALPHABETS.items():
        for alphabet, characters in alphabets.items():
            for number in range(characters):
                character = root / folder / alphabet / f"character{number + 1:02}"
                character.mkdir(parents=True)
                pixels = np.ones((105, 105), bool)
                pixels[: 4 * (index + 1)] = False
                for drawing in range(3):
                    Image.fromarray(pixels).save(character / f"{index:04}_{drawing + 1:02}.png")
                index += 1


def write_mini_imagenet(root: Path, monkeypatch: pytest.MonkeyPatch, *, lists: bool, size: int = 84) -> None:
    """Classes of 4 plain pictures: red is 10 times the number of the label, green 20 times that of the picture."""
    monkeypatch.setattr(mini_imagenet, "CLASSES", {"train": 3, "valid": 2, "test": 2})
    monkeypatch.setattr(mini_imagenet, "IMAGES", 4)
    for split, labels in LABELS.items():
        rows = ["filename,label"]
        for label in labels:
            folder = root / "images" if lists else root / split / label
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(4):
                name = f"{label}{number:08}.png"
                colour = (10 * int(label[1:]), 20 * number, 0)
                Image.new("RGB", (size, size), colour).save(folder / name)
                rows.append(f"{name},{label}")
        if lists:
            (root / f"{split}.csv").write_text("\n".join(rows) + "\n")
