"""Remembered results of cheap functions that every call asks again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def memoized(function: Function) -> Function:
    """Remember what a function of hashable arguments returned; torch.compile, which cannot see memories, calls it."""
    remembered = functools.lru_cache(256)(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args) if torch.compiler.is_compiling() else remembered(*args)

    return call  # type: ignore[return-value]


def once(function: Function) -> Function:
    """Remember what a function without arguments returned; torch.compile finds it there and calls nothing.

    It would look through functools.cache, and call the function that imports what it cannot trace.
    """
    returned: list[Any] = []

    @functools.wraps(function)
    def call() -> Any:
        if not returned:
            returned.append(function())
        return returned[0]

    return call  # type: ignore[return-value]
