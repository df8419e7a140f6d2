"""Random numbers that depend on a key and a counter alone: no generator, and the same on every device.

splitmix64, Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators". For initial states that must
come out the same for one task and for many, under torch.func and torch.compile, and after a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def key_of(seed: int, name: str) -> int:
    """A 64-bit key from a seed and a name, by FNV-1a."""
    key = 0xCBF29CE484222325
    for byte in f"{seed}/{name}".encode():
        key = (key ^ byte) * 0x100000001B3 % 2**64
    return key


def uniform(keys: Sequence[int], number: int, device: torch.device | None = None) -> Tensor:
    """Uniform numbers in [0, 1), float64 [len(keys), number]; a row depends on its key alone."""
    starts = torch.tensor([_signed(key) for key in keys], dtype=torch.int64, device=device)
    z = torch.arange(1, number + 1, device=device) * _signed(_GOLDEN) + starts.unsqueeze(1)
    z = (z ^ _shifted(z, 30)) * _signed(_FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(_SECOND)
    z = z ^ _shifted(z, 31)
    draws: Tensor = _shifted(z, 11).double() * 2.0**-53
    return draws


def _signed(x: int) -> int:
    """The same 64 bits as a signed integer; torch's products wrap around."""
    return x - 2**64 if x >= 2**63 else x


def _shifted(z: Tensor, by: int) -> Tensor:
    """Shift right without copies of the sign."""
    shifted: Tensor = (z >> by) & (2 ** (64 - by) - 1)
    return shifted
