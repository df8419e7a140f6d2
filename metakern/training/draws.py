"""Random seeds, derived from the run's seed and the purpose, so that no generator state must be saved."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed, hashed from seed and purpose."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator seeded by seed and purpose."""
    return torch.Generator().manual_seed(derived_seed(seed, *purpose))


def seed_global(device: torch.device, seed: int, *purpose: str | int) -> None:
    """Seed torch's global generators of the CPU and of the device.

    ``torch.manual_seed`` goes through every device type, which takes as long as a small inner loop.
    """
    derived = derived_seed(seed, *purpose)
    torch.default_generator.manual_seed(derived)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(derived)


@contextmanager
def own_global_draws(device: torch.device) -> Iterator[None]:
    """Context that restores torch's global generators on exit."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
