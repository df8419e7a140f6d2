"""Results and gradients of every operator by every implementation, against the float64 reference."""

from __future__ import annotations

import functools

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conformance.ops.implementations import (
    CPP,
    CPP_EACH,
    Implementation,
    assert_conforms,
    examples,
    rows,
)
from tests.conformance.ops.operators import Example, Operator, Spec


@functools.lru_cache(maxsize=1)
def made(op: Operator, spec: Spec, dtype: torch.dtype, device: str) -> Example:
    """An example, cached for consecutive implementations."""
    return op.make(dtype, **spec.sizes).to(device)


@examples()
def test_results_and_gradients(op: Operator, spec: Spec, dtype: torch.dtype, by: Implementation) -> None:
    assert_conforms(op, made(op, spec, dtype, by.device), by, gradients=spec.gradients)


@rows([CPP])
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_drawn_arguments(op: Operator, by: Implementation, data: st.DataObject) -> None:
    dtypes = [dtype for dtype in op.dtypes if op.serves("cpp", dtype)]
    sizes, dtype = data.draw(op.draws, "sizes"), data.draw(st.sampled_from(dtypes), "dtype")
    example = op.make(dtype, **sizes)
    with data.draw(st.sampled_from(CPP_EACH), "instruction set").in_use():
        assert_conforms(op, example, by)
