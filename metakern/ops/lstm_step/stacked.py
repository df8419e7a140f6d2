"""lstm_step_staged with several copies of the weights, in one launch without a gradient.

Axis legend: C copies of the weights, N coordinates of all of them; the rest as in ``staged.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metakern.ops.core.checks import check_value
from metakern.ops.core.define_op import define_op
from metakern.ops.core.stacking import count_copies, kernel_of_copies
from metakern.ops.lstm_step import PRECISION_INDEX, check_precision, check_scales, is_plain, reference
from metakern.ops.lstm_step.staged import COMPILED, OPTIONS, TENSORS, check_decays, lstm_step_staged
from metakern.ops.lstm_step.state import TILE_LANES, LSTMState, check_layout

stacked = define_op(
    f"lstm_step_stacked({TENSORS}, {OPTIONS}) -> (Tensor, Tensor, Tensor)",
    results=("new_params", "new_state", "new_stage_state"),
    shapes=lambda a: tuple(x.new_empty(x.shape) for x in (a.params, a.state, a.stage_state)),
    reference=reference.staged_step,
)


def lstm_step_stacked(
    params: Tensor,
    grads: Tensor,
    state: LSTMState,
    weights: Sequence[Tensor],
    *,
    features: str,
    head: str,
    stage_state: Tensor,
    coordinate_inputs: Tensor,
    features_scale: float = 10.0,
    beta1: float = 0.95,
    beta2: float = 0.95,
    head_scale: float = 0.1,
    precision: str = "highest",
    backend: str | None = None,
) -> tuple[Tensor, LSTMState, Tensor]:
    """:func:`metakern.ops.lstm_step_staged` for C copies of the weights, each with N/C coordinates of its own.

    On the CPU one launch without a gradient; where a gradient is recorded, under transforms and on a GPU a launch for
    each copy.

    Args:
        params: θ, N coordinates, those of the first copy first; N/C is a multiple of 32.
        grads: as ``params``.
        state: the packed (h, c) of the N coordinates.
        weights: [C, *shape] each, in the order of :func:`metakern.ops.lstm_step_staged`.
        features: as there, likewise all below.
        head: as there.
        stage_state: as there; without rows for stages without state.
        coordinate_inputs: as there; without rows for stages without inputs.
        features_scale: as there.
        beta1: as there.
        beta2: as there.
        head_scale: as there.
        precision: as there.
        backend: as there.

    Returns:
        as there

    Raises:
        ValueError, TypeError, RuntimeError: as there, and for an N that is no multiple of 32 C.
    """
    scalars = reference.Scalars(features_scale, beta1, beta2, head_scale)
    tensors = (params, grads, state.data, stage_state, coordinate_inputs, *weights)
    kernel = None
    if (features, head) in COMPILED and is_plain(params, grads, state, weights) and state.data.dtype != torch.bfloat16:
        kernel = kernel_of_copies(stacked, backend, tensors)
    if kernel is not None:
        check_scales(features_scale, head_scale, ("features_scale", "head_scale"))
        check_decays(beta1, beta2)
        check_precision(precision)
        places = list(reference.FEATURES).index(features), list(reference.HEADS).index(head)
        arguments = (params, grads, state.data, stage_state, coordinate_inputs, list(weights), *places)
        new, data, rows = kernel.call((*arguments, *map(float, scalars), PRECISION_INDEX[precision]))
        return new, LSTMState(data, state.num_coordinates), rows
    options = {"features": features, "head": head, "precision": precision, "backend": backend, **scalars._asdict()}
    return _one_by_one(params, grads, state, weights, stage_state, coordinate_inputs, options)


def _one_by_one(
    params: Tensor,
    grads: Tensor,
    state: LSTMState,
    weights: Sequence[Tensor],
    stage_state: Tensor,
    coordinate_inputs: Tensor,
    options: dict[str, Any],
) -> tuple[Tensor, LSTMState, Tensor]:
    """A launch for each copy."""
    check_layout(state)
    copies, total = count_copies(weights), params.numel()
    check_value(
        copies > 0 and total % (copies * TILE_LANES) == 0,
        *("params must hold the same number of coordinates for each of ", copies),
        *(" copies of the weights, a multiple of ", TILE_LANES, ", got ", total, " in all"),
    )
    n = total // copies
    runs = (
        *(x.reshape(copies, n).unbind() for x in (params, grads)),
        *(x.unflatten(0, (copies, n // TILE_LANES)).unbind() for x in (state.data, stage_state)),
        coordinate_inputs.unflatten(-1, (copies, n)).unbind(-2),
    )
    steps = [
        lstm_step_staged(p, g, LSTMState(s, n), w, stage_state=e, coordinate_inputs=k, **options)
        for p, g, s, e, k, w in zip(*runs, zip(*weights, strict=True), strict=True)
    ]
    new, states, rows = zip(*steps, strict=True)
    data = torch.cat([s.data for s in states])
    return torch.cat(new).view(params.shape), LSTMState(data, total), torch.cat(rows)
