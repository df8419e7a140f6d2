"""FLOPs and bytes of one step of a per-parameter MLP optimizer, for the compute and memory floors."""

from __future__ import annotations

from metakern.ops.mlp_update_step import TENSOR_FEATURES, TIME_FEATURES

#: FLOPs of backward, in multiples of forward: the network again, gradients of its inputs, and of its weights.
BACKWARD_FORWARDS = 3


def flops_per_coordinate(width: int, layers: int) -> int:
    """FLOPs of the products of the network as it is defined, with all 39 inputs."""
    return 2 * ((TENSOR_FEATURES + TIME_FEATURES) * width + (layers - 1) * width * width + 2 * width)


def bytes_per_coordinate() -> int:
    """Bytes of one forward step in float32, by three passes over memory: 72.

    Sums of squared gradients read g; the features' norms read g, θ, m (3) and v; the update reads them again and writes
    θ, m and v.
    """
    return 4 * (1 + 6 + 6 + 5)
