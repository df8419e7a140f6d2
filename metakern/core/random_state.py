"""Saving and restoring the state of torch's random generators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

RandomState = tuple[Tensor, torch.device, Tensor | None]


def random_state(device: torch.device) -> RandomState:
    """The state of the CPU's generator and, for a GPU, of ``device``'s."""
    return torch.get_rng_state(), device, torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: RandomState) -> None:
    """Restore a state from :func:`random_state`."""
    cpu, device, cuda = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)


@contextlib.contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Context manager that restores the random state on exit."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state)
