"""Bad arguments: one exception type per kind of fault, and a message that names argument, expected and got.

The dtype, layout, device, shape and type of every tensor of a call are changed in turn. All backends raise the same:
ValueError for a shape, TypeError for a dtype, layout or type, RuntimeError for a device. Other errors of an operator,
above all of its options, are in its own tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance.ops.implementations import PUBLIC, Implementation, rows
from tests.conformance.ops.operators import Example, Operator, argument
from tests.conftest import assert_same_bits

F32 = torch.float32


@dataclass(frozen=True)
class Fault:
    """A change of one tensor, the exception, and what its message reports as received."""

    name: str
    change: Callable[[Tensor], Any]
    error: type[Exception]
    got: str

    def __str__(self) -> str:
        return self.name


def longer(x: Tensor) -> Tensor:
    """One more row."""
    return torch.cat([x, x[:1]])


FAULTS = (
    Fault("dtype", lambda x: x.to(torch.int32), TypeError, r"int32|Int"),
    Fault("complex", lambda x: x.to(torch.complex64), TypeError, r"complex64|ComplexFloat"),
    Fault("layout", Tensor.to_sparse, TypeError, r"sparse_coo|Sparse"),
    Fault("device", lambda x: x.to("meta"), RuntimeError, r"\bmeta\b"),
    Fault("type", lambda _: None, TypeError, r"NoneType|None"),
    Fault("number", lambda _: 0.5, TypeError, r"float|0\.5"),
    Fault("shape", longer, ValueError, r"\[\d+.*\]|\d+"),
)


def asked(op: Operator, example: Example, fault: Fault) -> list[str]:
    """Tensors to apply the fault to: one per argument, the last of a list."""
    found = {argument(name): name for name, x in example.tensors.items() if fault.name != "shape" or x.dim()}
    return [name for name in found.values() if (fault.name, argument(name)) not in op.tolerates]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
@rows(PUBLIC, sanitize=True)
def test_a_fault_is_named_and_leaves_the_callers_tensors_alone(op: Operator, by: Implementation, fault: Fault) -> None:
    example = op.make(F32, **op.faulted).to(by.device)
    before = {name: x.clone() for name, x in example.tensors.items()}
    for name in asked(op, example, fault):
        changed = Example(example.tensors | {name: fault.change(example.tensors[name])}, example.options)
        with pytest.raises(Exception, match=fault.got) as caught:
            op.call(changed, by.backend)
        said = f"{name}: {caught.type.__name__}: {caught.value}"
        assert caught.type is fault.error, said
        words = op.spoken.get(argument(name), argument(name))
        if fault.name == "shape":  # either of two mismatched tensors may be named
            words = "|".join(argument(other) for other in example.tensors)
        assert re.search(words, str(caught.value)), said
    for name, x in example.tensors.items():
        if x.is_floating_point():
            assert_same_bits(name, x, before[name])
        else:
            assert torch.equal(x, before[name]), name


@rows(PUBLIC)
def test_an_unknown_backend_is_named(op: Operator, by: Implementation) -> None:
    example = op.make(F32, **op.faulted).to(by.device)
    with pytest.raises(ValueError, match=r"^backend must be one of auto, cpp, cuda, triton, reference, got 'gpu'$"):
        op.call(example, "gpu")


@rows(PUBLIC[:1])
def test_a_backend_that_cannot_run_says_what_is_missing(op: Operator, by: Implementation) -> None:
    example = op.make(F32, **op.faulted)
    with pytest.raises(RuntimeError, match=r"^backend 'cuda' cannot run: \w+"):
        op.call(example, "cuda")
