"""Images are decoded once; the cache follows the files, is whole or absent, and may fail without harm."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metakern.tasks import _images
from metakern.tasks._images import CACHE, load_images


@pytest.fixture
def files(tmp_path):
    """Three grey 8×8 images, in shades 10, 20 and 30."""
    paths = [tmp_path / f"{shade}.png" for shade in (10, 20, 30)]
    for path in paths:
        Image.new("L", (8, 8), int(path.stem)).save(path)
    return paths


@pytest.fixture
def decoded(monkeypatch):
    """The files that have been decoded."""
    names, decode = [], _images._decode_one
    monkeypatch.setattr(_images, "_decode_one", lambda file, *rest: names.append(file.name) or decode(file, *rest))
    return names


def load(files, size=8, name="shades"):
    return load_images(files[0].parent, files, name, "L", size)


def shades(images):
    return images[:, 0, 0, 0].tolist()


def caches(files):
    return sorted((files[0].parent / CACHE).iterdir())


def test_images_come_in_the_order_of_the_files(files):
    images = load(files)
    assert images.dtype == torch.uint8
    assert images.shape == (3, 1, 8, 8)
    assert shades(images) == [10, 20, 30]
    assert shades(load(files[::-1])) == [30, 20, 10]


def test_images_are_decoded_once(files, decoded):
    first = load(files)
    assert sorted(decoded) == ["10.png", "20.png", "30.png"]
    assert torch.equal(load(files), first)
    assert len(decoded) == 3


@pytest.mark.parametrize("change", ["content", "time", "name", "fewer", "size"])
def test_a_change_of_the_files_is_noticed_and_the_old_cache_goes(files, decoded, change):
    load(files, name="shades")
    options = {}
    if change == "content":
        Image.new("L", (9, 9), 40).save(files[2])
    elif change == "time":
        Image.new("L", (8, 8), 40).save(files[2])
        os.utime(files[2], ns=(1, files[2].stat().st_mtime_ns + 1))
    elif change == "name":
        files = [*files[:2], files[2].rename(files[2].with_name("x.png"))]
    elif change == "fewer":
        files = files[:2]
    else:
        options = {"size": 4}
    images = load(files, **options)
    assert len(decoded) == 3 + len(files)
    assert shades(images) == {"name": [10, 20, 30], "size": [10, 20, 30], "fewer": [10, 20]}.get(change, [10, 20, 40])
    assert len(caches(files)) == (2 if change == "size" else 1)


@pytest.mark.parametrize("damage", ["empty", "short", "header", "other", "pickle"])
def test_a_damaged_cache_is_written_anew(files, decoded, damage):
    load(files)
    (cache,) = caches(files)
    content = cache.read_bytes()
    if damage == "empty":
        cache.write_bytes(b"")
    elif damage == "short":
        cache.write_bytes(content[:-1])
    elif damage == "header":
        cache.write_bytes(b"x" + content[1:])
    elif damage == "other":
        np.save(cache, np.zeros((3, 1, 8, 7), np.uint8))
    else:
        np.save(cache, np.array([{}, {}, {}]), allow_pickle=True)
    assert shades(load(files)) == [10, 20, 30]
    assert len(decoded) == 6
    assert cache.read_bytes() == content


def test_no_flipped_bit_of_a_cache_is_believed_or_raises(files, decoded):
    """Every byte is hit, of the header, which numpy reads as Python, of the pixels, and of the checksum."""
    images = load(files)
    (cache,) = caches(files)
    content = cache.read_bytes()
    for index in range(len(content)):
        damaged = bytearray(content)
        damaged[index] ^= 1 << index % 8
        cache.write_bytes(damaged)
        assert torch.equal(load(files), images), index
    assert len(decoded) > 3 * (images.numel() + 4)  # the pixels and the checksum, whatever the header
    assert cache.read_bytes() == content


def test_a_cache_can_be_read_by_others(files):
    images = load(files)
    (cache,) = caches(files)
    assert np.array_equal(np.load(cache), images.numpy())


def test_the_images_of_a_cache_can_be_changed_without_changing_it(files):
    load(files)
    load(files).fill_(7)
    assert shades(load(files)) == [10, 20, 30]


@pytest.mark.parametrize("failing", ["mkdir", "replace", "fsync"])
def test_a_folder_that_cannot_be_written_is_said_and_does_no_harm(files, decoded, monkeypatch, failing):
    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    owner = os if failing == "fsync" else Path
    message = f"cannot be kept in {files[0].parent}.*, and are decoded again next time: .*Read-only"
    with monkeypatch.context() as patch:
        patch.setattr(owner, failing, refuse)
        for _ in range(2):
            with pytest.warns(UserWarning, match=message) as warned:
                assert shades(load(files)) == [10, 20, 30]
            assert [each.filename for each in warned] == [__file__]  # the user's line, not metakern's
    assert len(decoded) == 6
    assert not list(files[0].parent.glob(f"{CACHE}/*"))  # nothing half-written is left


def test_a_written_cache_is_not_warned_of(files):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(files)
        load(files)


def test_bars_of_progress_are_only_for_terminals(files, capfd):
    load(files)
    assert capfd.readouterr() == ("", "")


def test_grey_and_colour_are_what_is_asked_for(files):
    Image.new("RGB", (8, 8), (10, 20, 30)).save(files[0])
    colour = load_images(files[0].parent, files, "colour", "RGB", 8)
    assert colour[:, :, 0, 0].tolist() == [[10, 20, 30], [20, 20, 20], [30, 30, 30]]
    assert load(files).shape == (3, 1, 8, 8)


@pytest.mark.parametrize("content", [b"", b"no image", "half"])
def test_a_damaged_image_is_named(files, content):
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(ValueError, match=f"expected an image that can be read, but {files[1]} is damaged or no image"):
        load(files)
    assert not list(files[0].parent.glob(f"{CACHE}/*"))


def test_a_missing_image_is_named(files):
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"expected an image {files[1]}, which is not there"):
        load(files)
