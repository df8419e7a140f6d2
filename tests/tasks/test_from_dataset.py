"""FewShotEpisodes.from_dataset: any data set of pairs, split by class with a seed."""

import numpy as np
import pytest
import torch
from PIL import Image

from metakern.tasks import FewShotEpisodes
from tests.tasks.draws import assert_same, generator

OPTIONS = {"ways": 2, "support": 1, "query": 2}


def constant_images(classes: int = 10, each: int = 4) -> list[tuple[torch.Tensor, int]]:
    """Images [1, 3, 3] of the constant class / 100, classes in turn."""
    return [(torch.full((1, 3, 3), (i % classes) / 100), i % classes) for i in range(classes * each)]


def classes_of(tasks: FewShotEpisodes) -> dict[str, set[int]]:
    """The classes of every split, from the constants of their images."""
    return {
        split: set(images.images[:, 0, 0, 0].mul(100).round().int().tolist()) for split, images in tasks.classes.items()
    }


def test_every_class_is_in_one_split_with_all_its_images() -> None:
    tasks = FewShotEpisodes.from_dataset(constant_images(), shares=(0.5, 0.2, 0.3), **OPTIONS)
    found = classes_of(tasks)
    assert {split: len(classes) for split, classes in found.items()} == {"train": 5, "valid": 2, "test": 3}
    assert set.union(*found.values()) == set(range(10))
    assert all((images.counts == 4).all() for images in tasks.classes.values())


def test_labels_of_an_episode_are_classes_of_the_data_set() -> None:
    batch = FewShotEpisodes.from_dataset(constant_images(), **OPTIONS).sample(20, generator())
    assert batch.support_x.shape == (20, 2, 1, 3, 3)
    support, query = batch.support_x[:, :, 0, 0, 0], batch.query_x[:, :, 0, 0, 0].view(20, 2, 2)
    assert torch.equal(query, support.unsqueeze(-1).expand(-1, -1, 2))
    assert (support[:, 0] != support[:, 1]).all()


def test_the_seed_decides_and_the_order_of_the_images_does_not() -> None:
    pairs = constant_images()
    one, again = (FewShotEpisodes.from_dataset(pairs, seed=3, **OPTIONS) for _ in range(2))
    assert_same(one.sample(5, generator()), again.sample(5, generator()))
    assert classes_of(one) == classes_of(FewShotEpisodes.from_dataset(pairs[::-1], seed=3, **OPTIONS))
    assert classes_of(one) != classes_of(FewShotEpisodes.from_dataset(pairs, seed=4, **OPTIONS))


@pytest.mark.parametrize("kind", ["grey", "colour", "array", "tensor"])
def test_pillow_images_arrays_and_tensors(kind: str) -> None:
    made = {
        "grey": lambda c: Image.new("L", (5, 4), 20 * c),
        "colour": lambda c: Image.new("RGB", (5, 4), (20 * c, 0, 255)),
        "array": lambda c: np.full((4, 5, 2), 20 * c, np.uint8),
        "tensor": lambda c: torch.full((4, 5), c * 20 / 255, dtype=torch.float64),
    }[kind]
    tasks = FewShotEpisodes.from_dataset([(made(i % 10), i % 10) for i in range(30)], **OPTIONS)
    x = tasks.sample(30, generator()).support_x
    channels = {"grey": (1,), "colour": (3,), "array": (2,), "tensor": ()}[kind]
    assert x.shape == (30, 2, *channels, 4, 5)
    assert x.dtype == (torch.float64 if kind == "tensor" else torch.float32)
    first = x[:, :, 0] if channels else x
    assert set(first.mul(255).round().unique().tolist()) <= {20.0 * c for c in range(10)}
    if kind == "colour":
        assert (x[:, :, 1] == 0).all()
        assert (x[:, :, 2] == 1).all()


def test_classes_may_be_names_or_tensors() -> None:
    named = [(image, "abcdefghij"[label]) for image, label in constant_images()]
    wrapped = [(image, torch.tensor(label)) for image, label in constant_images()]
    one, other = (classes_of(FewShotEpisodes.from_dataset(pairs, **OPTIONS)) for pairs in (named, wrapped))
    assert one == other


@pytest.mark.parametrize(
    ("dataset", "options", "error", "message"),
    [
        (iter([]), {}, TypeError, "dataset must have a length and items, got list_iterator"),
        ([torch.ones(2)], {}, TypeError, r"dataset\[0\] must be a pair of an image and a class, got Tensor"),
        ([("a.png", 1)], {}, TypeError, r"the image of dataset\[0\] must be a tensor, a Pillow image"),
        ([(torch.ones(2, dtype=torch.int64), 1)], {}, TypeError, "must be floating point or uint8, got torch.int64"),
        ([], {}, ValueError, "of one shape and dtype .*, got no image"),
        ([(torch.ones(2), 0), (torch.ones(3), 0)], {}, ValueError, r"got \[2\] torch.float32, \[3\] torch.float32"),
        (constant_images(3), {}, ValueError, "each split needs a class, but shares .* of 3 classes are 2, 0, 1"),
        (constant_images(), {"shares": (0.5, 0.5, 0.5)}, ValueError, "add up to 1"),
        (constant_images(each=2), {}, ValueError, "support . query must be at most 2"),
    ],
)
def test_what_does_not_fit_is_named(dataset, options, error, message) -> None:
    with pytest.raises(error, match=message):
        FewShotEpisodes.from_dataset(dataset, **options | OPTIONS)
