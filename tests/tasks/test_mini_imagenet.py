"""MiniImageNet from lists and from folders, and what is said of what is missing or damaged."""

import shutil

import pytest
import torch

from metakern.tasks import MiniImageNet, mini_imagenet
from tests.tasks.draws import assert_same, generator
from tests.tasks.pictures import LABELS, write_mini_imagenet

OPTIONS = {"ways": 2, "support": 1, "query": 3}


@pytest.fixture
def listed(tmp_path, monkeypatch):
    write_mini_imagenet(tmp_path, monkeypatch, lists=True)
    return tmp_path


@pytest.fixture
def folders(tmp_path, monkeypatch):
    write_mini_imagenet(tmp_path, monkeypatch, lists=False)
    return tmp_path


def test_the_real_numbers_are_those_of_ravi_and_larochelle():
    assert mini_imagenet.CLASSES == {"train": 64, "valid": 16, "test": 20}
    assert (mini_imagenet.IMAGES, mini_imagenet.SIZE) == (600, 84)


@pytest.mark.parametrize("lists", [True, False], ids=["lists", "folders"])
def test_every_split_has_the_classes_that_its_layout_names(tmp_path, monkeypatch, lists):
    write_mini_imagenet(tmp_path, monkeypatch, lists=lists)
    tasks = MiniImageNet(tmp_path, **OPTIONS)
    for split, name in (("train", "train"), ("valid", "val"), ("test", "test")):
        batch = tasks.split(split).sample(30, generator())
        assert batch.support_x.shape == (30, 2, 3, 84, 84)
        assert batch.query_x.shape == (30, 6, 3, 84, 84)
        red, green, blue = (batch.query_x[:, :, c].mul(255).round() for c in range(3))
        assert set(red.unique().tolist()) == {10.0 * int(label[1:]) for label in LABELS[name]}
        assert set(green.unique().tolist()) == {0.0, 20.0, 40.0, 60.0}
        assert blue.abs().max() == 0
        by_label = red[..., 0, 0].view(30, 2, 3)
        assert torch.equal(by_label, by_label[..., :1].expand_as(by_label))  # one class to a label
        assert (by_label[:, 0] != by_label[:, 1]).all()


def test_images_are_float32_from_0_to_1_and_resized_to_84(tmp_path, monkeypatch):
    write_mini_imagenet(tmp_path, monkeypatch, lists=False, size=100)
    batch = MiniImageNet(tmp_path, **OPTIONS).sample(2, generator())
    assert batch.query_x.shape[-2:] == (84, 84)
    assert batch.query_x.dtype == torch.float32
    torch.testing.assert_close(batch.query_x.max(), torch.tensor(60 / 255))


def test_both_layouts_of_the_same_pictures_are_the_same_tasks(tmp_path, monkeypatch):
    for name, lists in (("lists", True), ("folders", False)):
        write_mini_imagenet(tmp_path / name, monkeypatch, lists=lists)
    one, other = (MiniImageNet(tmp_path / name, **OPTIONS).sample(4, generator()) for name in ("lists", "folders"))
    assert_same(one, other)


def test_images_that_were_decoded_once_are_the_same_again(folders):
    first = MiniImageNet(folders, **OPTIONS).sample(5, generator())
    assert len(list((folders / ".metakern-cache").iterdir())) == 3
    assert_same(MiniImageNet(folders, **OPTIONS).sample(5, generator()), first)


def test_an_empty_folder_is_told_both_layouts(tmp_path):
    message = rf"expected train.csv, .* images in {tmp_path}, or folders train, val and test .* no {tmp_path}/train"
    with pytest.raises(FileNotFoundError, match=message):
        MiniImageNet(tmp_path)


def test_a_missing_split_is_named(folders):
    shutil.rmtree(folders / "val")
    with pytest.raises(FileNotFoundError, match=f"there is no {folders}/val"):
        MiniImageNet(folders)


def test_a_missing_list_and_missing_images_are_named(listed):
    image = listed / "images/n0200000003.png"
    image.unlink()
    with pytest.raises(FileNotFoundError, match=f"expected an image {image}, which is not there"):
        MiniImageNet(listed)
    (listed / "test.csv").unlink()
    with pytest.raises(FileNotFoundError, match=rf"expected a list of images {listed}/test.csv beside train.csv"):
        MiniImageNet(listed)
    shutil.rmtree(listed / "images")
    with pytest.raises(FileNotFoundError, match=rf"expected a folder {listed}/images with the images of"):
        MiniImageNet(listed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"expected the columns filename and label in .*val.csv, found None"),
        (b"name,class\na.png,n10\n", r"expected the columns .* in .*val.csv, found \['name', 'class'\]"),
        (b"filename,label\na.png,n10\nb.png\n", r"expected a filename and a label in line 3 of .*val.csv"),
        (
            b"filename,label\na.png,n10\n/tmp/b.png,n10\n",
            r"expected the name of a file in .*/images in line 3 of .*val.csv, found /tmp/b.png",
        ),
        (b"filename,label\n\xff\xfe\x00,n10\n", r"list of filename and label, but .*val.csv is damaged"),
        (b"filename,label\na.png,n10\n", r"expected 2 classes in val of .*, found 1"),
        (
            b"filename,label\n" + b"".join(b"%d.png,n10\n%d.png,n11\n" % (i, i + 3) for i in range(3)),
            r"expected 4 images of class n10 in val of .*, found 3",
        ),
        (
            b"filename,label\n" + b"".join(b"%d.png,n10\n%d.png,n11\n" % (i // 2, i) for i in range(4)),
            r"expected 4 images of class n10 in val of .*, found 2, some of them twice",
        ),
        (
            b"filename,label\n" + b"".join(b"%d.png,n10\n%d.png,n02\n" % (i, i) for i in range(4)),
            r"expected no class in two splits of .*, but n02 is in train and valid",
        ),
    ],
)
def test_a_damaged_list_is_named_with_what_it_should_hold(listed, content, message):
    (listed / "val.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        MiniImageNet(listed)


def test_a_list_may_begin_with_a_byte_order_mark(listed):
    before = MiniImageNet(listed, **OPTIONS).sample(4, generator())
    (listed / "train.csv").write_text((listed / "train.csv").read_text(), encoding="utf-8-sig")
    assert (listed / "train.csv").read_bytes().startswith(b"\xef\xbb\xbffilename")
    assert_same(MiniImageNet(listed, **OPTIONS).sample(4, generator()), before)


def test_a_missing_class_or_image_of_a_folder_is_counted(folders):
    next((folders / "train/n02").iterdir()).unlink()
    with pytest.raises(ValueError, match=rf"expected 4 images of class n02 in train of {folders}, found 3"):
        MiniImageNet(folders)
    shutil.rmtree(folders / "train/n02")
    with pytest.raises(ValueError, match=rf"expected 3 classes in train of {folders}, found 2"):
        MiniImageNet(folders)
