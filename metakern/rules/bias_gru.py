"""The GRU of the hierarchical RNN: the reset gate is applied before the product, and other levels add to its biases.

Wichrowska et al. 2017, arXiv 1703.04813. ``nn.GRUCell`` differs: it resets W_h h instead of h.

Axis legend: I inputs, H hidden units.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Initial bias of both gates.
GATES_BIAS = 2.2

#: Weights are drawn with a standard deviation of this over √fan_in.
WEIGHT_SCALE = 0.5


class BiasGRU(nn.Module):
    """r, u = σ(W_g [x; h] + b_g + bias), c = tanh(W_c [x; r h] + b_c + bias), h' = u h + (1 - u) c.

    Args:
        input_size: I
        hidden_size: H

    Attributes:
        gates_weight: W_g [2H, I + H], rows r then u, columns x then h
        gates_bias: b_g [2H]
        candidate_weight: W_c [H, I + H]
        candidate_bias: b_c [H]
        initial: the learned initial h [H]
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        columns = input_size + hidden_size
        self.gates_weight = nn.Parameter(drawn(2 * hidden_size, columns))
        self.gates_bias = nn.Parameter(torch.full((2 * hidden_size,), GATES_BIAS))
        self.candidate_weight = nn.Parameter(drawn(hidden_size, columns))
        self.candidate_bias = nn.Parameter(torch.zeros(hidden_size))
        self.initial = nn.Parameter(torch.empty(hidden_size).uniform_(-1, 1))

    def forward(self, x: Tensor, h: Tensor, bias: Tensor | None = None) -> Tensor:
        """One step, in the dtype of ``h``.

        Args:
            x: [..., I]
            h: [..., H]
            bias: [..., 3H], added to the pre-activations of r, u and c; None adds nothing

        Returns:
            h' [..., H]
        """
        dtype = h.dtype
        gates = linear(torch.cat([x, h], -1), self.gates_weight.to(dtype), self.gates_bias.to(dtype))
        if bias is not None:
            of_gates, of_candidate = bias.split([2 * self.hidden_size, self.hidden_size], -1)
            gates = gates + of_gates
        r, u = gates.sigmoid().chunk(2, -1)
        weight, own = self.candidate_weight.to(dtype), self.candidate_bias.to(dtype)
        candidate = linear(torch.cat([x, r * h], -1), weight, own)
        if bias is not None:
            candidate = candidate + of_candidate
        new: Tensor = u * h + (1 - u) * candidate.tanh()
        return new

    def biases(self) -> Tensor:
        """b_g and b_c in one tensor [3H]."""
        return torch.cat([self.gates_bias, self.candidate_bias], -1)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{self.input_size}, {self.hidden_size}"


class Affine(nn.Linear):
    """A linear map between levels, in the dtype of its input: weights as :func:`drawn`, biases zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        with torch.no_grad():
            self.weight.copy_(drawn(outputs, inputs))
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """The map of x [..., inputs] to [..., outputs]."""
        return linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """W x + b of x [..., I], with W [O, I] and b [O]; of x [..., T, I] also with W [T, O, I] and b [T, O]."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, *x.shape[-2:]).transpose(0, 1)  # [T, rows, I]
    out = torch.baddbmm(bias.unsqueeze(1), rows, weight.transpose(1, 2))
    return out.transpose(0, 1).reshape(*x.shape[:-1], weight.shape[1])


def drawn(*shape: int) -> Tensor:
    """Weights drawn from N(0, (0.5/√fan_in)²), fan_in the last axis."""
    return torch.randn(shape) * (WEIGHT_SCALE / math.sqrt(shape[-1]))
