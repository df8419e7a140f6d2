"""The device that all tensors of a call share.

The dispatcher takes a call with one tensor on "meta" to the fake kernel, whose results are memory that nobody wrote.
So fake kernels, and the functions before them, refuse tensors of several devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_CPU = torch.device("cpu")


def check_devices(first: str, device: torch.device, **arguments: Tensor | Sequence[Tensor] | None) -> None:
    """Raise RuntimeError unless every tensor is on ``device``, where the argument ``first`` is.

    Args:
        first: named in the error
        device: of that argument
        arguments: by name, tensors, lists of them or None
    """
    for name, value in arguments.items():
        if isinstance(value, (list, tuple)):
            for index, x in enumerate(value):
                if x is not None and x.device != device:
                    _refuse(f"{name}[{index}]", first, device, x)
        elif isinstance(value, Tensor) and value.device != device:
            _refuse(name, first, device, value)


def check_constants(device: torch.device, **arguments: Tensor) -> None:
    """Raise RuntimeError unless the operator's constants are on the CPU, or on ``device`` with the other tensors."""
    for name, x in arguments.items():
        if x.device != device and x.device != _CPU:
            raise RuntimeError(f"{name} must be on the CPU or on the device of params, {device}, got {x.device}")


def _refuse(name: str, first: str, device: torch.device, x: Any) -> None:
    raise RuntimeError(f"{name} must be on the device of {first}, {device}, got {x.device}")
