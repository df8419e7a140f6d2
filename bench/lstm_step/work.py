"""FLOPs and bytes of one coordinatewise-LSTM step, for the compute and memory floors."""

from __future__ import annotations

HIDDEN, LAYERS, FEATURES = 20, 2, 2

#: FLOPs of a backward step, in multiples of forward: recomputed gates, input gradients, weight gradients.
BACKWARD_FORWARDS = 3


def flops_per_coordinate() -> int:
    """FLOPs of products and biases of one forward step: 2 · 4H · (inputs + H) + 4H per layer, 2H for the head."""
    cells = sum(2 * 4 * HIDDEN * ((FEATURES if layer == 0 else HIDDEN) + HIDDEN) for layer in range(LAYERS))
    return cells + LAYERS * 4 * HIDDEN + 2 * HIDDEN


def bytes_per_coordinate(state_bytes: int = 4) -> int:
    """Bytes of one forward step in float32: h and c of every layer read and written, param read and written, grad read.

    ``state_bytes`` is the size of one number of the state.
    """
    return state_bytes * 2 * 2 * LAYERS * HIDDEN + 4 * 3


def backward_bytes_per_coordinate(state_bytes: int = 4) -> int:
    """Bytes of one backward step: state and the gradient of the new state read, the gradient of the state written.

    Also, per coordinate: grad and the gradient of the new param read, the gradient of grad written.
    """
    return state_bytes * 3 * 2 * LAYERS * HIDDEN + 4 * 3
