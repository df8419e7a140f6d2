"""Fixtures that make Triton's CPU interpreter behave like a GPU, and make it faster."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture
def interpreter_like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fix two differences: the interpreter truncates float32 to bfloat16, and multiplies bfloat16 bits as integers.

    Every program is slow to interpret, so the last sum gets few.
    """
    pytest.importorskip("triton", reason="needs the package triton")
    from metakern.ops.core.registry import operators
    from metakern.ops.core.triton_launch import is_interpreted
    from metakern.ops.lstm_step import triton as triton_lstm_step

    for operator in operators().values():
        operator.prepare("triton")
    if not is_interpreted():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def nearest(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            return _to_bfloat16(values)
        return convert(values, source, target, rounding)

    def bfloat16_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(_from_bfloat16(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, *others)

    monkeypatch.setattr(interpreter, "_convert_float", nearest)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", bfloat16_dot)
    monkeypatch.setattr(triton_lstm_step, "SUM_WEIGHTS", 8192)


@pytest.fixture
def quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """For kernels of many device functions: Triton's module, which a kernel's start changes, is left so by its calls.

    32-bit indices are not checked for an overflow either; a problem as small as a test's has none.
    """
    pytest.importorskip("triton", reason="needs the package triton")
    from metakern.ops.core.triton_launch import is_interpreted

    if not is_interpreted():
        return
    from triton.runtime import interpreter

    started: set[Any] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__.startswith("triton.") and self.fn not in started:
            started.add(self.fn)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
    options = type(interpreter.interpreter_builder.options)(sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
