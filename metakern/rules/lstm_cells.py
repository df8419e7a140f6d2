"""Base class of rules around LSTM cells: sizes, weights, backend."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metakern.core.backend import check_backend
from metakern.ops import LSTMState
from metakern.ops.lstm_step import check_precision, prepare
from metakern.ops.lstm_step.state import TILE_LANES, check_sizes
from metakern.rules.coordinatewise import CoordinatewiseRule
from metakern.rules.lstm_modules import LSTMWeights
from metakern.rules.protocol import check_training


class LSTMCells(CoordinatewiseRule):
    """Stacked LSTM cells shared by all coordinates, and a linear head; base of the rules that run in fused kernels.

    Args:
        hidden_size: H, 1 to 64
        num_layers: L, 1 to 3
        backend: ``"auto"``, ``"cpp"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None is ``"auto"``
        precision: of the products, ``"highest"``, ``"high"`` or ``"medium"``, as in :func:`metakern.ops.lstm_step`
        horizon: steps that the rule was meta-trained for, or None
        trained_on: description of the meta-training tasks, or None
        inputs: F, features of the lowest cell
        head: inputs and outputs of the head
    """

    unit: ClassVar[int] = TILE_LANES
    optional_options: ClassVar[tuple[str, ...]] = ("precision", "backend", *CoordinatewiseRule.optional_options)

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        backend: str | None,
        precision: str,
        horizon: int | None,
        trained_on: str | None,
        *,
        inputs: int,
        head: tuple[int, int],
    ) -> None:
        super().__init__()
        check_sizes(0, hidden_size, num_layers)
        check_precision(precision)
        check_backend(backend)
        prepare(backend)
        check_training(horizon, trained_on)
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.backend, self.precision = backend, precision
        self.horizon, self.trained_on = horizon, trained_on
        self.lstm = LSTMWeights(inputs, hidden_size, num_layers)
        self.head = nn.Linear(*head)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.head.weight.device  # the base class visits all modules, which takes as long as a small step

    def own_weights(self) -> list[Any]:
        """The weights in the order of the operator, in their own dtype."""
        # In order of registration. Neither parameters() nor attributes: small steps would notice them.
        modules: Any = self._modules
        return [*modules["lstm"]._parameters.values(), *modules["head"]._parameters.values()]

    def weights(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The weights in the order of the operator, cast to ``dtype`` (differentiably) if given."""
        weights = self.own_weights()
        return weights if dtype is None or dtype == weights[0].dtype else [w.to(dtype) for w in weights]

    def zero_cells(self, number: int, dtype: torch.dtype, device: torch.device | None) -> LSTMState:
        """The zero (h, c) of N coordinates."""
        sizes = {"hidden_size": self.hidden_size, "num_layers": self.num_layers}
        return LSTMState.zeros(number, **sizes, dtype=dtype, device=device)
