"""hrnn_step's operators called directly, past Python's checks: what they refuse, and that memory is guarded."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance.ops.hrnn_step import HrnnStep
from tests.conftest import assert_same_bits

FORWARD = ("params", "grads", "states", "biases", "mean_rate", "weights")
BACKWARD = (
    *("grad_new_params", "grad_new_states", "grad_means", "grad_attended"),
    *("grads", "states", "steps", "rms", "biases", "mean_rate", "weights"),
)
NAMES = {"hrnn_step": FORWARD, "hrnn_step_backward": BACKWARD}


def second(change: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """Changes the second tensor of a list."""
    return lambda xs: [xs[0], change(xs[1]), *xs[2:]]


def shorter(x: Tensor) -> Tensor:
    return x[..., :-1]


# The call has T = 3 tasks of tensors [5, 2] and [3], with attention: an argument, its change, and what the error says.
BAD: dict[str, tuple[str, Callable[[Any], Any], type[Exception], str]] = {
    "no grads": ("grads", lambda xs: [], ValueError, "must hold a tensor for each of"),
    "states missing": ("states", lambda xs: xs[:1], ValueError, "states must hold a tensor for each of"),
    "steps missing": ("steps", lambda xs: xs[:1], ValueError, "steps must hold a tensor for each of grads, 2, got 1"),
    "attended missing": ("grad_attended", lambda xs: [], ValueError, "grad_attended must hold 2 tensors, got 0"),
    "state rows": (
        "states",
        second(lambda x: x[:, :20]),
        ValueError,
        "states[1] must have shape [3, 21, 3], got [3, 20",
    ),
    "state size": ("states", second(shorter), ValueError, "states[1] must have shape [3, 21, 3], got [3, 21, 2]"),
    "state tasks": ("states", second(lambda x: x[:1]), ValueError, "states[1] must have shape [3, 21, 3], got [1,"),
    "state dtype": ("states", second(Tensor.double), TypeError, "states[1] must be torch.float32, got torch.float64"),
    "grads size": ("grads", second(shorter), ValueError, "got [3, 2"),
    "grads dtype": ("grads", second(Tensor.half), TypeError, "got torch.float16"),
    "grads kind": ("grads", second(Tensor.long), TypeError, "got torch.int64"),
    "params tasks": (
        "params",
        second(lambda x: x[:2]),
        ValueError,
        "params[1] must have shape [T, *shape] with T = 3, got",
    ),
    "params dtype": ("params", second(Tensor.double), TypeError, "params[1] must be float32, bfloat16 or float16 for"),
    "mean rate": ("mean_rate", lambda x: x[:, None], ValueError, "mean_rate must have shape [T], got [3, 1]"),
    "mean rate's tasks": (
        "mean_rate",
        lambda x: x[:2],
        ValueError,
        "biases must have shape [2, 2, 30], got [2, 3, 30]",
    ),
    "mean rate's dtype": ("mean_rate", Tensor.double, TypeError, "mean_rate must be torch.float32, got torch.float64"),
    "biases": ("biases", shorter, ValueError, "biases must have shape [M, T, 3H] with H of 1 to 32, got [2, 3, 29]"),
    "biases' tensors": ("biases", lambda x: x[:1], ValueError, "biases must have shape [2, 3, 30], got [1, 3, 30]"),
    "hidden": ("biases", lambda x: x[..., :27], ValueError, "as the kernels are compiled for 10 hidden units, got 9"),
    "biases' dtype": ("biases", Tensor.half, TypeError, "biases must be torch.float32, got torch.float16"),
    "weights": ("weights", lambda xs: xs[:4], ValueError, "weights must hold 5 tensors, got 4"),
    "gates": (
        "weights",
        lambda xs: [shorter(xs[0]), *xs[1:]],
        ValueError,
        "weights[0] (gates) must have shape [20, 22]",
    ),
    "readouts": (
        "weights",
        lambda xs: [*xs[:2], xs[2][:3], *xs[3:]],
        ValueError,
        "weights[2] (readouts) must have shape",
    ),
    "scalars": ("weights", lambda xs: [*xs[:4], xs[4][:4]], ValueError, "weights[4] (scalars) must have shape [5]"),
    "steps": ("steps", second(shorter), ValueError, "steps[1] must have shape [3, 2, 3], got [3, 2, 2]"),
    "steps' rows": (
        "steps",
        second(lambda x: x[:, :1]),
        ValueError,
        "steps[1] must have shape [3, 2, 3], got [3, 1, 3]",
    ),
    "rms": ("rms", shorter, ValueError, "rms must have shape [2, 3, 2], got [2, 3, 1]"),
    "means": ("grad_means", shorter, ValueError, "grad_means must have shape [2, 3, 23], got [2, 3, 22]"),
    "new params": ("grad_new_params", second(shorter), ValueError, "grad_new_params[1] must have the shape of grads"),
    "new states": ("grad_new_states", second(shorter), ValueError, "grad_new_states[1] must have the shape of states"),
    "attended": ("grad_attended", second(shorter), ValueError, "grad_attended[1] must have the shape of grads"),
}


CALLS = [(case, operator) for operator, names in NAMES.items() for case in BAD if BAD[case][0] in names]


@pytest.mark.sanitize
@pytest.mark.parametrize(("case", "operator"), CALLS, ids=[" of ".join(call) for call in CALLS])
def test_operators_called_directly_guard_memory(case: str, operator: str) -> None:
    name, change, error, message = BAD[case]
    call = HrnnStep().raw(operator)
    index = NAMES[operator].index(name)
    call[index] = change(call[index])
    with pytest.raises(error, match=re.escape(message)):
        getattr(torch.ops.metakern, operator)(*call)


@pytest.mark.sanitize
def test_rows_that_are_not_contiguous_are_read_right() -> None:
    for operator in NAMES:
        call = HrnnStep().raw(operator)
        expected = torch.utils._pytree.tree_leaves(getattr(torch.ops.metakern, operator)(*call))
        strided = torch.utils._pytree.tree_map(lambda x: torch.stack([x, x], -1)[..., 0], call)
        found = torch.utils._pytree.tree_leaves(getattr(torch.ops.metakern, operator)(*strided))
        for index, (x, y) in enumerate(zip(found, expected, strict=True)):
            assert_same_bits(f"result {index}", x, y)
