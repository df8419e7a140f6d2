"""Tensor checks for backends other than the compiled kernels: csrc/core/checks.h in Python, with the same messages.

The exception type does not depend on the backend: ValueError for shapes, sizes, counts and option values, TypeError
for dtypes and types, RuntimeError for mismatched devices and missing hardware or software.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_value(condition: bool, *parts: Any) -> None:
    """Raise ValueError with the joined parts unless ``condition``."""
    if not condition:
        raise ValueError(_joined(parts))


def check_type(condition: bool, *parts: Any) -> None:
    """Raise TypeError with the joined parts unless ``condition``."""
    if not condition:
        raise TypeError(_joined(parts))


def check(condition: bool, *parts: Any) -> None:
    """Raise RuntimeError with the joined parts unless ``condition``."""
    if not condition:
        raise RuntimeError(_joined(parts))


def check_shape(x: Tensor, name: str, shape: Sequence[int]) -> None:
    """Raise ValueError unless ``x`` has this shape."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")


def check_dtype(x: Tensor, name: str, dtype: torch.dtype) -> None:
    """Raise TypeError unless ``x`` has this dtype."""
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {x.dtype}")


def check_same_device(x: Tensor, name: str, other: Tensor, other_name: str) -> None:
    """Raise RuntimeError unless ``x`` is on the device of ``other``."""
    if x.device != other.device:
        raise RuntimeError(f"{name} must be on the device of {other_name}, {other.device}, got {x.device}")


def check_dense(x: Any, name: str) -> None:
    """Raise TypeError unless ``x`` is a tensor of layout torch.strided."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")


def check_like(x: Tensor, name: str, other: Tensor, other_name: str) -> None:
    """Raise unless ``x`` has the shape (ValueError), dtype (TypeError) and device (RuntimeError) of ``other``."""
    if x.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {list(other.shape)}, got {list(x.shape)}")
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {x.dtype}")
    check_same_device(x, name, other, other_name)


def _joined(parts: tuple[Any, ...]) -> str:
    return "".join(str(list(part) if isinstance(part, torch.Size) else part) for part in parts)
