"""The type of a compiled operator's exception, and its words, whichever way torch calls the operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from metakern.ops import LSTMState, inner_update, lstm_step

OPS = torch.ops.metakern
ONES = [torch.ones(2, 3), torch.ones(2)]

#: One fault of each kind: lists of grads for params of ONES.
FAULTS: dict[str, tuple[list[Tensor], type[Exception], str]] = {
    "shape": (
        [ONES[0], torch.ones(3)],
        ValueError,
        r"^grads\[1\] must have the shape of its params, \[2\], got \[3\]$",
    ),
    "count": (ONES[:1], ValueError, "^grads must hold as many tensors as params, 2, got 1$"),
    "dtype": (
        [ONES[0], ONES[1].double()],
        TypeError,
        r"^grads\[1\] must have the dtype of its params, torch\.float32, got torch\.float64$",
    ),
}


def raw(grads: list[Tensor]) -> list[Tensor]:
    return OPS.inner_update(ONES, grads, [], 0.1, -1, None, None)  # type: ignore[no-any-return]


WAYS: dict[str, Callable[[list[Tensor]], Any]] = {
    "the operator": raw,
    "its overload": lambda grads: OPS.inner_update.default(ONES, grads, [], 0.1, -1, None, None),
    "the function": lambda grads: inner_update(ONES, grads, 0.1, backend="cpp"),
    "a recorded call": lambda grads: raw([g.clone().requires_grad_() for g in grads]),
    "a compiled function": lambda grads: torch.compile(raw, backend="aot_eager", fullgraph=True)(grads),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_has_one_type_and_one_text(fault: str, way: str) -> None:
    grads, error, message = FAULTS[fault]
    with pytest.raises(Exception, match=message) as raised:
        WAYS[way](grads)
    assert raised.type is error


def test_memory_that_overlaps_is_a_runtime_error() -> None:
    state = LSTMState.zeros(5, hidden_size=4)
    weights = [w.detach() for w in (*torch.nn.LSTM(2, 4, 2).parameters(), *torch.nn.Linear(4, 1).parameters())]
    memory = torch.zeros(6)
    with pytest.raises(RuntimeError, match=r"^grads must not share a part of params' memory$") as raised:
        OPS.lstm_step_(memory[1:], memory[:-1], state.data, weights, 1, 10.0, 0.1, 0)
    assert raised.type is RuntimeError


def test_an_error_in_one_call_leaves_the_next_alone() -> None:
    for grads, error, _ in FAULTS.values():
        with pytest.raises(error):
            raw(grads)
        torch.testing.assert_close(raw(ONES), [0.9 * x for x in ONES])
    state = LSTMState.zeros(5, hidden_size=4)
    weights = [*torch.nn.LSTM(2, 4, 2).parameters(), *torch.nn.Linear(4, 1).parameters()]
    assert lstm_step(torch.zeros(5), torch.ones(5), state, weights)[0].isfinite().all()
