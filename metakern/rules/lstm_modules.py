"""LSTM weights: a torch.compile-compatible module, and extraction from users' nn.LSTM and nn.LSTMCell modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class LSTMWeights(nn.Module):
    """The weights of an ``nn.LSTM``, with its names and initialization; torch.compile refuses ``nn.LSTM`` itself.

    Per layer k: weight_ih_lk [4H, F or H], weight_hh_lk [4H, H], bias_ih_lk [4H], bias_hh_lk [4H], U(±1/√H).
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        bound = hidden_size**-0.5
        for layer in range(num_layers):
            shapes = {
                "weight_ih": (4 * hidden_size, hidden_size if layer else input_size),
                "weight_hh": (4 * hidden_size, hidden_size),
                "bias_ih": (4 * hidden_size,),
                "bias_hh": (4 * hidden_size,),
            }
            for name, shape in shapes.items():
                weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
                self.register_parameter(f"{name}_l{layer}", weight)


def lstm_weights(lstm: Any) -> tuple[list[nn.LSTM | nn.LSTMCell], dict[str, Tensor]]:
    """The LSTM modules, and their weights under nn.LSTM's names."""
    if isinstance(lstm, nn.LSTM):
        for name in ("bidirectional", "proj_size", "dropout"):
            if value := getattr(lstm, name):
                raise ValueError(f"lstm must have {name}={type(value)(0)}, got {name}={value}")
        return [lstm], dict(lstm.named_parameters())
    cells = list(lstm) if isinstance(lstm, (Sequence, nn.ModuleList)) else [lstm]
    if not cells:
        raise ValueError("lstm must be an nn.LSTM or a non-empty sequence of nn.LSTMCell, got an empty sequence")
    for cell in cells:
        if not isinstance(cell, nn.LSTMCell) or cell is lstm:
            raise TypeError(f"lstm must be an nn.LSTM or a sequence of nn.LSTMCell, got {type(cell).__name__}")
    return cells, {f"{n}_l{layer}": p for layer, cell in enumerate(cells) for n, p in cell.named_parameters()}
