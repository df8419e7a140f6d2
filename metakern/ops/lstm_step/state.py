"""The coordinatewise LSTM's state in the kernels' layout: tiles of 32 coordinates.

Axis legend: N coordinates, H hidden units, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.core.torch_private import pytree

#: Coordinates per tile. Keep in step with tile_lanes in csrc/core/dtypes.h.
TILE_LANES = 32

#: Version of the layout; a state of another version is refused.
LAYOUT = 1

MAX_HIDDEN = 64
MAX_LAYERS = 3


@dataclass(frozen=True, eq=False)
class LSTMState:
    """Hidden and cell states of N coordinates, packed; make one with :func:`pack_state` or :meth:`zeros`.

    It is a pytree: it goes through ``torch.func`` transforms and ``torch.compile``.

    Attributes:
        data: [ceil(N/32), L, 2 (h, c), H, 32]; lanes after the last coordinate carry no meaning.
        num_coordinates: N
        layout: version of the layout

    Example:
        >>> state = LSTMState.zeros(100)
        >>> state.data.shape  # 100 coordinates in 4 tiles of 32
        torch.Size([4, 2, 2, 20, 32])
    """

    data: Tensor
    num_coordinates: int
    layout: int = LAYOUT

    @classmethod
    def zeros(
        cls,
        num_coordinates: int,
        *,
        hidden_size: int = 20,
        num_layers: int = 2,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> LSTMState:
        """The zero state.

        Raises:
            TypeError: for sizes that are not integers
            ValueError: for N < 0, H outside 1..64 or L outside 1..3
        """
        check_sizes(num_coordinates, hidden_size, num_layers)
        shape = (tiles(num_coordinates), num_layers, 2, hidden_size, TILE_LANES)
        return cls(torch.zeros(shape, dtype=dtype, device=device), num_coordinates)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.data.shape[-4]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.data.shape[-2]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the arithmetic and the weights: float64 for a float64 state, float32 otherwise."""
        return torch.float64 if self.data.dtype == torch.float64 else torch.float32

    def detach(self) -> LSTMState:
        """The same state, detached from the graph."""
        return LSTMState(self.data.detach(), self.num_coordinates, self.layout)

    def clone(self) -> LSTMState:
        """A copy with memory of its own."""
        return LSTMState(self.data.clone(), self.num_coordinates, self.layout)

    def to(self, *args: Any, **kwargs: Any) -> LSTMState:
        """The state on another device or in another dtype, as :meth:`torch.Tensor.to`."""
        return LSTMState(self.data.to(*args, **kwargs), self.num_coordinates, self.layout)


pytree.register_pytree_node(
    LSTMState,
    lambda state: ([state.data], (state.num_coordinates, state.layout)),
    lambda children, context: LSTMState(next(iter(children)), *context),
    serialized_type_name="metakern.ops.LSTMState",
)


def tiles(num_coordinates: int) -> int:
    """Number of tiles for N coordinates."""
    return (num_coordinates + TILE_LANES - 1) // TILE_LANES


def check_sizes(num_coordinates: int, hidden_size: int, num_layers: int) -> None:
    """Raise TypeError or ValueError for unsupported sizes."""
    bounds = (("N", num_coordinates, 0, None), ("hidden_size", hidden_size, 1, MAX_HIDDEN))
    for name, value, low, high in (*bounds, ("num_layers", num_layers, 1, MAX_LAYERS)):
        if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
        if value < low or (high is not None and value > high):
            raise ValueError(f"{name} must be {f'at least {low}' if high is None else f'{low} to {high}'}, got {value}")


def pack_state(h: Tensor, c: Tensor) -> LSTMState:
    """Pack hidden and cell states, each [L, N, H], into the kernels' layout. Differentiable.

    Raises:
        ValueError: for shapes that differ, are not three-dimensional or exceed 3 layers or 64 hidden units
        TypeError: for dtypes that differ or are not float32, float64 or bfloat16
        RuntimeError: for tensors on two devices

    Example:
        >>> state = pack_state(torch.zeros(2, 100, 20), torch.zeros(2, 100, 20))
        >>> h, c = unpack_state(state)
    """
    for name, x in (("h", h), ("c", c)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if h.device != c.device:
        raise RuntimeError(f"h and c must be on one device, got {h.device} and {c.device}")
    if h.dim() != 3 or h.shape != c.shape:
        raise ValueError(f"h and c must both have shape [L, N, H], got {list(h.shape)} and {list(c.shape)}")
    if h.dtype != c.dtype or h.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise TypeError(f"h and c must both be float32, float64 or bfloat16, got {h.dtype} and {c.dtype}")
    layers, n, hidden = h.shape
    check_sizes(n, hidden, layers)
    padding = tiles(n) * TILE_LANES - n
    both = F.pad(torch.stack([h, c]), (0, 0, 0, padding))  # [2, L, tiles * 32, H]
    tiled = both.reshape(2, layers, tiles(n), TILE_LANES, hidden)
    return LSTMState(tiled.permute(2, 1, 0, 4, 3).contiguous(), n)


def unpack_state(state: LSTMState) -> tuple[Tensor, Tensor]:
    """Hidden and cell states, each [L, N, H], of a packed state. Differentiable.

    Example:
        >>> h, c = unpack_state(LSTMState.zeros(100))
        >>> h.shape
        torch.Size([2, 100, 20])
    """
    check_layout(state)
    n = state.num_coordinates
    both = state.data.permute(2, 1, 0, 4, 3).reshape(2, state.num_layers, -1, state.hidden_size)
    return both[0, :, :n], both[1, :, :n]


def pack_rows(rows: Tensor, unit: int = TILE_LANES) -> Tensor:
    """Pack numbers of every coordinate, [..., N], into tiles [ceil(N/unit), ..., unit], with zeros at the end."""
    n = rows.shape[-1]
    count = -(-n // unit)
    padded = F.pad(rows, (0, count * unit - n))
    return padded.view(*rows.shape[:-1], count, unit).movedim(-2, 0).contiguous()


def unpack_rows(tiles: Tensor, num_coordinates: int) -> Tensor:
    """Unpack tiles [ceil(N/unit), ..., unit] to [..., N]; the inverse of :func:`pack_rows`."""
    return tiles.movedim(0, -2).flatten(-2)[..., :num_coordinates]


def check_layout(state: LSTMState) -> None:
    """Raise unless ``state`` is an LSTMState of this version whose shape agrees with its N."""
    if not isinstance(state, LSTMState):
        raise TypeError(f"state must be an LSTMState as pack_state makes it, got {type(state).__name__}")
    if state.layout != LAYOUT:
        raise ValueError(
            f"state has layout version {state.layout}, this metakern reads version {LAYOUT}; "
            "unpack it with the version that made it and pack it again"
        )
    if type(state.num_coordinates) is not int or state.num_coordinates < 0:
        check_sizes(state.num_coordinates, 1, 1)
    if not isinstance(state.data, Tensor):
        raise TypeError(f"state.data must be a tensor, got {type(state.data).__name__}")
    if state.data.layout != torch.strided:
        raise TypeError(f"state must be a dense tensor, got layout {state.data.layout}")
    shape = state.data.shape
    if len(shape) != 5 or shape[2] != 2 or shape[4] != TILE_LANES or shape[0] != tiles(state.num_coordinates):
        raise ValueError(
            f"state.data must have shape [{tiles(state.num_coordinates)}, L, 2, H, {TILE_LANES}] for "
            f"N = {state.num_coordinates}, got {list(shape)}"
        )
    if not (1 <= shape[1] <= MAX_LAYERS and 1 <= shape[3] <= MAX_HIDDEN):
        raise ValueError(
            f"state must have 1 to {MAX_LAYERS} layers and 1 to {MAX_HIDDEN} hidden units, "
            f"got {shape[1]} and {shape[3]}"
        )
