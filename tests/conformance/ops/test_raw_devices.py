"""Raw operators with tensors on several devices raise; they never return uninitialised memory."""

from __future__ import annotations

import pytest

from tests.conformance.ops.raw_calls import COMPILED, TRITON, arguments, operator, places, replaced, tensor_at

OPERATORS = pytest.mark.parametrize("name", [*COMPILED, *TRITON])
DEVICE = r"must be on the (CPU|device of)"


@OPERATORS
def test_each_tensor_on_meta_is_refused(name: str) -> None:
    args = arguments(name)
    spots = list(places(args))
    assert len(spots) >= 2
    for place in spots:
        changed = replaced(args, place, tensor_at(args, place).to("meta"))
        with pytest.raises(RuntimeError, match=DEVICE):
            operator(name)(*changed)


@OPERATORS
def test_all_tensors_but_one_on_meta_are_refused(name: str) -> None:
    args = arguments(name)
    on_meta = args
    for place in places(args):
        on_meta = replaced(on_meta, place, tensor_at(args, place).to("meta"))
    operator(name)(*on_meta)  # all on meta is allowed
    for place in places(args):
        constants = ("second_order", "step_weights")  # read on the CPU by the operators
        schema = operator(name).default._schema.arguments  # type: ignore[attr-defined]
        if schema[place[0]].name in constants:
            continue
        with pytest.raises(RuntimeError, match=DEVICE):
            operator(name)(*replaced(on_meta, place, tensor_at(args, place)))
