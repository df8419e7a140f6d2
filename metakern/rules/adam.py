"""Adam: Kingma & Ba 2015, arXiv 1412.6980, algorithm 1, differentiable also at zero gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from metakern.rules.elementwise import ElementwiseRule, per_task


class Adam(ElementwiseRule):
    """m' = β₁m + (1−β₁)g, v' = β₂v + (1−β₂)g², θ' = θ − α · m'/c₁ / (√v'/√c₂ + ε), c = 1 − βᵗ. As ``torch.optim.Adam``.

    Differentiable to any order. d√v/dv is infinite at v = 0, where the chain rule would give 0 · ∞ = NaN; it is set to
    0 there. This is exact: v' is 0 only if all gradients have been 0, so m' is 0 too, and the update depends on g
    through m' alone, with derivative α(1−β₁)/(c₁ε).

    Args:
        lr: α, a number or a tensor []; an ``nn.Parameter`` is learned
        beta1: β₁, likewise, 0 to 1
        beta2: β₂, likewise, 0 to 1
        eps: ε, likewise, not negative; 0 makes NaN of coordinates whose gradients have all been 0

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    Example:
        >>> rule = Adam(1e-3)
        >>> learned = Adam(nn.Parameter(torch.tensor(1e-3)))
    """

    title = "Adam"
    moments = ("m", "v")
    counts = True
    takes_copies = True

    def __init__(
        self,
        lr: float | Tensor = 1e-3,
        beta1: float | Tensor = 0.9,
        beta2: float | Tensor = 0.999,
        eps: float | Tensor = 1e-8,
    ) -> None:
        super().__init__()
        self.set_number("lr", lr, 0, math.inf)
        self.set_number("beta1", beta1, 0, 1)
        self.set_number("beta2", beta2, 0, 1)
        self.set_number("eps", eps, 0, math.inf)

    beta1: float | Tensor
    beta2: float | Tensor
    eps: float | Tensor

    def direction(self, grad: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """m̂ / (√v̂ + ε)."""
        beta1, beta2 = self.number("beta1", grad), self.number("beta2", grad)
        m = beta1 * state["m"] + (1 - beta1) * grad
        v = beta2 * state["v"] + (1 - beta2) * grad * grad
        count = per_task(state["count"], grad)
        c1, c2 = (_correction(beta, count, grad) for beta in (beta1, beta2))
        return (m / c1) / (_root(v) / c2.sqrt() + self.number("eps", grad)), {"m": m, "v": v}

    def described(self) -> str:
        """Description for the model card."""
        return f"Adam (Kingma & Ba 2015, [arXiv 1412.6980](https://arxiv.org/abs/1412.6980)): `{self}`."


def _correction(beta: float | Tensor, count: Tensor, like: Tensor) -> Tensor:
    """1 − βᵗ of the shape of ``count``; by expm1, since float32 loses digits in 1 − 0.999."""
    log = beta.log() if isinstance(beta, Tensor) else (math.log(beta) if beta else -math.inf)
    return -torch.expm1(count.to(like.dtype) * log)


def _root(v: Tensor) -> Tensor:
    """√v, with the derivative 0 at 0; NaN stays NaN."""
    zero = v == 0
    return torch.where(zero, v, torch.where(zero, torch.ones_like(v), v).sqrt())
