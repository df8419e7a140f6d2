"""The CUDA kernels of lstm_step run on the CPU, thread by thread.

Axis legend: N coordinates, F features (1 or 2), H hidden units, L layers.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from metakern.ops import LSTMState
from metakern.ops.lstm_step import reference
from tests.cuda.device import DEVICE, DTYPES, Device, Guarded, Library

PRECISIONS = ("highest", "high", "medium")
MAX_WEIGHTS = 16


class _StageSizes(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int)
        for name in ("inputs", "outputs", "states", "coordinate_inputs", "features_weights", "head_weights")
    )


class _Problem(ctypes.Structure):
    _fields_ = (
        ("num_coordinates", ctypes.c_int64),
        ("hidden_size", ctypes.c_int),
        ("num_layers", ctypes.c_int),
        ("features", ctypes.c_int),
        ("head", ctypes.c_int),
        ("stages", _StageSizes),
        ("preprocess_scale", ctypes.c_double),
        ("beta1", ctypes.c_double),
        ("beta2", ctypes.c_double),
        ("output_scale", ctypes.c_double),
        ("precision", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("state_dtype", ctypes.c_int),
    )


_Pointers = ctypes.c_void_p * MAX_WEIGHTS


class _Forward(ctypes.Structure):
    _fields_ = (
        ("weights", _Pointers),
        ("params", ctypes.c_void_p),
        ("grads", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
        ("new_params", ctypes.c_void_p),
        ("new_state", ctypes.c_void_p),
    )


class _Backward(ctypes.Structure):
    _fields_ = (
        ("weights", _Pointers),
        ("grads", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
        ("grad_new_params", ctypes.c_void_p),
        ("grad_new_state", ctypes.c_void_p),
        ("grad_grads", ctypes.c_void_p),
        ("grad_state", ctypes.c_void_p),
        ("grad_weights", _Pointers),
        ("workspace", ctypes.c_void_p),
    )


class Emulator:
    """The operators, as torch.ops.metakern has them, on the emulated device."""

    def __init__(self) -> None:
        self._library = Library("lstm_step")
        self._library.functions.workspace_bytes.restype = ctypes.c_int64

    @staticmethod
    def _problem(grads: Tensor, state: Tensor, options: dict[str, object], precision: str) -> _Problem:
        preprocess = str(options["preprocess"])
        return _Problem(
            grads.numel(),
            state.shape[3],
            state.shape[1],
            reference.PREPROCESS.index(preprocess),
            0,
            _StageSizes(reference.num_features(preprocess), 1, 0, 0, 0, 0),
            options["preprocess_scale"],
            *(0.0, 0.0),  # betas
            options["output_scale"],
            PRECISIONS.index(precision),
            DTYPES.index(grads.dtype),
            DTYPES.index(state.dtype),
        )

    def forward(
        self,
        params: Tensor,
        grads: Tensor,
        state: LSTMState,
        weights: Sequence[Tensor],
        options: dict[str, object],
        *,
        precision: str = "highest",
        device: Device = DEVICE,
        in_place: bool = False,
    ) -> tuple[Tensor, LSTMState]:
        """New params [N] and new state; the arguments themselves if ``in_place``."""
        memory = Guarded()
        problem = self._problem(grads, state.data, options, precision)
        weights = [memory.copy(w) for w in weights]
        inputs = [params, grads, state.data]
        outputs = [params, state.data]
        if not in_place:
            inputs, outputs = [memory.copy(x) for x in inputs], [memory.like(x) for x in outputs]
        arguments = _Forward(_pointers(weights), *(x.data_ptr() for x in [*inputs, *outputs]))
        self._library.call("forward", device, ctypes.byref(problem), ctypes.byref(arguments))
        memory.check()
        return outputs[0], LSTMState(outputs[1], state.num_coordinates)

    def backward(
        self,
        grad_new_params: Tensor,
        grad_new_state: Tensor,
        grads: Tensor,
        state: Tensor,
        weights: Sequence[Tensor],
        options: dict[str, object],
        *,
        precision: str = "highest",
        device: Device = DEVICE,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Gradients of grads [N], of the packed state and of every weight."""
        memory = Guarded()
        problem = self._problem(grads, state, options, precision)
        inputs = [memory.copy(x) for x in (grads, state, grad_new_params, grad_new_state)]
        outputs = [memory.like(x) for x in (grads, state)]
        weights = [memory.copy(w) for w in weights]
        grad_weights = [memory.like(w) for w in weights]
        size = self._library.functions.workspace_bytes(ctypes.byref(problem))
        workspace = memory.like(torch.empty(size, dtype=torch.uint8))
        pointers = (x.data_ptr() for x in [*inputs, *outputs])
        arguments = _Backward(_pointers(weights), *pointers, _pointers(grad_weights), workspace.data_ptr())
        self._library.call("backward", device, ctypes.byref(problem), ctypes.byref(arguments))
        memory.check()
        return outputs[0], outputs[1], grad_weights


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return _Pointers(*(x.data_ptr() for x in tensors))


@functools.cache
def kernels() -> Emulator:
    """Built once."""
    return Emulator()
