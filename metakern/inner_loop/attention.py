"""Context manager that selects the attention implementation with a second derivative."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from metakern.core.torch_private import ATTENTION

_ASK = [ask for ask, _ in ATTENTION.values()]
_SET = [switch for _, switch in ATTENTION.values()]
_MATH_ALONE = [name == "math" for name in ATTENTION]


def math_attention() -> AbstractContextManager[Any]:
    """``sdpa_kernel(SDPBackend.MATH)`` without its overhead of 10 µs, which matters where a small model takes 60."""
    return sdpa_kernel(SDPBackend.MATH) if torch.compiler.is_compiling() else _MathAttention()


class _MathAttention:
    def __enter__(self) -> None:
        self._before = [ask() for ask in _ASK]
        _set(_MATH_ALONE)

    def __exit__(self, *error: object) -> None:
        _set(self._before)


def _set(enabled: list[bool]) -> None:
    for switch, value in zip(_SET, enabled, strict=True):
        switch(value)
