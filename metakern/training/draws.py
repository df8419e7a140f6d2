"""Seeds of all draws: each follows from the run's seed and what it is for, so that nothing of them must be saved."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(seed: int, *purpose: str | int) -> int:
    """63 bits that differ for every seed and purpose."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, *purpose: str | int) -> torch.Generator:
    """A generator on the CPU that draws the same for the same seed and purpose."""
    return torch.Generator().manual_seed(derived_seed(seed, *purpose))


def seed_global(device: torch.device, seed: int, *purpose: str | int) -> None:
    """Seed torch's global generators of the CPU and of the device.

    ``torch.manual_seed`` asks every kind of device there may be, which takes as long as a small inner loop.
    """
    derived = derived_seed(seed, *purpose)
    torch.default_generator.manual_seed(derived)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(derived)


@contextmanager
def own_global_draws(device: torch.device) -> Iterator[None]:
    """Within it torch's global generators may be seeded; afterwards they stand where they stood."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
