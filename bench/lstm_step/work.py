"""FLOPs and bytes of one coordinatewise-LSTM step: what its floors are counted from."""

from __future__ import annotations

HIDDEN, LAYERS, FEATURES = 20, 2, 2

#: Products of a backward step, in forward steps: gates recomputed, gradients of inputs, gradients of weights.
BACKWARD_FORWARDS = 3


def flops_per_coordinate() -> int:
    """Of the products and biases of one forward step: 2 · 4H · (inputs + H) + 4H a layer, 2H of the head."""
    cells = sum(2 * 4 * HIDDEN * ((FEATURES if layer == 0 else HIDDEN) + HIDDEN) for layer in range(LAYERS))
    return cells + LAYERS * 4 * HIDDEN + 2 * HIDDEN


def bytes_per_coordinate(state_bytes: int = 4) -> int:
    """Of one forward step in float32: h and c of every layer read and written, param read and written, grad read.

    ``state_bytes`` are those of one number of the state.
    """
    return state_bytes * 2 * 2 * LAYERS * HIDDEN + 4 * 3


def backward_bytes_per_coordinate(state_bytes: int = 4) -> int:
    """Of one backward step: state and the gradient of the new state read, the gradient of the state written.

    And of each coordinate: its gradient and that of the new param read, the gradient of the gradient written.
    """
    return state_bytes * 3 * 2 * LAYERS * HIDDEN + 4 * 3
