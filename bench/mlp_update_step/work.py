"""FLOPs and bytes of one step of a per-parameter MLP optimizer, for the compute and memory floors."""

from __future__ import annotations

from metakern.ops.mlp_update_step import TENSOR_FEATURES, TIME_FEATURES

#: FLOPs of backward, in multiples of forward: the network again, gradients of its inputs, and of its weights.
BACKWARD_FORWARDS = 3


def flops_per_coordinate(width: int, layers: int) -> int:
    """FLOPs of the products of the network as it is defined, with all 39 inputs."""
    return 2 * ((TENSOR_FEATURES + TIME_FEATURES) * width + (layers - 1) * width * width + 2 * width)


def bytes_per_coordinate() -> int:
    """Bytes that one forward step in float32 must move: 44.

    It reads g, θ, m (3) and v, and writes θ, m and v. Tensors that no cache holds take 28 more: the sums of squared
    gradients, then the features' norms must be complete before the network (bench/NOTES.md).
    """
    return 4 * (6 + 5)
