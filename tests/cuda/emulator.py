"""The CUDA kernels of lstm_step run on the CPU, thread by thread: builds tests/cuda/emulation and calls it by ctypes.

Axis legend: N coordinates, F features (1 or 2), H hidden units, L layers.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from metakern.ops import LSTMState
from metakern.reference import lstm_step as reference

ROOT = Path(__file__).parents[2]
EMULATION = ROOT / "tests" / "cuda" / "emulation"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PRECISIONS = ("highest", "high", "medium")
ORDERS = ("forward", "reverse", "shuffled")
MAX_WEIGHTS = 14


class EmulationError(RuntimeError):
    """A launcher of the emulated device returned an error."""

    def __init__(self, error: int, call: str, report: str) -> None:
        super().__init__(f"error {error} of {call}{': ' + report if report else ''}")
        self.error = error
        self.call = call
        self.report = report


class _Device(ctypes.Structure):
    _fields_ = (
        ("ordinal", ctypes.c_int),
        ("multiprocessors", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
        ("order", ctypes.c_int),
        ("seed", ctypes.c_uint32),
        ("eager_copies", ctypes.c_bool),
        ("fail_call", ctypes.c_int),
        ("failure", ctypes.c_int),
    )


class _Problem(ctypes.Structure):
    _fields_ = (
        ("num_coordinates", ctypes.c_int64),
        ("hidden_size", ctypes.c_int),
        ("num_layers", ctypes.c_int),
        ("preprocess", ctypes.c_int),
        ("num_features", ctypes.c_int),
        ("preprocess_scale", ctypes.c_double),
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


def build(name: str, sources: Iterable[str], depends: Iterable[Path] = ()) -> Path:
    """Compile sources of tests/cuda/emulation into a shared library; kept under build/ until a source changes."""
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-std=c++17", "-O2", "-g", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    command += ["-U_FORTIFY_SOURCE"]  # its longjmp takes a jump to another stack for an error
    command += [f"-I{EMULATION}", *(str(EMULATION / source) for source in sources)]
    digest = hashlib.sha256(" ".join(command).encode())
    for path in sorted([*EMULATION.iterdir(), *depends]):
        digest.update(path.name.encode() + path.read_bytes())
    library = ROOT / "build" / "emulation" / f"{name}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        for old in library.parent.glob(f"{name}-*.so"):
            old.unlink(missing_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        result = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"the emulated kernels do not compile:\n{' '.join(command)}\n{result.stderr}")
        partial.rename(library)
    return library


@dataclass(frozen=True)
class Device:
    """What the emulated device offers. Ordinals from 64 on are never cached by the launchers."""

    multiprocessors: int = 3
    shared_kilobytes: int = 227
    order: str = "forward"
    seed: int = 0
    eager_copies: bool = False
    fail_call: int = 0
    failure: int = 0
    ordinal: int = 64

    def structure(self) -> _Device:
        """As the emulation wants it."""
        order, shared = ORDERS.index(self.order), self.shared_kilobytes * 1024
        fields = (self.ordinal, self.multiprocessors, shared, order, self.seed, self.eager_copies)
        return _Device(*fields, self.fail_call, self.failure)


DEVICE = Device()


class _Guarded:
    """Copies of tensors, and new ones, between NaNs: reads beside them show in results, writes are found."""

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, int]] = []

    def copy(self, tensor: Tensor) -> Tensor:
        """The same values."""
        return self.like(tensor).copy_(tensor)

    def like(self, tensor: Tensor) -> Tensor:
        """The same shape and dtype, all NaN."""
        margin, size = 256, tensor.numel() * tensor.element_size()
        buffer = torch.full((margin + size + margin,), 0xFF, dtype=torch.uint8)
        self._buffers.append((buffer, size))
        return buffer[margin : margin + size].view(tensor.dtype).view(tensor.shape)

    def check(self) -> None:
        """Raise where something was written beside a tensor."""
        for buffer, size in self._buffers:
            if bool((buffer[:256] != 0xFF).any() | (buffer[256 + size :] != 0xFF).any()):
                raise RuntimeError("written beside a tensor")


class Emulator:
    """The operators, as torch.ops.metakern has them, on the emulated device."""

    def __init__(self) -> None:
        kernels = [p for folder in ("cuda", "math") for p in (ROOT / "csrc" / folder).iterdir() if p.is_file()]
        path = build("lstm_step", ("lstm_step.cpp", "runtime.cpp"), [*kernels, ROOT / "csrc" / "lstm_step.h"])
        self._library = ctypes.CDLL(str(path))
        self._library.emulation_report.restype = ctypes.c_char_p
        self._library.workspace_bytes.restype = ctypes.c_int64

    @staticmethod
    def _problem(grads: Tensor, state: Tensor, options: dict[str, object], precision: str) -> _Problem:
        preprocess = str(options["preprocess"])
        return _Problem(
            grads.numel(),
            state.shape[3],
            state.shape[1],
            reference.PREPROCESS.index(preprocess),
            reference.num_features(preprocess),
            options["preprocess_scale"],
            options["output_scale"],
            PRECISIONS.index(precision),
            DTYPES.index(grads.dtype),
            DTYPES.index(state.dtype),
        )

    def _call(self, name: str, device: Device, problem: _Problem, arguments: ctypes.Structure) -> None:
        structure, call = device.structure(), ctypes.c_char_p()
        self._library.emulation_configure(ctypes.byref(structure))
        error = getattr(self._library, name)(ctypes.byref(problem), ctypes.byref(arguments), ctypes.byref(call))
        report = self._library.emulation_report().decode()
        if error or report:
            raise EmulationError(error, (call.value or b"").decode(), report)

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
        memory = _Guarded()
        problem = self._problem(grads, state.data, options, precision)
        weights = [memory.copy(w) for w in weights]
        inputs = [params, grads, state.data]
        outputs = [params, state.data]
        if not in_place:
            inputs, outputs = [memory.copy(x) for x in inputs], [memory.like(x) for x in outputs]
        arguments = _Forward(_pointers(weights), *(x.data_ptr() for x in [*inputs, *outputs]))
        self._call("forward", device, problem, arguments)
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
        memory = _Guarded()
        problem = self._problem(grads, state, options, precision)
        inputs = [memory.copy(x) for x in (grads, state, grad_new_params, grad_new_state)]
        outputs = [memory.like(x) for x in (grads, state)]
        weights = [memory.copy(w) for w in weights]
        grad_weights = [memory.like(w) for w in weights]
        size = self._library.workspace_bytes(ctypes.byref(problem))
        workspace = memory.like(torch.empty(size, dtype=torch.uint8))
        pointers = (x.data_ptr() for x in [*inputs, *outputs])
        arguments = _Backward(_pointers(weights), *pointers, _pointers(grad_weights), workspace.data_ptr())
        self._call("backward", device, problem, arguments)
        memory.check()
        return outputs[0], outputs[1], grad_weights


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return _Pointers(*(x.data_ptr() for x in tensors))
