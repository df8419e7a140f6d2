"""Gradient descent with momentum: Polyak 1964; Nesterov's form as in Sutskever et al. 2013."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from metakern.rules.elementwise import ElementwiseRule


class Momentum(ElementwiseRule):
    """v' = μ v + g, θ' = θ − α v'; with ``nesterov`` θ' = θ − α (g + μ v'). As ``torch.optim.SGD``.

    Args:
        lr: α, a number or a tensor []; an ``nn.Parameter`` is learned
        momentum: μ, likewise, 0 to 1
        nesterov: whether to use Nesterov's form

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    Example:
        >>> rule = Momentum(0.1)
        >>> learned = Momentum(nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(0.9)))
    """

    title = "Momentum"
    moments = ("velocity",)
    takes_copies = True

    def __init__(self, lr: float | Tensor = 0.01, momentum: float | Tensor = 0.9, *, nesterov: bool = False) -> None:
        super().__init__()
        self.set_number("lr", lr, 0, math.inf)
        self.set_number("momentum", momentum, 0, 1)
        if not isinstance(nesterov, bool):
            raise TypeError(f"nesterov must be a bool, got {nesterov!r}")
        self.nesterov = nesterov

    momentum: float | Tensor

    def direction(self, grad: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """v', or g + μ v'."""
        momentum = self.number("momentum", grad)
        velocity = momentum * state["velocity"] + grad
        return (grad + momentum * velocity if self.nesterov else velocity), {"velocity": velocity}

    def described(self) -> str:
        """Description for the model card."""
        return f"Gradient descent with momentum: `{self}`."
