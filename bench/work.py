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


def inner_loop_forwards(support: int, query: int, steps: int, first_order: bool) -> int:
    """Forward passes of one sample to whose products those of a task's meta-iteration amount.

    A backward has two products for each one of the forward. An inner step is a forward and a backward, 3; of second
    order the outer backward goes back through both, twice 3 more, 9. The query set takes 3. What the first layer saves,
    whose input needs no gradient, is counted as if it were done.
    """
    return support * steps * (3 if first_order else 9) + 3 * query
