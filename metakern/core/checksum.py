"""What tells whether stored tensors are those that were stored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, whatever their order."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(repr((name, str(tensor.dtype), list(tensor.shape))).encode())
        sha.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def check_digest(path: object, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where the metadata of the file at ``path`` have no digest, or that of other tensors."""
    if "sha256" not in metadata:
        raise ValueError(f"{path} must have a sha256 of its tensors in its metadata, got none")
    if metadata["sha256"] != digest(tensors):
        raise ValueError(f"{path} is damaged: its tensors have another SHA-256 than it says")
