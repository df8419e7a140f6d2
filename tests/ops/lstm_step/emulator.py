"""The CUDA kernels of lstm_step run on the CPU, thread by thread.

Axis legend: N coordinates, F features (1 or 2), H hidden units, L layers.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metakern.ops import LSTMState
from metakern.ops.lstm_step import reference
from tests.cuda.device import DEVICE, DTYPES, Device, Guarded, Library

PRECISIONS = ("highest", "high", "medium")
MAX_WEIGHTS = 16
FEATURES, HEADS = list(reference.FEATURES.values()), list(reference.HEADS.values())

#: Heads that add to the params, whose gradient is then that of the new params.
ADDITIVE = ("add", "tanh")

#: Indices of the features and of the head, the features' scale, beta1, beta2, the head's scale, index of the precision.
Options = tuple[int, int, float, float, float, float, int]


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


def _arguments(*names: str) -> type[ctypes.Structure]:
    """A structure of pointers; names of weights stand for arrays of them."""
    fields = [(name, _Pointers if name.endswith("weights") else ctypes.c_void_p) for name in names]
    return type("Arguments", (ctypes.Structure,), {"_fields_": fields})


#: The structures of csrc/lstm_step/cuda.h.
_Forward = _arguments(
    *("weights", "params", "grads", "state", "new_params", "new_state"),
    *("stage_state", "coordinate_inputs", "new_stage_state"),
)
_Backward = _arguments(
    *("weights", "grads", "state", "grad_new_params", "grad_new_state"),
    *("grad_grads", "grad_state", "grad_weights", "workspace"),
    *("stage_state", "coordinate_inputs", "params", "grad_new_stage_state"),
    *("grad_params", "grad_stage_state", "grad_coordinate_inputs"),
)


def _problem(grads: Tensor, state: Tensor, options: Options) -> _Problem:
    features, head, features_scale, beta1, beta2, head_scale, precision = options
    first, last = FEATURES[features], HEADS[head]
    rows = first.states + last.states, first.coordinate_inputs + last.coordinate_inputs
    return _Problem(
        *(grads.numel(), state.shape[3], state.shape[1], features, head),
        _StageSizes(first.inputs, last.outputs, *rows, first.weights, last.weights),
        *(features_scale, beta1, beta2, head_scale, precision),
        *(DTYPES.index(grads.dtype), DTYPES.index(state.dtype)),
    )


def _plain(options: dict[str, Any], precision: str) -> Options:
    """The options of lstm_step as those of lstm_step_staged."""
    preprocess = reference.PREPROCESS.index(options["preprocess"])
    scales = options["preprocess_scale"], 0.0, 0.0, options["output_scale"]
    return preprocess, 0, *scales, PRECISIONS.index(precision)


class Emulator:
    """The operators, as torch.ops.metakern has them, on the emulated device."""

    def __init__(self) -> None:
        self._library = Library("lstm_step")
        self._library.functions.workspace_bytes.restype = ctypes.c_int64

    def _forward(
        self,
        inputs: dict[str, Tensor],
        weights: Sequence[Tensor],
        options: Options,
        device: Device,
        in_place: bool,
    ) -> tuple[Tensor, ...]:
        """The new params, state and, if it is among the inputs, stage state."""
        memory = Guarded()
        weights = [memory.copy(w) for w in weights]
        changing = [name for name in ("params", "state", "stage_state") if name in inputs]
        problem = _problem(inputs["grads"], inputs["state"], options)
        outputs = {f"new_{name}": inputs[name] for name in changing}
        if not in_place:
            inputs = {name: memory.copy(x) for name, x in inputs.items()}
            outputs = {name: memory.like(x) for name, x in outputs.items()}
        arguments = _Forward(weights=_pointers(weights), **_addresses(inputs | outputs))
        self._library.call("forward", device, ctypes.byref(problem), ctypes.byref(arguments))
        memory.check()
        return tuple(outputs.values())

    def _backward(
        self,
        inputs: dict[str, Tensor],
        wanted: Sequence[str],
        weights: Sequence[Tensor],
        options: Options,
        device: Device,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients of the ``wanted`` inputs and of the weights."""
        memory = Guarded()
        problem = _problem(inputs["grads"], inputs["state"], options)
        inputs = {name: memory.copy(x) for name, x in inputs.items()}
        outputs = {f"grad_{name}": memory.like(inputs[name]) for name in wanted}
        weights = [memory.copy(w) for w in weights]
        grad_weights = [memory.like(w) for w in weights]
        size = self._library.functions.workspace_bytes(ctypes.byref(problem))
        outputs["workspace"] = memory.like(torch.empty(size, dtype=torch.uint8))
        lists = {"weights": _pointers(weights), "grad_weights": _pointers(grad_weights)}
        arguments = _Backward(**lists, **_addresses(inputs | outputs))
        self._library.call("backward", device, ctypes.byref(problem), ctypes.byref(arguments))
        memory.check()
        return [outputs[f"grad_{name}"] for name in wanted], grad_weights

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
        inputs = {"params": params, "grads": grads, "state": state.data}
        new_params, new_state = self._forward(inputs, weights, _plain(options, precision), device, in_place)
        return new_params, LSTMState(new_state, state.num_coordinates)

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
        inputs = {"grads": grads, "state": state, "grad_new_params": grad_new_params, "grad_new_state": grad_new_state}
        found, of_weights = self._backward(inputs, ("grads", "state"), weights, _plain(options, precision), device)
        return (*found, of_weights)

    def lstm_step_staged(
        self,
        params: Tensor,
        grads: Tensor,
        state: Tensor,
        stage_state: Tensor,
        coordinate_inputs: Tensor,
        weights: Sequence[Tensor],
        *options: Any,
        device: Device = DEVICE,
        in_place: bool = False,
    ) -> tuple[Tensor, ...]:
        """The operator of this name, or the one in place."""
        inputs = {"params": params, "grads": grads, "state": state}
        inputs |= {"stage_state": stage_state, "coordinate_inputs": coordinate_inputs}
        return self._forward(inputs, weights, options, device, in_place)

    def lstm_step_staged_backward(
        self,
        grad_new_params: Tensor,
        grad_new_state: Tensor,
        grad_new_stage_state: Tensor,
        params: Tensor,
        grads: Tensor,
        state: Tensor,
        stage_state: Tensor,
        coordinate_inputs: Tensor,
        weights: Sequence[Tensor],
        *options: Any,
        device: Device = DEVICE,
    ) -> tuple[Any, ...]:
        """The operator of this name."""
        inputs = {"grad_new_params": grad_new_params, "grad_new_state": grad_new_state}
        inputs |= {"grad_new_stage_state": grad_new_stage_state, "params": params, "grads": grads, "state": state}
        inputs |= {"stage_state": stage_state, "coordinate_inputs": coordinate_inputs}
        wanted = ("params", "grads", "state", "stage_state", "coordinate_inputs")
        (of_params, *found), of_weights = self._backward(inputs, wanted, weights, options, device)
        if list(reference.HEADS)[options[1]] in ADDITIVE:  # their gradient is the operator's own to copy
            assert of_params.isnan().all(), "the kernels wrote a gradient that is not theirs"
            of_params = grad_new_params
        return (of_params, *found, of_weights)


def _addresses(tensors: dict[str, Tensor]) -> dict[str, int]:
    return {name: x.data_ptr() for name, x in tensors.items()}


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return _Pointers(*(x.data_ptr() for x in tensors))


@functools.cache
def kernels() -> Emulator:
    """Built once."""
    return Emulator()
