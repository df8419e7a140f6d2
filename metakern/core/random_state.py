"""The state of the random generators that a device draws from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

RandomState = tuple[Tensor, torch.device, Tensor | None]


def random_state(device: torch.device) -> RandomState:
    """The generators' state: the CPU's, and that of ``device``."""
    return torch.get_rng_state(), device, torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: RandomState) -> None:
    """Draw again what was drawn after :func:`random_state`."""
    cpu, device, cuda = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)


@contextlib.contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Puts the random state back afterwards."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state)
