"""Checks of numeric arguments."""

from __future__ import annotations

import math
import numbers
from typing import Any

from torch import Tensor


def check_count(name: str, value: Any, minimum: int = 1) -> int:
    """The value as an int (NumPy integers are accepted); raise unless it is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    count = int(value)
    if count < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {count}")
    return count


def check_rate(name: str, lr: Any) -> None:
    """Raise unless a learning rate is a finite number or a floating tensor of one element."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor of 1 element, got shape {list(lr.shape)}")
        return
    if not is_number(lr):
        raise TypeError(f"{name} must be a number or a tensor, got {type(lr).__name__}")
    if not -math.inf < lr < math.inf:
        raise ValueError(f"{name} must be finite, got {lr}")


def is_number(value: Any) -> bool:
    """Whether a value is a real number, Python's or NumPy's, but not a bool."""
    return isinstance(value, (int, float, numbers.Real)) and not isinstance(value, bool)


def check_clip_norm(clip_norm: Any) -> float | None:
    """``clip_norm`` as a float, or None; raise unless it is None or positive and finite."""
    if clip_norm is None:
        return None
    if not is_number(clip_norm):
        raise TypeError(f"clip_norm must be a number, got {clip_norm!r}")
    if not 0 < clip_norm < math.inf:
        raise ValueError(f"clip_norm must be positive and finite, got {clip_norm}")
    return float(clip_norm)
