"""Memoization of per-call checks and constants, independent of the caller's default device, modes and transforms."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from metakern.core.torch_private import (
    count_dispatch_modes,
    without_dispatch_modes,
    without_function_modes,
    without_transforms,
)

Function = TypeVar("Function", bound=Callable[..., Any])

#: Numbers in a cached constant at most; longer ones would hold too much memory in 256 cache entries.
_LONGEST_CONSTANT = 1024


def memoized(function: Function) -> Function:
    """Cache the results of a function of hashable arguments. Results must be plain values, not tensors.

    Under torch.compile, and in traces with symbolic sizes, the function is called without the cache.
    """
    remembered = functools.lru_cache(256)(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or (count_dispatch_modes() and not _are_hashable(args)):
            return function(*args)
        return remembered(*args)

    return call  # type: ignore[return-value]


def _are_hashable(args: tuple[Any, ...]) -> bool:
    try:
        hash(args)
    except TypeError:  # symbolic sizes, alone or in a tuple
        return False
    return True


@contextlib.contextmanager
def outside_modes() -> Iterator[None]:
    """Switch off the caller's modes and transforms, so that tensors made within can be cached for later calls.

    These are torch.device(...), torch.set_default_device, other function and dispatch modes (FakeTensorMode, make_fx),
    torch.inference_mode and the transforms of torch.func.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_function_modes())
        stack.enter_context(without_transforms())
        stack.enter_context(without_dispatch_modes())
        stack.enter_context(torch.inference_mode(False))
        yield


def constant(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of a few numbers, cached; not under tracing, where the trace must record its creation."""
    traced = torch.compiler.is_compiling() or count_dispatch_modes()
    if traced or len(values) > _LONGEST_CONSTANT:
        return torch.tensor(values, dtype=dtype, device=device)
    return _constant(values, dtype, device)


@functools.lru_cache(256)
def _constant(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with outside_modes():
        return torch.tensor(values, dtype=dtype, device=device)
