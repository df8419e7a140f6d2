"""Image loading with a cache of decoded images on disk."""

from __future__ import annotations

import hashlib
import os
import sys
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from metakern.core.files import write_whole
from metakern.core.requirements import required
from metakern.core.warn import warn_user

#: Cache folder of decoded images, within the data set's folder.
CACHE = ".metakern-cache"

_CHECKSUM_BYTES = 4


def load_images(root: Path, files: Sequence[Path], name: str, mode: str, size: int) -> Tensor:
    """Images of ``files`` as ``uint8`` [M, channels, size, size], in their order.

    The first call decodes them and writes a cache file in ``root``; later calls map that file into memory, as long as
    the paths, sizes and modification times of all images are unchanged and the file's checksum is right. If the cache
    cannot be written, the call warns.

    Args:
        root: the folder of the data set
        files: image files within it
        name: distinguishes several caches in one folder
        mode: Pillow's image mode: "L" for one grey channel, "RGB" for three
        size: height and width to which images are resized, by Lanczos's filter

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for a file that is no image, or a damaged one.
    """
    shape = (len(files), len(mode), size, size)
    prefix = f"{name}-{size}"
    cache = root / CACHE / f"{prefix}-{_fingerprint(root, files, mode)}.npy"
    images = _read_cache(cache, shape)
    if images is None:
        images = _decode(files, mode, shape, name)
        _write_cache(cache, prefix, images)
    return torch.from_numpy(images)


def image_files(folder: Path, *suffixes: str) -> list[Path]:
    """The files of a folder with one of the suffixes, in any case, sorted by name; hidden files are left out."""
    return sorted(x for x in folder.iterdir() if x.suffix.lower() in suffixes and not x.name.startswith("."))


def subfolders(folder: Path) -> list[Path]:
    """The subfolders of a folder, sorted by name; hidden ones are left out."""
    return sorted(x for x in folder.iterdir() if x.is_dir() and not x.name.startswith("."))


def _fingerprint(root: Path, files: Sequence[Path], mode: str) -> str:
    """Hash of everything that the decoded images depend on, except their size."""
    digest = hashlib.sha256(mode.encode())
    for file in files:
        try:
            status = file.stat()
        except FileNotFoundError:
            raise FileNotFoundError(f"expected an image {file}, which is not there") from None
        digest.update(f"\n{file.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def _read_cache(cache: Path, shape: tuple[int, ...]) -> np.ndarray[Any, Any] | None:
    """The images of a cache; None if it is missing or damaged, so that the caller writes it anew."""
    try:
        # Copy-on-write: torch wants writable memory, but the file must not change.
        images: np.ndarray[Any, Any] = np.load(cache, mmap_mode="c", allow_pickle=False)
        with open(cache, "rb") as file:
            file.seek(-_CHECKSUM_BYTES, os.SEEK_END)
            whole = images.shape == shape and images.dtype == np.uint8 and file.read() == _checksum(images)
    except Exception:  # a damaged header makes numpy raise nearly anything, tokenize.TokenError among them
        return None
    return images if whole else None


def _checksum(images: np.ndarray[Any, Any]) -> bytes:
    """CRC-32 of the images, appended to the cache; takes a second per gigabyte. Readers of .npy ignore it."""
    return zlib.crc32(images.data).to_bytes(_CHECKSUM_BYTES, "big")


def _write_cache(cache: Path, prefix: str, images: np.ndarray[Any, Any]) -> None:
    """Write images atomically, and delete other caches of the same prefix."""

    def write(file: IO[bytes]) -> None:
        np.save(file, images, allow_pickle=False)
        file.write(_checksum(images))

    try:
        cache.parent.mkdir(exist_ok=True)
        write_whole(cache, write)
        for other in cache.parent.glob(f"{prefix}-*.npy"):
            if other != cache:
                other.unlink(missing_ok=True)
    except OSError as error:
        warn_user(f"decoded images cannot be kept in {cache}, and are decoded again next time: {error}")


def _decode(files: Sequence[Path], mode: str, shape: tuple[int, ...], name: str) -> np.ndarray[Any, Any]:
    with required():
        from rich.console import Console
        from rich.progress import track

    images = np.empty(shape, np.uint8)
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(lambda file: _decode_one(file, mode, shape[2]), files)
        shown = track(
            decoded,
            f"decoding {name}",
            total=len(files),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        for index, image in enumerate(shown):
            images[index] = image
    return images


def _decode_one(file: Path, mode: str, size: int) -> np.ndarray[Any, Any]:
    """Decode one image to [channels, size, size]."""
    with required():
        from PIL import Image

    try:
        with Image.open(file) as opened:
            image = opened.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # as Pillow's decoders raise
        raise ValueError(f"expected an image that can be read, but {file} is damaged or no image: {error}") from error
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1)
