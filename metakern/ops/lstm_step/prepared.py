"""Fast small steps of lstm_step without a graph: weights are packed once and reused while they do not change.

For a few coordinates, the operator's overhead (dispatcher, checks of a dozen tensors, packing of the weights) takes
several times as long as the arithmetic.

Axis legend: N coordinates.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metakern.core.backend import _C, requested
from metakern.core.torch_private import (
    count_dispatch_modes,
    count_function_modes,
    forward_mode_is_active,
    func_is_active,
    is_jit_tracing,
)
from metakern.ops.lstm_step.reference import PREPROCESS, num_features
from metakern.ops.lstm_step.state import LAYOUT, TILE_LANES, LSTMState

#: Above this number of coordinates the operator's overhead is small, and it caches its results' memory.
MAX_COORDINATES = 2**15

_TENSORS = (Tensor, nn.Parameter)

#: Largest float32.
_LARGEST = torch.finfo(torch.float32).max

_shape_of = operator.attrgetter("shape")


class PreparedStep:
    """The packed weights of one rule, and its options.

    Serves plain float32 tensors on the CPU, outside transforms and tracing; the caller ensures that no graph is
    recorded. Every call compares the weights byte by byte with a copy of the packed ones, so stale weights are never
    used.

    Args:
        hidden_size: H
        num_layers: L
        options: preprocess, preprocess_scale and precision, as of :func:`metakern.ops.lstm_step`, checked
        copies: C; more than one: weights are [C, *shape], and each copy has N/C coordinates, a multiple of 32
    """

    __slots__ = ("_addresses", "_kernel", "_shapes", "_sizes", "_weights", "copies", "options")

    def __init__(self, hidden_size: int, num_layers: int, options: tuple[str, float, str], copies: int = 1) -> None:
        preprocess, preprocess_scale, _ = self.options = options  # the CPU has one precision
        index = PREPROCESS.index(preprocess)
        self._sizes = (num_layers, 2, hidden_size, TILE_LANES)
        shapes: list[tuple[int, ...]] = []
        for layer in range(num_layers):
            inputs = hidden_size if layer else num_features(preprocess)
            shapes += [
                (4 * hidden_size, inputs),
                (4 * hidden_size, hidden_size),
                (4 * hidden_size,),
                (4 * hidden_size,),
            ]
        shapes += [(1, hidden_size), (1,)]
        self.copies = copies
        self._shapes = [(copies, *shape) for shape in shapes] if copies > 1 else shapes
        self._weights: list[Tensor] = []
        self._addresses: list[int] = []
        self._kernel = _C.PreparedLstmStep(hidden_size, num_layers, index, preprocess_scale, copies)

    def __call__(
        self, params: Any, grads: Any, state: LSTMState, weights: Sequence[Tensor], output_scale: float
    ) -> tuple[Tensor, LSTMState] | None:
        """New params and state as of :func:`metakern.ops.lstm_step`; None for an unsupported call."""
        if not is_untouched() or not self._serves(params, grads, state, output_scale) or not self._knows(weights):
            return None
        data, n = state.data, state.num_coordinates
        new_params, new_data = torch.empty_like(params), torch.empty_like(data)
        old = params.data_ptr(), grads.data_ptr(), data.data_ptr()
        self._kernel.run(n, output_scale, *old, new_params.data_ptr(), new_data.data_ptr())
        return new_params, LSTMState(new_data, n)

    def step_(self, params: Any, grads: Any, state: LSTMState, weights: Sequence[Tensor], output_scale: float) -> bool:
        """:func:`metakern.ops.lstm_step_`; for an unsupported call returns False and does nothing."""
        if not is_untouched() or not self._serves(params, grads, state, output_scale) or not self._knows(weights):
            return False
        p, g, s = old = params.data_ptr(), grads.data_ptr(), state.data.data_ptr()
        size, state_size = params.nbytes, state.data.nbytes
        if (
            _overlap(p, size, s, state_size)
            or _overlap(g, size, s, state_size)
            or (p != g and _overlap(p, size, g, size))
        ):
            return False  # the operator says what is wrong
        self._kernel.run(state.num_coordinates, output_scale, *old, p, s)
        torch.autograd.graph.increment_version((params, state.data))  # autograd must detect overwritten saved values
        return True

    def _serves(self, params: Any, grads: Any, state: LSTMState, output_scale: Any) -> bool:
        data = state.data
        if type(output_scale) is not float or not -_LARGEST <= output_scale <= _LARGEST:
            return False
        if not (_is_plain(params) and _is_plain(grads) and _is_plain(data) and state.layout == LAYOUT):
            return False
        n = params.numel()
        if self.copies > 1 and n % (self.copies * TILE_LANES):
            return False  # the operator says what is wrong
        if not 0 < n <= MAX_COORDINATES or n != state.num_coordinates or grads.shape != params.shape:
            return False
        shape: tuple[int, ...] = data.shape
        return shape == (-(-n // TILE_LANES), *self._sizes)

    def _knows(self, weights: Sequence[Tensor]) -> bool:
        """Whether the kernel supports these weights; passes it their addresses if they changed.

        Identical objects with unchanged addresses, shapes and contiguity need no further checks, which would double
        the time. The kernel itself compares the weights' values.
        """
        known = self._weights
        if (
            len(known) == len(weights)
            and all(map(operator.is_, weights, known))
            and list(map(Tensor.data_ptr, weights)) == self._addresses
            and list(map(_shape_of, weights)) == self._shapes
            and all(map(Tensor.is_contiguous, weights))
        ):
            return True
        self._weights = []
        if not all(map(_is_plain, weights)) or list(map(_shape_of, weights)) != self._shapes:
            return False
        addresses = list(map(Tensor.data_ptr, weights))
        self._kernel.set_weights(addresses)
        self._weights, self._addresses = list(weights), addresses
        return True

    def __reduce__(self) -> tuple[type[PreparedStep], tuple[Any, ...]]:
        """Copies and pickles hold only the sizes and options, and pack the weights anew."""
        layers, _, hidden, _ = self._sizes
        return PreparedStep, (hidden, layers, self.options, self.copies)


def _overlap(a: int, a_size: int, b: int, b_size: int) -> bool:
    """Whether two memory ranges, given by address and bytes, overlap."""
    return a < b + b_size and b < a + a_size


def serves(backend: str | None) -> bool:
    """Whether the CPU kernels may serve a call with this ``backend``."""
    return _C is not None and requested(backend) in ("auto", "cpp")


def _is_plain(x: Any) -> bool:
    """Whether the kernel can read a tensor's memory directly: plain contiguous float32 on the CPU."""
    return type(x) in _TENSORS and x.dtype is torch.float32 and x.is_cpu and x.is_contiguous() and not x.is_neg()


def is_untouched() -> bool:
    """Whether no transform, mode or tracing is active."""
    return not (
        func_is_active()
        or count_dispatch_modes()
        or count_function_modes()
        or is_jit_tracing()
        or forward_mode_is_active()
        or torch.compiler.is_compiling()
    )
