"""The CUDA kernels of inner_update run on the CPU, thread by thread, called as torch.ops.metakern.inner_update is.

Axis legend: T tasks, K inner steps, ``*shape`` the shape of one parameter tensor of the model.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.cuda.device import DEVICE, DTYPES, Device, Guarded, Library


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("params", ctypes.c_void_p),
        ("grads", ctypes.c_void_p),
        ("updated", ctypes.c_void_p),
        ("rates", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("rate_period", ctypes.c_int64),
        ("dtype", ctypes.c_int),
        ("rate_dtype", ctypes.c_int),
    )


class _Problem(ctypes.Structure):
    _fields_ = (
        ("tensors", ctypes.c_void_p),
        ("num_tensors", ctypes.c_int64),
        ("num_tasks", ctypes.c_int64),
        ("rate", ctypes.c_double),
        ("clip_norm", ctypes.c_double),
        ("coefficients", ctypes.c_void_p),
        ("active", ctypes.c_void_p),
    )


class InnerUpdateEmulator:
    """The operator on the emulated device."""

    def __init__(self) -> None:
        self._library = Library("inner_update")
        self._library.functions.workspace_bytes.restype = ctypes.c_int64

    def __call__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        lr: Sequence[Tensor] = (),
        rate: float = 0.0,
        step: int = -1,
        clip_norm: float | None = None,
        active: Tensor | None = None,
        *,
        device: Device = DEVICE,
        margin: int = 256,
    ) -> list[Tensor]:
        """New params. Tensors are aligned as torch's are, unless ``margin``, the bytes before each, says otherwise."""
        memory = Guarded(margin)
        rates = [(r if step < 0 else r[step]) for r in lr]
        shared = len(rates) == 1 and rates[0].numel() == 1
        # Copied once: a rate that is shared is one tensor.
        copies = [memory.copy(r) for r in rates]
        updated, tensors = [], (_Tensor * len(params))()
        for index, (p, g) in enumerate(zip(params, grads, strict=True)):
            updated.append(memory.like(p))
            alpha = copies[0 if shared else index] if rates else None
            tensors[index] = _Tensor(
                *(memory.copy(p).data_ptr(), memory.copy(g).data_ptr(), updated[-1].data_ptr()),
                None if alpha is None else alpha.data_ptr(),
                p.numel(),
                1 if alpha is None else alpha.numel(),
                DTYPES.index(p.dtype),
                DTYPES.index(p.dtype if alpha is None else alpha.dtype),
            )
        by_task = clip_norm is not None or active is not None
        tasks = None if active is None else memory.copy(active.to(torch.uint8))
        problem = _Problem(
            ctypes.addressof(tensors),
            len(params),
            params[0].shape[0] if by_task else 1,
            rate,
            clip_norm or 0.0,
            None,
            None if tasks is None else tasks.data_ptr(),
        )
        size = self._library.functions.workspace_bytes(ctypes.byref(problem))
        aligned = Guarded()
        workspace = aligned.like(torch.empty(size, dtype=torch.uint8))
        self._library.call("update", device, ctypes.byref(problem), ctypes.c_void_p(workspace.data_ptr()))
        memory.check()
        aligned.check()
        return updated


@functools.cache
def kernels() -> InnerUpdateEmulator:
    """Built once."""
    return InnerUpdateEmulator()
