"""Shared by all emulated CUDA kernels: building tests/cuda/emulation, the device, guarded memory, ctypes calls."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
EMULATION = ROOT / "tests" / "cuda" / "emulation"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ORDERS = ("forward", "reverse", "shuffled")


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


def build(name: str, sources: Iterable[str], depends: Iterable[Path] = ()) -> Path:
    """Compile sources of tests/cuda/emulation into a shared library; kept under build/ until a source changes."""
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-std=c++17", "-O2", "-g", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    command += ["-U_FORTIFY_SOURCE"]  # its longjmp check rejects jumps to another stack
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
    """Properties of the emulated device. Launchers never cache ordinals from 64 on."""

    multiprocessors: int = 3
    shared_kilobytes: int = 227
    order: str = "forward"
    seed: int = 0
    eager_copies: bool = False
    fail_call: int = 0
    failure: int = 0
    ordinal: int = 64

    def structure(self) -> _Device:
        """The ctypes structure for the emulation."""
        order, shared = ORDERS.index(self.order), self.shared_kilobytes * 1024
        fields = (self.ordinal, self.multiprocessors, shared, order, self.seed, self.eager_copies)
        return _Device(*fields, self.fail_call, self.failure)


DEVICE = Device()


class Guarded:
    """Tensors surrounded by NaN: out-of-bounds reads show in results, out-of-bounds writes are found."""

    def __init__(self, margin: int = 256) -> None:
        """``margin``: bytes on either side; with a multiple of 16, tensors are aligned as torch's are."""
        self._margin = margin
        self._buffers: list[tuple[Tensor, int]] = []

    def copy(self, tensor: Tensor) -> Tensor:
        """The same values."""
        return self.like(tensor).copy_(tensor)

    def like(self, tensor: Tensor) -> Tensor:
        """The same shape and dtype, all NaN."""
        margin, size = self._margin, tensor.numel() * tensor.element_size()
        buffer = torch.full((margin + size + margin,), 0xFF, dtype=torch.uint8)
        self._buffers.append((buffer, size))
        return buffer[margin : margin + size].view(tensor.dtype).view(tensor.shape)

    def check(self) -> None:
        """Raise if something was written outside a tensor."""
        for buffer, size in self._buffers:
            margin = self._margin
            if bool((buffer[:margin] != 0xFF).any() | (buffer[margin + size :] != 0xFF).any()):
                raise RuntimeError("written beside a tensor")


class Library:
    """The kernels of one .cu file, compiled for the CPU: tests/cuda/emulation/<name>.cpp wraps their launchers."""

    def __init__(self, name: str) -> None:
        """Build and load it."""
        kernels = [p for p in (ROOT / "csrc").glob("*/*") if not p.name.startswith("cpu")]
        self.functions = ctypes.CDLL(str(build(name, (f"{name}.cpp", "runtime.cpp"), kernels)))
        self.functions.emulation_report.restype = ctypes.c_char_p

    def call(self, name: str, device: Device, *arguments: object) -> None:
        """Run a launcher on ``device``; raises on errors of the launcher or the device."""
        structure, call = device.structure(), ctypes.c_char_p()
        self.functions.emulation_configure(ctypes.byref(structure))
        error = getattr(self.functions, name)(*arguments, ctypes.byref(call))
        report = self.functions.emulation_report().decode()
        if error or report:
            raise EmulationError(error, (call.value or b"").decode(), report)
