"""Checks that all tensors of a call are on one device; a device's autocast.

The dispatcher sends a call with one tensor on "meta" to the fake kernel, whose results are uninitialized memory. So
fake kernels, and the functions before them, refuse tensors on several devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_CPU = torch.device("cpu")


def check_devices(first: str, device: torch.device, **arguments: Tensor | Sequence[Tensor] | None) -> None:
    """Raise RuntimeError unless every tensor is on ``device``, where the argument ``first`` is.

    Args:
        first: name of the argument that ``device`` belongs to, for the error
        device: of that argument
        arguments: tensors, lists of tensors or None, by name
    """
    for name, value in arguments.items():
        if isinstance(value, (list, tuple)):
            for index, x in enumerate(value):
                if x is not None and x.device != device:
                    _refuse(f"{name}[{index}]", first, device, x)
        elif isinstance(value, Tensor) and value.device != device:
            _refuse(name, first, device, value)


def check_constants(device: torch.device, **arguments: Tensor) -> None:
    """Raise RuntimeError unless the operator's constants are on the CPU or on ``device``."""
    for name, x in arguments.items():
        if x.device != device and x.device != _CPU:
            raise RuntimeError(f"{name} must be on the CPU or on the device of params, {device}, got {x.device}")


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Context in which a reference ignores autocast, as the kernels do."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _refuse(name: str, first: str, device: torch.device, x: Any) -> None:
    raise RuntimeError(f"{name} must be on the device of {first}, {device}, got {x.device}")
