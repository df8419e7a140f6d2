"""Steps of lstm_step without a graph, for a caller that keeps its weights: they are packed once while they stay.

The operator's way, through the dispatcher with checks of a dozen tensors and a packing of the weights, takes several
times as long as the arithmetic of a few coordinates.

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

#: With more coordinates the operator's way costs little beside the arithmetic, and its results' memory is kept.
MAX_COORDINATES = 2**15

_TENSORS = (Tensor, nn.Parameter)

#: Of float32.
_LARGEST = torch.finfo(torch.float32).max

_shape_of = operator.attrgetter("shape")


class PreparedStep:
    """The weights of one rule, packed, and its options.

    It serves plain float32 tensors on the CPU, outside of all that transforms or traces; the caller makes sure that no
    graph is recorded. Every call compares the weights, byte by byte, with a copy of those that are packed, so it never
    computes with weights of before.

    Args:
        hidden_size: H
        num_layers: L
        options: preprocess, preprocess_scale and precision, as of :func:`metakern.ops.lstm_step`, checked
    """

    __slots__ = ("_addresses", "_kernel", "_shapes", "_sizes", "_weights", "options")

    def __init__(self, hidden_size: int, num_layers: int, options: tuple[str, float, str]) -> None:
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
        self._shapes = [*shapes, (1, hidden_size), (1,)]
        self._weights: list[Tensor] = []
        self._addresses: list[int] = []
        self._kernel = _C.PreparedLstmStep(hidden_size, num_layers, index, preprocess_scale)

    def __call__(
        self, params: Any, grads: Any, state: LSTMState, weights: Sequence[Tensor], output_scale: float
    ) -> tuple[Tensor, LSTMState] | None:
        """New params and state as of :func:`metakern.ops.lstm_step`; None for a call that this does not serve."""
        if not is_untouched() or not self._serves(params, grads, state, output_scale) or not self._knows(weights):
            return None
        data, n = state.data, state.num_coordinates
        new_params, new_data = torch.empty_like(params), torch.empty_like(data)
        old = params.data_ptr(), grads.data_ptr(), data.data_ptr()
        self._kernel.run(n, output_scale, *old, new_params.data_ptr(), new_data.data_ptr())
        return new_params, LSTMState(new_data, n)

    def step_(self, params: Any, grads: Any, state: LSTMState, weights: Sequence[Tensor], output_scale: float) -> bool:
        """The step in place as of :func:`metakern.ops.lstm_step_`; False, and nothing done, where it does not serve."""
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
        torch.autograd.graph.increment_version((params, state.data))  # a graph that saved the old values must notice
        return True

    def _serves(self, params: Any, grads: Any, state: LSTMState, output_scale: Any) -> bool:
        data = state.data
        if type(output_scale) is not float or not -_LARGEST <= output_scale <= _LARGEST:
            return False
        if not (_is_plain(params) and _is_plain(grads) and _is_plain(data) and state.layout == LAYOUT):
            return False
        n = params.numel()
        if not 0 < n <= MAX_COORDINATES or n != state.num_coordinates or grads.shape != params.shape:
            return False
        shape: tuple[int, ...] = data.shape
        return shape == (-(-n // TILE_LANES), *self._sizes)

    def _knows(self, weights: Sequence[Tensor]) -> bool:
        """Whether the kernel has these weights' addresses, and they are such as it reads.

        Tensors that are the same objects at the same addresses, of the same shapes and in order, are what they were:
        it is half the time of looking at each of their properties. What lies there, the kernel compares itself.
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
        """A copy prepares for itself."""
        layers, _, hidden, _ = self._sizes
        return PreparedStep, (hidden, layers, self.options)


def _overlap(a: int, a_size: int, b: int, b_size: int) -> bool:
    """Whether two pieces of memory, by address and bytes, share a byte."""
    return a < b + b_size and b < a + a_size


def serves(backend: str | None) -> bool:
    """Whether the kernels of the CPU may serve a call that asks for ``backend``."""
    return _C is not None and requested(backend) in ("auto", "cpp")


def _is_plain(x: Any) -> bool:
    """Whether a tensor's memory is what it seems to be: dense float32 on the CPU, in order."""
    return type(x) in _TENSORS and x.dtype is torch.float32 and x.is_cpu and x.is_contiguous() and not x.is_neg()


def is_untouched() -> bool:
    """Whether nothing transforms, traces or replaces PyTorch's operators around the call."""
    return not (
        func_is_active()
        or count_dispatch_modes()
        or count_function_modes()
        or is_jit_tracing()
        or forward_mode_is_active()
        or torch.compiler.is_compiling()
    )
