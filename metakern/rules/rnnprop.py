"""RNNProp: Lv et al. 2017, "Learning gradient descent: better generalization and longer horizons", arXiv 1703.03633."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from metakern.ops.lstm_step import check_scales
from metakern.ops.lstm_step.reference import MOMENTS_WIDTH
from metakern.ops.lstm_step.staged import check_decays
from metakern.rules.staged_rule import StagedRule


class RNNProp(StagedRule):
    """Coordinatewise LSTM on gradients normalised as Adam does; θ' = θ + output_scale · tanh(out).

    Inputs g/(√v̂ + 1e-8) and m̂/(√v̂ + 1e-8) with bias-corrected moments, then Linear(20) with ELU, L LSTM layers and
    Linear(1). The moments belong to the state, and one launch of :func:`metakern.ops.lstm_step_staged` updates them,
    the cells and the parameters. Each coordinate's bias corrections follow its own number of steps. The dense layers
    start from a normal distribution of std 0.1 cut off at 0.2, with zero biases; the cells as ``nn.LSTM``.

    The defaults are those of the authors. Another public implementation orders the inputs (m̂, g) and adds
    0.01 · tanh(out): ``RNNProp(moment_first=True, output_scale=0.01)``.

    Args:
        hidden_size: H, 1 to 64.
        num_layers: L, 1 to 3.
        beta1: decay of the moving mean m, at least 0 and less than 1.
        beta2: decay of the moving mean of squares v, likewise.
        output_scale: factor of the update.
        moment_first: order of the two inputs: m̂ first instead of g.
        backend: ``"auto"``, ``"cpp"``, ``"cuda"`` or ``"reference"``; None is ``"auto"``.
        precision: of the products, as for :class:`metakern.rules.CoordinatewiseLSTM`.
        horizon: steps that the rule was meta-trained for, or None.
        trained_on: description of the meta-training tasks, or None.

    Raises:
        ValueError, TypeError: for arguments out of range.

    Example:
        >>> rule = RNNProp()
        >>> params = {"weight": torch.randn(10, 3), "bias": torch.zeros(10)}
        >>> state = rule.init_state(params)
        >>> params, state = rule(params, {name: 2 * p for name, p in params.items()}, state)
    """

    title: ClassVar[str] = "RNNProp"
    takes_copies: ClassVar[bool] = True
    features: ClassVar[str] = "moments"
    head_stage: ClassVar[str] = "tanh"
    kept: ClassVar[str] = "moments"

    def __init__(
        self,
        hidden_size: int = 20,
        num_layers: int = 2,
        beta1: float = 0.95,
        beta2: float = 0.95,
        output_scale: float = -0.1,
        moment_first: bool = False,
        backend: str | None = None,
        *,
        precision: str = "highest",
        horizon: int | None = None,
        trained_on: str | None = None,
    ) -> None:
        head = (hidden_size, 1)
        super().__init__(
            hidden_size, num_layers, backend, precision, horizon, trained_on, inputs=MOMENTS_WIDTH, head=head
        )
        check_decays(beta1, beta2)
        check_scales(1.0, output_scale)
        if not isinstance(moment_first, bool):
            raise TypeError(f"moment_first must be a bool, got {moment_first!r}")
        self.beta1, self.beta2, self.output_scale = float(beta1), float(beta2), float(output_scale)
        self.moment_first = moment_first
        self.inputs = nn.Linear(2, MOMENTS_WIDTH)
        for layer in (self.inputs, self.head):
            nn.init.trunc_normal_(layer.weight, std=0.1, a=-0.2, b=0.2)
            nn.init.zeros_(layer.bias)

    def own_weights(self) -> list[Any]:
        """The cells' and the head's weights, then those of the first layer as one tensor [60]."""
        matrix = self.inputs.weight.flip(-1) if self.moment_first else self.inputs.weight
        return [*super().own_weights(), torch.cat([matrix.flatten(-2), self.inputs.bias], -1)]

    def stage_options(self) -> dict[str, Any]:
        """Decays and scale."""
        return {"beta1": self.beta1, "beta2": self.beta2, "head_scale": self.output_scale}

    def described(self) -> str:
        """Description for the model card."""
        return (
            "RNNProp (Lv et al. 2017, [arXiv 1703.03633](https://arxiv.org/abs/1703.03633)): a small LSTM, its weights "
            "shared by all coordinates, turns Adam's normalised gradient and moving mean into every parameter's update."
            f"\nIt has {self.num_layers} x {self.hidden_size} units, decays {self.beta1} and {self.beta2}, and its "
            f"update is {self.output_scale} times a tanh."
        )
