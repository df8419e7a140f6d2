"""Omniglot's folders: the split of Vinyals, rotations, ink as 1, and what is said of missing folders and files."""

import shutil

import pytest
import torch

from metakern.tasks import Omniglot, omniglot
from tests.tasks.draws import assert_same, generator
from tests.tasks.pictures import write_omniglot

#: Rows of ink of each character, from 105 rows to 28; by split.
ROWS = {"train": [3, 4, 5, 6, 7], "valid": [1, 2], "test": [8, 9, 10]}


@pytest.fixture
def root(tmp_path, monkeypatch):
    write_omniglot(tmp_path, monkeypatch)
    return tmp_path


def heights(images):
    """How many of the 28 rows are ink, in units of 4 rows of 105."""
    return (images.mean((-1, -2)) * 105 / 4).flatten().tolist()


def test_the_real_numbers_are_those_of_vinyals():
    assert omniglot.FOLDERS == {"images_background": 964, "images_evaluation": 659}
    assert sum(omniglot.FOLDERS.values()) == 1623
    assert (omniglot.TRAINING, omniglot.DRAWINGS, omniglot.SIZE) == (1200, 20, 28)


@pytest.mark.parametrize("split", ROWS)
def test_the_first_characters_train_named_alphabets_validate_and_the_last_test(root, split):
    """Of the first 7, Armenian's two validate; the test begins within an alphabet, as the real one does."""
    classes = Omniglot(root, ways=2, support=1, query=1, rotations=False).classes[split]
    assert classes.counts.tolist() == [3] * len(ROWS[split])
    strokes = classes.images.float() / 255
    assert heights(strokes) == pytest.approx([rows for rows in ROWS[split] for _ in range(3)], abs=0.05)


def test_images_are_28_by_28_from_paper_0_to_ink_1(root):
    batch = Omniglot(root, ways=2, support=1, query=2, rotations=False).sample(4, generator())
    assert batch.support_x.shape == (4, 2, 1, 28, 28)
    assert batch.query_x.shape == (4, 4, 1, 28, 28)
    assert batch.query_x.dtype == torch.float32
    assert torch.equal(batch.query_x[..., 0, :], torch.ones_like(batch.query_x[..., 0, :]))
    assert torch.equal(batch.query_x[..., 27, :], torch.zeros_like(batch.query_x[..., 27, :]))
    assert Omniglot(root, ways=2, query=2, flat=True).sample(1, generator()).query_x.shape == (1, 4, 784)


def test_rotations_multiply_the_classes_of_every_split_by_four(root):
    upright = Omniglot(root, ways=2, query=1, rotations=False).classes
    turned = Omniglot(root, ways=2, query=1).classes
    for split, rows in ROWS.items():
        assert len(turned[split]) == 4 * len(rows)
        n = 3 * len(rows)
        for turns in range(4):
            expected = upright[split].images.rot90(turns, (2, 3))
            assert torch.equal(turned[split].images[turns * n : (turns + 1) * n], expected)


def test_images_that_were_decoded_once_are_the_same_again(root):
    first = Omniglot(root, ways=3, query=2).sample(5, generator())
    assert len(list((root / ".metakern-cache").iterdir())) == 1
    assert_same(Omniglot(root, ways=3, query=2).sample(5, generator()), first)


@pytest.mark.parametrize("missing", ["images_background", "images_evaluation"])
def test_a_missing_folder_is_named_with_what_it_should_hold(root, missing):
    shutil.rmtree(root / missing)
    message = rf"expected 5 folders ALPHABET/CHARACTER of \*.png in {root}/{missing}.*no such folder"
    with pytest.raises(FileNotFoundError, match=message):
        Omniglot(root)


def test_a_missing_character_is_counted(root):
    shutil.rmtree(root / "images_background/Braille/character03")
    with pytest.raises(ValueError, match=rf"expected 5 folders .* in {root}/images_background.*found 4"):
        Omniglot(root)


def test_a_missing_drawing_is_counted(root):
    (root / "images_evaluation/Angelic/character01/0005_02.png").unlink()
    with pytest.raises(ValueError, match=rf"expected 3 drawings \*.png in {root}.*Angelic/character01, found 2"):
        Omniglot(root)


def test_what_is_no_character_is_passed_over(root):
    (root / "images_background/.DS_Store").touch()
    (root / "images_background/Braille/._x").mkdir()
    (root / "images_background/Braille/character01/Thumbs.db").touch()
    assert len(Omniglot(root, ways=2, query=1).classes["train"]) == 20


def test_more_images_than_a_character_has_are_refused(root):
    with pytest.raises(ValueError, match=r"support \+ query must be at most 3, the images of class 0"):
        Omniglot(root, ways=2, support=2, query=2)
