"""Exponential moving average of parameters.

Polyak and Juditsky 1992; the exponential form with its warm-up as in TensorFlow's ExponentialMovingAverage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metakern.core.torch_private import foreach_lerp_


class MovingAverage:
    """θ̄ ← β_n·θ̄ + (1 - β_n)·θ after the nth outer step, β_n = min(β, (1 + n) / (10 + n)); θ̄ starts as θ.

    The smaller β_n of the first steps forget where training started. Buffers are not averaged.

    Args:
        module: its floating-point parameters are averaged
        decay: β
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self._parameters = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
        self.average = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current parameters."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        foreach_lerp_(list(self.average.values()), list(self._parameters.values()), 1 - decay)

    @torch.no_grad()
    def restart(self, parameters: Iterable[nn.Parameter]) -> None:
        """Reset the averages of these parameters to their current values."""
        anew = set(map(id, parameters))
        for name, p in self._parameters.items():
            if id(p) in anew:
                self.average[name].copy_(p)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Context in which the module's parameters hold the average."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(own)

    def state_dict(self) -> dict[str, Any]:
        """The average by parameter name, and n."""
        return {"steps": self.steps, "average": dict(self.average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the average from :meth:`state_dict`, for the same parameters."""
        if state["average"].keys() != self.average.keys():
            raise ValueError(
                f"the moving average must be of parameters {sorted(self.average)}, got {sorted(state['average'])}"
            )
        for name, tensor in self.average.items():
            tensor.copy_(state["average"][name])
        self.steps = state["steps"]

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, p in self._parameters.items():
            p.copy_(values[name])


def start_anew(
    parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, average: MovingAverage | None
) -> None:
    """Reset optimizer state and average of parameters that a learner has replaced: both are stale."""
    parameters = list(parameters)
    for p in parameters:
        optimizer.state.pop(p, None)
    if average is not None:
        average.restart(parameters)
