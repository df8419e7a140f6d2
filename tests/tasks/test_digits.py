"""Episodes of scikit-learn's digits: splits by digit, four rotations of each, and the domains."""

import functools
import itertools

import pytest
import torch
from sklearn.datasets import load_digits

from metakern.tasks import SPLITS, Digits
from metakern.tasks.digits import DIGITS, DOMAINS, permute
from tests.tasks.draws import generator


def key(image):
    return tuple((image.flatten() * 16).round().int().tolist())


@functools.cache
def origins():
    """For every image under every rotation the digits that it shows."""
    data = load_digits()
    found = {}
    for image, digit in zip(torch.from_numpy(data.images).float() / 16, data.target.tolist(), strict=True):
        for turns in range(4):
            found.setdefault(key(image.rot90(turns)), set()).add((digit, turns))
    return found


def test_every_digit_is_in_one_split():
    assert sorted(itertools.chain.from_iterable(DIGITS.values())) == list(range(10))
    assert tuple(DIGITS) == SPLITS


def test_a_6_and_a_9_which_are_each_other_turned_are_in_one_split():
    assert any({6, 9} <= set(digits) for digits in DIGITS.values())


@pytest.mark.parametrize("split", SPLITS)
def test_no_image_of_a_split_shows_a_digit_of_another(split):
    batch = Digits(support=2).split(split).sample(60, generator())
    shown = set()
    for image in torch.cat([batch.support_x, batch.query_x], 1).flatten(0, 1):
        shown |= origins()[key(image)]
    assert {digit for digit, _ in shown} == set(DIGITS[split])
    assert {turns for _, turns in shown} == {0, 1, 2, 3}


def test_forty_classes_are_ten_digits_under_four_rotations():
    classes = Digits().classes
    assert {split: len(of) for split, of in classes.items()} == {"train": 24, "valid": 8, "test": 8}
    assert sum(len(of.images) for of in classes.values()) == 4 * 1797


def test_a_class_is_one_digit_under_one_rotation():
    batch = Digits(support=1, query=5).sample(20, generator())
    for images, labels in zip(batch.query_x, batch.query_y, strict=True):
        for label in range(5):
            assert set.intersection(*(origins()[key(image)] for image in images[labels == label]))


def test_inputs_are_vectors_or_images_from_0_to_1():
    vectors, images = (Digits(flat=flat).sample(3, generator()) for flat in (True, False))
    assert vectors.support_x.shape == (3, 5, 64)
    assert vectors.query_x.shape == (3, 75, 64)
    assert images.query_x.shape == (3, 75, 1, 8, 8)
    assert images.query_x.dtype == torch.float32
    assert torch.equal(images.query_x.flatten(2), vectors.query_x)
    assert images.query_x.min() == 0
    assert images.query_x.max() == 1


def test_a_split_keeps_the_options():
    batch = Digits(ways=2, support=3, query=4, domains=["blurred", "permuted"], flat=False).split("test")
    tasks = batch.sample(40, generator())
    assert tasks.support_x.shape == (40, 6, 1, 8, 8)
    assert tasks.query_x.shape == (40, 8, 1, 8, 8)
    assert set(tasks.modes.tolist()) == {0, 1}


def test_modes_say_which_domain_a_task_is_seen_through():
    """The same draws without and with domains: those of the domain come last, so classes and images are the same."""
    through, plainly = Digits(domains=list(DOMAINS)), Digits()
    seen = set()
    for seed in range(20):
        batch, plain = through.sample(1, generator(seed)), plainly.sample(1, generator(seed))
        function = list(DOMAINS.values())[int(batch.modes)]
        seen.add(int(batch.modes))
        torch.testing.assert_close(batch.query_x[0], function(plain.query_x.view(-1, 1, 8, 8)).flatten(1))
    assert batch.modes.dtype == torch.int64
    assert seen == {0, 1, 2, 3}


def test_domains_are_what_they_are_called():
    images = Digits(flat=False).sample(1, generator()).query_x[0]
    changed = {name: function(images) for name, function in DOMAINS.items()}
    assert torch.equal(changed["identity"], images)
    assert torch.equal(changed["inverted"], 1 - images)
    around = images[:, 0, 2:5, 4:7].mean((1, 2))
    torch.testing.assert_close(changed["blurred"][:, 0, 3, 5], around)
    torch.testing.assert_close(changed["blurred"][:, 0, 0, 0], images[:, 0, :2, :2].sum((1, 2)) / 9)
    assert not torch.equal(changed["permuted"], images)
    assert torch.equal(changed["permuted"].flatten(1).sort().values, images.flatten(1).sort().values)


def test_pixels_are_permuted_alike_in_every_image():
    order = permute(torch.arange(64.0).view(1, 1, 8, 8)).flatten().long()
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(permute(images).flatten(1), images.flatten(1)[:, order])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Digits(domains=["identity", "mirrored"]),
            "domains must be out of identity, inverted, blurred, permuted, got 'mirrored'",
        ),
        (lambda: Digits(ways=9).split("test"), "ways must be at most 8, the classes of split 'test', got 9"),
        (lambda: Digits(support=100, query=100), r"support \+ query must be at most 17\d, the images of class"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
