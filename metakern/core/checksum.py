"""Checksums for saved tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, independent of their order."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(repr((name, str(tensor.dtype), list(tensor.shape))).encode())
        sha.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def check_digest(path: object, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where the metadata of the file at ``path`` lack a digest or it does not match ``tensors``."""
    if "sha256" not in metadata:
        raise ValueError(f"{path} must have a sha256 of its tensors in its metadata, got none")
    if metadata["sha256"] != digest(tensors):
        raise ValueError(f"{path} is damaged: its tensors have another SHA-256 than it says")
