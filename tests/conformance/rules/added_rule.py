"""Example of a user's rule around the LSTM: this file, and a row in the suite."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from metakern.rules import register
from metakern.rules.lstm_rule import LSTMRule


@register
class NormalisedLSTM(LSTMRule):
    """The LSTM's step along g/√(v + 1e-8), where v' = d·v + (1−d)·g² is the mean square of a coordinate's gradients."""

    title = "Normalised LSTM"
    beside = ("square",)
    decay = 0.9

    def step_coordinates(
        self, params: Tensor, grads: Tensor, state: dict[str, Tensor], loss: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of params [N]; v is packed, [ceil(N/32), 32]."""
        old = state["square"]
        g = F.pad(grads, (0, old.numel() - grads.numel())).view_as(old).to(old.dtype)
        square = self.decay * old + (1 - self.decay) * g * g
        scaled = (g / (square + 1e-8).sqrt()).view(-1)[: grads.numel()]
        new, tiles = self.step_lstm(params, scaled.to(grads.dtype), state["lstm"])
        return new, {"lstm": tiles, "square": square}
