"""Networks of the comparison that ``nn.Sequential`` cannot describe; without randomness or running statistics.

Axis legend: B samples, S steps of a sequence, H hidden units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from metakern.tasks.general import fully_connected

#: Side of a digit's image in pixels.
SIDE = 8


class Residual(nn.Module):
    """Blocks x + Linear(gelu(LayerNorm(x))) between two linear layers."""

    def __init__(self, inputs: int, width: int, blocks: int, outputs: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(inputs, width), nn.Linear(width, outputs)
        block = [nn.Sequential(nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width)) for _ in range(blocks)]
        self.blocks = nn.ModuleList(block)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [B, outputs] of inputs [B, inputs]."""
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        outputs: Tensor = self.last(x)
        return outputs


class RowGRU(nn.Module):
    """Gated recurrent unit that reads an image row by row; vmap does not support ``nn.GRU``."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.row, self.hidden = nn.Linear(SIDE, 3 * hidden_size), nn.Linear(hidden_size, 3 * hidden_size)
        self.head = nn.Linear(hidden_size, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 64]."""
        rows = self.row(images.unflatten(1, (SIDE, SIDE)))
        h = torch.zeros_like(rows[:, 0, : self.head.in_features])
        for row in rows.unbind(1):
            (ir, iz, inew), (hr, hz, hnew) = row.chunk(3, 1), self.hidden(h).chunk(3, 1)
            z = torch.sigmoid(iz + hz)
            h = z * h + (1 - z) * torch.tanh(inew + torch.sigmoid(ir + hr) * hnew)
        logits: Tensor = self.head(h)
        return logits


class RowAttention(nn.Module):
    """Transformer block over the eight rows of an image: two heads of attention, then a feed-forward layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.row, self.place = nn.Linear(SIDE, width), nn.Linear(SIDE, width, bias=False)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.join = nn.Linear(width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 64]."""
        places = torch.eye(SIDE, dtype=images.dtype, device=images.device)
        x = self.row(images.unflatten(1, (SIDE, SIDE))) + self.place(places)
        y = self.norms[0](x)
        q, k, v = (layer(y).unflatten(2, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)
        x = x + self.join((weights @ v).transpose(1, 2).flatten(2))
        x = x + self.narrow(torch.nn.functional.gelu(self.wide(self.norms[1](x))))
        logits: Tensor = self.head(self.norms[2](x).mean(1))
        return logits


class Characters(nn.Module):
    """Recurrent network that predicts the character after S characters, given as their numbers."""

    def __init__(self, characters: int, hidden_size: int) -> None:
        super().__init__()
        self.characters = characters
        self.embedding = nn.Linear(characters, hidden_size)
        self.recurrent, self.head = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, characters)

    def forward(self, text: Tensor) -> Tensor:
        """Logits [B, characters] of numbers [B, S]."""
        known = torch.arange(self.characters, device=text.device)
        steps = self.embedding((text.unsqueeze(2) == known).float())
        h = torch.zeros_like(steps[:, 0])
        for step in steps.unbind(1):
            h = torch.tanh(step + self.recurrent(h))
        logits: Tensor = self.head(h)
        return logits


class Picture(nn.Module):
    """Colours [B, 3] of points [B, 2] of a picture, by sines and cosines of the coordinates and a small network."""

    def __init__(self, octaves: int, width: int) -> None:
        super().__init__()
        self.octaves = octaves
        self.layers = fully_connected(4 * octaves, width, width, 3, activation=nn.SiLU)

    def forward(self, points: Tensor) -> Tensor:
        """Colours of points in [-1, 1]²."""
        scaled = torch.cat([2**octave * torch.pi * points for octave in range(self.octaves)], 1)
        colours: Tensor = self.layers(torch.cat([scaled.sin(), scaled.cos()], 1))
        return colours
