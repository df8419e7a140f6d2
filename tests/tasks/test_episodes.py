"""Few-shot episodes: N classes of a split, images without replacement, labels that say nothing about the class."""

import itertools

import pytest
import torch

from metakern.tasks import FewShotEpisodes, ImageClasses
from tests.tasks.draws import generator

#: Images of each class of the splits below; every image holds its class and its number in the class.
COUNTS = {"train": [6, 4, 9, 5, 7, 4], "valid": [5, 5, 5], "test": [4, 8, 6]}
FIRST = {"train": 0, "valid": 100, "test": 200}


def images(split):
    return [
        torch.tensor([[[first, number]] for number in range(count)], dtype=torch.float32)
        for first, count in enumerate(COUNTS[split], start=FIRST[split])
    ]


def episodes(**options):
    options = {"ways": 3, "support": 1, "query": 3, **options}
    return FewShotEpisodes({split: images(split) for split in COUNTS}, **options)


def test_a_batch_has_n_times_s_support_and_n_times_q_query_images():
    tasks = episodes(ways=3, support=1, query=2)
    batch = tasks.sample(5, generator())
    assert batch.support_x.shape == (5, 3, 1, 2)
    assert batch.query_x.shape == (5, 6, 1, 2)
    assert batch.support_x.dtype == torch.float32
    assert batch.modes is None
    assert batch.support_y.tolist() == [[0, 1, 2]] * 5
    assert batch.query_y.tolist() == [[0, 0, 1, 1, 2, 2]] * 5
    assert batch.query_y.dtype == torch.int64


def test_a_label_is_one_class_throughout_a_task_and_no_class_has_two():
    batch = episodes().sample(50, generator())
    classes = batch.support_x[:, :, 0, 0]  # one support image: [T, N] by label
    assert all(len(set(row.tolist())) == 3 for row in classes)
    assert torch.equal(batch.query_x[:, :, 0, 0], classes.gather(1, batch.query_y))


def test_no_image_is_twice_in_a_task_and_every_image_comes():
    batch = episodes(support=2, query=2).sample(300, generator())
    both = torch.cat([batch.support_x, batch.query_x], 1).flatten(2)
    for task in both:
        assert len(torch.unique(task, dim=0)) == 12
    assert len(torch.unique(both.flatten(0, 1), dim=0)) == sum(COUNTS["train"])


def test_classes_and_labels_are_drawn_alike():
    """Each of the 6 classes is under each of the 3 labels in a sixth of the tasks, and first or last image as often."""
    batch = episodes().sample(6000, generator())
    for label in range(3):
        shares = batch.support_x[:, label, 0, 0].long().bincount(minlength=6) / 6000
        torch.testing.assert_close(shares, torch.full((6,), 1 / 6), atol=0.025, rtol=0)
    of_third = batch.support_x[:, 0, 0][batch.support_x[:, 0, 0, 0] == 2]
    shares = of_third[:, 1].long().bincount(minlength=9) / len(of_third)
    torch.testing.assert_close(shares, torch.full((9,), 1 / 9), atol=0.06, rtol=0)


def test_images_are_vectors_where_asked():
    batch, flat = (episodes(flat=flat).sample(2, generator()) for flat in (False, True))
    assert flat.query_x.shape == (2, 9, 2)
    assert torch.equal(flat.query_x, batch.query_x.flatten(2))


def test_splits_share_no_class():
    seen = {}
    for split in COUNTS:
        batch = episodes().split(split).sample(100, generator())
        seen[split] = set(batch.query_x[..., 0, 0].flatten().int().tolist())
        assert seen[split] == set(range(FIRST[split], FIRST[split] + len(COUNTS[split])))
    assert not any(a & b for a, b in itertools.combinations(seen.values(), 2))


def test_a_split_leaves_the_first_as_it_was():
    tasks = episodes(split="valid")
    tasks.split("test")
    assert 100 <= tasks.sample(1, generator()).query_x[0, 0, 0, 0] < 200


def test_a_domain_is_one_function_for_a_whole_task():
    batch = episodes(domains=[lambda x: x + 1000, lambda x: x + 2000, lambda x: x + 3000]).sample(600, generator())
    both = torch.cat([batch.support_x, batch.query_x], 1).flatten(1)
    assert torch.equal((both.amin(1) // 1000).long() - 1, batch.modes)
    assert torch.equal((both.amax(1) // 1000).long() - 1, batch.modes)
    shares = batch.modes.bincount(minlength=3) / 600
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), atol=0.08, rtol=0)


def test_bytes_become_numbers_from_0_to_1():
    classes = [torch.tensor([[0], [51], [255]], dtype=torch.uint8)] * 2
    batch = FewShotEpisodes({"train": classes}, ways=2, support=1, query=2).sample(20, generator())
    assert batch.query_x.dtype == torch.float32
    assert set(batch.query_x.unique().tolist()) == set((torch.tensor([0.0, 51.0, 255.0]) / 255).tolist())


def test_a_tensor_with_labels_is_the_same_as_images_by_class():
    order = torch.randperm(35, generator=generator())
    together = torch.cat(images("train"))[order]
    labels = torch.arange(6).repeat_interleave(torch.tensor(COUNTS["train"]))[order] * 10 - 7
    classes = ImageClasses.from_labels(together, labels)
    assert len(classes) == 6
    assert classes.counts.tolist() == COUNTS["train"]
    for own, expected in zip(classes.images.split(COUNTS["train"]), images("train"), strict=True):
        assert torch.equal(own.sort(0).values, expected)


def test_rotations_multiply_the_classes_by_four():
    pictures = [torch.arange(12.0).view(2, 1, 2, 3)[..., :2], torch.rand(3, 1, 2, 2)]
    classes = ImageClasses.from_list(pictures).rotated()
    assert classes.counts.tolist() == [2, 3] * 4
    quarter = classes.images[5:7]
    assert quarter[0, 0].tolist() == [[1.0, 4.0], [0.0, 3.0]]  # [[0, 1], [3, 4]] turned against the clock
    assert torch.equal(classes.images[10:12], pictures[0].flip(-2, -1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: episodes(ways=0), "ways, support and query must be at least 1, got 0, 1 and 3"),
        (lambda: episodes(query=0), "ways, support and query must be at least 1, got 3, 1 and 0"),
        (lambda: episodes(ways=7), "ways must be at most 6, the classes of split 'train', got 7"),
        (lambda: episodes(ways=5).split("test"), "ways must be at most 3, the classes of split 'test', got 5"),
        (
            lambda: episodes(support=2),
            r"support \+ query must be at most 4, the images of class 1 of split 'train', got 2 \+ 3",
        ),
        (
            lambda: FewShotEpisodes({"train": images("train")}, ways=2, query=3).split("test"),
            "split must be one of those of classes, train, got 'test'",
        ),
        (lambda: ImageClasses.from_list([]), "images must be of one shape and dtype in every class, got no class"),
        (
            lambda: ImageClasses.from_list([torch.zeros(2, 3), torch.zeros(2, 4)]),
            r"must be of one shape and dtype in every class, got \[3\] torch.float32, \[4\] torch.float32",
        ),
        (lambda: ImageClasses(torch.zeros(3, 2), [1, 1]), r"counts must add up to the 3 images .* got \[1, 1\]"),
        (lambda: ImageClasses(torch.zeros(0, 2), []), r"counts must add up to the 0 images .* got \[\]"),
        (
            lambda: ImageClasses.from_labels(torch.zeros(4, 2), torch.zeros(3)),
            r"labels must be \[4\], one for every image, got \[3\]",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
