"""inner_update refuses what does not fit and says why; past the public function the operator refuses it too."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metakern import MAML
from metakern.ops import inner_update
from tests.conftest import BACKENDS

ONES = [torch.ones(2, 3), torch.ones(2)]
ACTIVE = torch.tensor([True, False])

# Changes of the arguments of a good call, the error, and what it says.
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a tensor for a list": ({"params": ONES[0]}, TypeError, "params must be a sequence of tensors, got Tensor"),
    "no tensor in grads": ({"grads": [ONES[0], 1.0]}, TypeError, r"grads\[1\] must be a tensor, got float"),
    "too few grads": ({"grads": ONES[:1]}, ValueError, "grads must hold as many tensors as params, 2, got 1"),
    "shape of grads": (
        {"grads": [torch.ones(3), ONES[1]]},
        ValueError,
        r"grads\[0\] must have the shape of its params, \[2, 3\], got \[3\]",
    ),
    "dtype of grads": (
        {"grads": [ONES[0].double(), ONES[1]]},
        TypeError,
        r"grads\[0\] must have the dtype of its params, torch.float32, got torch.float64",
    ),
    "dtype of params": (
        {"params": [x.int() for x in ONES], "grads": [x.int() for x in ONES]},
        TypeError,
        r"params\[0\] must be float32, float64, bfloat16 or float16, got torch.int32",
    ),
    "sparse params": ({"params": [ONES[0].to_sparse(), ONES[1]]}, TypeError, r"params\[0\] must be a dense tensor"),
    "meta params": ({"grads": [ONES[0], ONES[1].to("meta")]}, RuntimeError, r"grads\[1\] must be on the device of"),
    "lr of text": ({"lr": "0.1"}, TypeError, "lr must be a number, a tensor or a sequence of tensors, got str"),
    "lr of a truth value": ({"lr": True}, TypeError, "lr must be a number, .* got bool"),
    "lr of None": ({"lr": None}, TypeError, "lr must be a number, .* got NoneType"),
    "lr of too many elements": ({"lr": torch.ones(2)}, ValueError, r"lr as one tensor must have shape \[\], got \[2\]"),
    "lr of integers": ({"lr": torch.tensor(1)}, TypeError, "lr must be float32, .* got torch.int64"),
    "too few rates": ({"lr": [torch.ones(3)]}, ValueError, "lr must hold one tensor for each of params, 2, got 1"),
    "no rates": ({"lr": []}, ValueError, "lr must hold one tensor for each of params, 2, got 0"),
    "numbers as rates": ({"lr": [0.1, 0.1]}, TypeError, r"lr\[0\] must be a tensor, got float"),
    "shape of a rate": (
        {"lr": [torch.ones(2), torch.ones(())]},
        ValueError,
        r"lr\[0\] must have shape \[\] or the last axes of its params, \[2, 3\], got \[2\]",
    ),
    "rate of more axes": ({"lr": [torch.ones(1, 2, 3), torch.ones(())]}, ValueError, r"lr\[0\] must have shape"),
    "step of a number": ({"step": 0}, ValueError, "lr must be tensors with a leading axis of inner steps for step=0"),
    "step of a tensor without steps": (
        {"step": 0, "lr": torch.tensor(0.1)},
        ValueError,
        r"lr as one tensor must have shape \[K\] with step, got \[\]",
    ),
    "step of rates without steps": (
        {"step": 0, "lr": [torch.ones(()), torch.ones(())]},
        ValueError,
        r"lr\[0\] must have a leading axis of inner steps for step=0, got shape \[\]",
    ),
    "step past the end": (
        {"step": 2, "lr": [torch.ones(2), torch.ones(2)]},
        ValueError,
        r"step must be less than the 2 inner steps that lr\[0\] holds, got 2",
    ),
    "step past the end of a tensor": ({"step": 2, "lr": torch.ones(2)}, ValueError, "step must be less than the 2"),
    "negative step": ({"step": -1, "lr": torch.ones(2)}, ValueError, "step must be None or an index .* got -1"),
    "step of text": ({"step": "0"}, TypeError, "step must be None or an index .* got '0'"),
    "clip_norm of zero": ({"clip_norm": 0.0}, ValueError, "clip_norm must be positive and finite, got 0.0"),
    "clip_norm of NaN": ({"clip_norm": math.nan}, ValueError, "clip_norm must be positive and finite, got nan"),
    "clip_norm of infinity": ({"clip_norm": math.inf}, ValueError, "clip_norm must be positive and finite, got inf"),
    "clip_norm of text": ({"clip_norm": "1"}, TypeError, "clip_norm must be None or a number, got str"),
    "active of floats": ({"active": torch.ones(2)}, TypeError, "active must be a tensor of bool, got torch.float32"),
    "active of a list": ({"active": [True, False]}, TypeError, "active must be a tensor of bool, got list"),
    "active of more axes": ({"active": ACTIVE[None]}, ValueError, r"active must have shape \[T\], got \[1, 2\]"),
    "active of other tasks": (
        {"active": torch.ones(3, dtype=torch.bool)},
        ValueError,
        r"params must have a leading axis of the 3 tasks for clip_norm and active, got shapes \[\[2, 3\], \[2\]\]",
    ),
    "no task axis to clip along": (
        {"params": [ONES[0], torch.ones(())], "grads": [ONES[0], torch.ones(())], "clip_norm": 1.0},
        ValueError,
        r"params must have one leading axis of tasks for clip_norm and active, got shapes \[\[2, 3\], \[\]\]",
    ),
    "several counts of tasks": (
        {"params": [ONES[0], torch.ones(3)], "grads": [ONES[0], torch.ones(3)], "clip_norm": 1.0},
        ValueError,
        r"params must have one leading axis of tasks .* got shapes \[\[2, 3\], \[3\]\]",
    ),
    "unknown backend": ({"backend": "gpu"}, ValueError, "backend must be one of .* got 'gpu'"),
    "backend without a kernel": ({"backend": "cuda"}, RuntimeError, "backend 'cuda' cannot run"),
}


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str, backend: str, recorded: bool) -> None:
    changes, error, message = BAD[case]
    params = [x.clone().requires_grad_(recorded) for x in ONES]
    arguments = {"params": params, "grads": ONES, "lr": 0.1, "backend": backend} | changes
    with pytest.raises(error, match=message):
        inner_update(**arguments)


# The same past the public function: the operator's own checks, which guard memory, in the same words.
OPERATOR: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "too few grads": ({"grads": ONES[:1]}, ValueError, "grads must hold as many tensors as params, 2, got 1"),
    "shape of grads": (
        {"grads": [torch.ones(3), ONES[1]]},
        ValueError,
        r"grads\[0\] must have the shape of its params, \[2, 3\], got \[3\]",
    ),
    "dtype of grads": (
        {"grads": [ONES[0], ONES[1].double()]},
        TypeError,
        r"grads\[1\] must have the dtype of its params, torch.float32, got torch.float64",
    ),
    "dtype of params": (
        {"params": [x.int() for x in ONES], "grads": [x.int() for x in ONES]},
        TypeError,
        r"params\[0\] must be float32, float64, bfloat16 or float16, got torch.int32",
    ),
    "dtype of lr": (
        {"lr": [torch.tensor(1)]},
        TypeError,
        r"lr\[0\] must be float32, float64, bfloat16 or float16, got torch.int64",
    ),
    "count of lr": ({"lr": ONES + ONES}, ValueError, "lr must hold one tensor for each of params, 2, got 4"),
    "shape of lr": (
        {"lr": [torch.ones(2), torch.ones(2)]},
        ValueError,
        r"lr\[0\] must have shape \[\] or the last axes of its params, \[2, 3\], got \[2\]",
    ),
    "shape of lr of a step": (
        {"lr": [torch.ones(1, 2), torch.ones(1)], "step": 0},
        ValueError,
        r"lr\[0\] must have shape \[\] or .*, behind that of the inner steps, got \[1, 2\]",
    ),
    "step without an axis": (
        {"lr": [torch.ones(()), torch.ones(())], "step": 0},
        ValueError,
        r"lr\[0\] must have a leading axis of inner steps for step=0, got shape \[\]",
    ),
    "step past the end": (
        {"lr": [torch.ones(2), torch.ones(2)], "step": 2},
        ValueError,
        r"step must be less than the 2 inner steps that lr\[0\] holds, got 2",
    ),
    "step past the one": ({"lr": [torch.ones(1)], "step": 1}, ValueError, "step must be 0 for the one step .* got 1"),
    "step below -1": ({"step": -2}, ValueError, "step must be -1, .* got -2"),
    "clip_norm": ({"clip_norm": 0.0}, ValueError, "clip_norm must be positive and finite, got 0"),
    "active's shape": (
        {"active": torch.ones(3, dtype=torch.bool)},
        ValueError,
        r"params must have a leading axis of the 3 tasks for clip_norm and active, got shapes \[\[2, 3\], \[2\]\]",
    ),
    "active's axes": ({"active": ACTIVE[None]}, ValueError, r"active must have shape \[T\], got \[1, 2\]"),
    "active's dtype": ({"active": torch.ones(2)}, TypeError, "active must be a tensor of bool, got torch.float32"),
    "tasks": (
        {"params": [ONES[0], torch.ones(3)], "grads": [ONES[0], torch.ones(3)], "clip_norm": 1.0},
        ValueError,
        r"params must have one leading axis of tasks for clip_norm and active, got shapes \[\[2, 3\], \[3\]\]",
    ),
    "no task axis": (
        {"params": [ONES[0], torch.ones(())], "grads": [ONES[0], torch.ones(())], "clip_norm": 1.0},
        ValueError,
        r"params must have one leading axis of tasks for clip_norm and active, got shapes \[\[2, 3\], \[\]\]",
    ),
}


@pytest.mark.sanitize
@pytest.mark.parametrize("case", OPERATOR)
def test_the_operator_checks_for_itself(case: str) -> None:
    changes, error, message = OPERATOR[case]
    arguments: dict[str, Any] = {"params": ONES, "grads": ONES, "lr": [], "rate": 0.1, "step": -1}
    with pytest.raises(error, match="^" + message):
        torch.ops.metakern.inner_update.default(**arguments | {"clip_norm": None, "active": None} | changes)


def test_numbers_of_other_types_are_taken() -> None:
    (got,) = inner_update([torch.ones(1, 2)], (torch.ones(1, 2),), 1, clip_norm=1, backend="cpp")
    assert isinstance(got, Tensor)
    torch.testing.assert_close(got, torch.full((1, 2), 1 - 2**-0.5))


def test_numbers_of_numpy() -> None:
    params, grads = [torch.randn(2, 3), torch.randn(2)], [torch.randn(2, 3), torch.randn(2)]
    for lr, clip_norm in ((np.float32(0.125), np.float64(0.5)), (np.int64(1), np.float16(0.5))):
        found = inner_update(params, grads, lr, clip_norm=clip_norm)
        expected = inner_update(params, grads, float(lr), clip_norm=float(clip_norm))
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
    rates = [torch.rand(4), torch.rand(4)]
    for index in (np.int64(2), np.uint8(2)):
        found = inner_update(params, grads, rates, step=index)
        for a, b in zip(found, inner_update(params, grads, rates, step=2), strict=True):
            assert torch.equal(a, b)
    learner = MAML(torch.nn.Linear(2, 1), lr=np.float32(0.5)).clone()
    before = learner.module.weight
    learner.adapt(learner(torch.ones(1, 2)).sum())
    assert torch.allclose(learner.module.weight, before - 0.5)
