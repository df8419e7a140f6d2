"""Implementations of an operator, with results and gradients by each and by the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from metakern.core import backend as _backend
from tests.conformance.ops.operators import Example, Operator, Spec, Tensors, argument
from tests.conformance.ops.rows import ROWS
from tests.conftest import CAPABILITIES, FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close, assert_same_bits
from tests.cuda.device import Device


@dataclass(frozen=True)
class Implementation:
    """A backend, where it runs, and on the CPU the instruction set; None is the one in use.

    Attributes:
        kind: ``reference``, ``cpp``, ``interpreted`` (Triton's kernels on the CPU), ``emulated`` (the CUDA kernels on
            the CPU), ``cuda`` or ``triton``, both on a GPU
    """

    kind: str
    capability: str | None = None

    @property
    def backend(self) -> str:
        """The ``backend`` argument of the public functions."""
        return {"interpreted": "triton", "emulated": "cuda"}.get(self.kind, self.kind)

    @property
    def device(self) -> str:
        """The device of its tensors."""
        return "cuda" if self.kind in ("cuda", "triton") else "cpu"

    def __str__(self) -> str:
        return self.kind if self.capability is None else f"{self.kind}-{self.capability}"

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Context with its instruction set active; skips the test if this machine cannot run it."""
        if self.device == "cuda" and not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        if self.kind == "interpreted" and torch.cuda.is_available():
            pytest.skip("where there is a GPU, Triton's kernels are compiled for it")
        if self.capability is None:
            yield
            return
        available = _backend._C.available_cpu_capabilities()
        if self.capability not in available:
            pytest.skip(f"this processor or build has no {self.capability} (available: {', '.join(available)})")
        before = _backend._C.cpu_capability()
        _backend._C.set_cpu_capability(self.capability)
        try:
            yield
        finally:
            _backend._C.set_cpu_capability(before)


REFERENCE, CPP, INTERPRETED, EMULATED, CUDA, TRITON = map(
    Implementation, ("reference", "cpp", "interpreted", "emulated", "cuda", "triton")
)
CPP_EACH = tuple(Implementation("cpp", name) for name in CAPABILITIES)

#: Every backend of the public functions, and every instruction set.
PUBLIC = (REFERENCE, CPP, INTERPRETED, CUDA, TRITON)
ALL = (REFERENCE, *CPP_EACH, INTERPRETED, EMULATED, CUDA, TRITON)
KERNELS = (CPP, INTERPRETED, CUDA, TRITON)


# ---------------------------------------------------------------------------------------------------- parameters


def with_marks(by: Implementation, *values: Any, sanitize: bool = False) -> Any:
    """A test parameter; GPU implementations carry the mark ``gpu``, which bench.gpu_check selects."""
    marks = [pytest.mark.gpu] if by.device == "cuda" else []
    if sanitize and by.kind == "cpp":
        marks.append(pytest.mark.sanitize)
    return pytest.param(*values, marks=marks)


def rows(implementations: Sequence[Implementation], sanitize: bool = False, **wanted: Any) -> Any:
    """A mark that parametrizes a test by every operator ``op`` and implementation ``by``.

    ``wanted``: attributes that the operator must have.
    """
    pairs = [
        with_marks(by, op, by, sanitize=sanitize)
        for op in ROWS
        if all(getattr(op, name) == value for name, value in wanted.items())
        for by in implementations
        if any(op.serves(by.kind, dtype) for dtype in op.dtypes)
    ]
    return pytest.mark.parametrize(("op", "by"), pairs, indirect=["by"], ids=identify)


def examples(implementations: Sequence[Implementation] = ALL) -> Any:
    """A mark that parametrizes a test by operator, example, dtype and implementation."""
    found = [
        with_marks(by, op, spec, dtype, by, sanitize=spec.sanitize)
        for op in ROWS
        for spec in op.specs
        for dtype in spec.dtypes or op.dtypes
        for by in implementations
        if by.kind in spec.on and op.serves(by.kind, dtype)
    ]
    return pytest.mark.parametrize(("op", "spec", "dtype", "by"), found, indirect=["by"], ids=identify)


def identify(value: Any) -> str:
    """The test id of a parameter."""
    return value.name if isinstance(value, (Operator, Spec)) else str(value).removeprefix("torch.")


# ------------------------------------------------------------------------------------------ results and gradients


def seeds(results: Tensors) -> Tensors:
    """Cotangents of the results for backward: positive, so that sums of them do not cancel."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: (torch.randn(x.shape, generator=generator, dtype=torch.float64).abs() + 0.1).to(x.device, x.dtype)
        for name, x in results.items()
    }


def with_gradients(
    op: Operator,
    example: Example,
    call: Callable[[Example], Tensors],
    start: Callable[[Tensors], Tensors] = seeds,
    names: Iterable[str] | None = None,
) -> tuple[Tensors, Tensors]:
    """Named results of a call, and gradients of the tensors ``names``; default: all differentiable ones."""
    names = op.leaves(example) if names is None else list(names)
    leaves = example.map(lambda name, x: x.detach().requires_grad_(name in names))
    results = call(leaves)
    if not names:
        return results, {}
    gradients = torch.autograd.grad(
        list(results.values()), [leaves.tensors[name] for name in names], list(start(results).values())
    )
    return {name: x.detach() for name, x in results.items()}, dict(zip(names, gradients, strict=True))


def evaluate(op: Operator, example: Example, by: Implementation, device: Device | None = None) -> Any:
    """Named results and gradients by an implementation."""
    if by.kind == "emulated":
        return op.emulate(example, device or Device(), seeds)
    names = op.leaves(example)
    if by.kind == "reference" and not op.differentiates_reference(next(iter(example.tensors.values())).dtype):
        names = []
    return with_gradients(op, example, lambda leaves: op.call(leaves, by.backend), names=names)


#: Cache of the last example's reference results, as implementations are tested one after another.
_last: list[Any] = []


def expected(op: Operator, example: Example, like: Tensors) -> tuple[Tensors, Tensors]:
    """Results and gradients by the float64 reference, for results of the dtypes of ``like``."""

    def start(_: Tensors) -> Tensors:
        return {name: x.double() for name, x in seeds(like).items()}

    if not _last or _last[0] is not example:
        _last[:] = [example, with_gradients(op, example.double(), op.reference, start)]
    found: tuple[Tensors, Tensors] = _last[1]
    return found


def tolerance(
    op: Operator, table: dict[torch.dtype, float], name: str, dtype: torch.dtype, call: Tensors, kind: str
) -> float:
    """Tolerance from the storage dtype and the arithmetic, which is float32 for 16-bit results."""
    arithmetic = max(table[torch.promote_types(x.dtype, torch.float32)] for x in call.values())
    return max(table[dtype], arithmetic) * op.slack(name, dtype, kind)


def joined(op: Operator, named: Tensors, keep: Iterable[str]) -> Tensors:
    """All tensors as one vector if they are compared on one scale."""
    return {"gradients": torch.cat([named[name].double().flatten() for name in keep])} if op.one_scale else named


def assert_conforms(
    op: Operator, example: Example, by: Implementation, device: Device | None = None, gradients: bool = True
) -> None:
    """Compare results and gradients with the float64 reference, by the tolerances in tests/conftest.py."""
    results, found = evaluate(op, example, by, device)
    want, want_gradients = expected(op, example, results)
    assert list(results) == list(want)
    for name, x in results.items():
        assert x.dtype == op.dtype_of(name, example), f"{name} is {x.dtype}"
        assert x.device.type == by.device
        allowed = tolerance(op, FORWARD_TOLERANCE, name, x.dtype, results, by.kind)
        assert_close(name, op.visible(name, x, example), op.visible(name, want[name], example), allowed)
    if by.kind in ("cpp", "cuda") or (op.own_way_to_record and by.kind in ("interpreted", "triton")):
        with torch.no_grad():
            assert_all_same_bits(op.call(example, by.backend), results, "without a graph")
    if not gradients or not found:
        return
    for name, x in found.items():
        assert x.dtype == example.tensors[name].dtype, f"gradient of {name} is {x.dtype}"
        assert x.shape == example.tensors[name].shape, f"gradient of {name} has shape {list(x.shape)}"
    got, wide = joined(op, found, found), joined(op, want_gradients, found)
    for name, x in got.items():
        dtype = next(iter(found.values())).dtype if op.one_scale else x.dtype
        allowed = tolerance(op, GRADIENT_TOLERANCE, f"gradient of {argument(name)}", dtype, results, by.kind)
        pair = (op.visible(name, y, example) if not op.one_scale else y for y in (x, wide[name]))
        assert_close(f"gradient of {name}", *pair, allowed)


def bits(op: Operator, example: Example, by: Implementation, device: Device | None = None) -> Tensors:
    """Results and gradients under one dict of names, without padding."""
    results, gradients = evaluate(op, example, by, device)
    named = results | {f"gradient of {name}": x for name, x in gradients.items()}
    return {name: op.visible(name.removeprefix("gradient of "), x, example) for name, x in named.items()}


def assert_all_same_bits(got: Tensors, want: Tensors, what: str) -> None:
    """Fail unless all tensors have the same bits."""
    assert list(got) == list(want)
    for name, x in got.items():
        assert_same_bits(f"{name} {what}", x, want[name])


def total(results: Tensors) -> Tensor:
    """A scalar that depends on every element of every result, with different weights."""
    parts = []
    for x in results.values():
        weights = torch.linspace(1, 2, x.numel(), dtype=x.dtype, device=x.device).view(x.shape)
        parts.append((x.sin() * weights).sum())
    return torch.stack(parts).sum()
