"""Operators with weights of every copy's own: each copy's results are those of a call with its weights alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from metakern.core import backend as _backend
from metakern.core.torch_private import pytree
from metakern.ops import LSTMState, hrnn_step, lstm_step_staged, mlp_update_step, pack_state
from metakern.ops.hrnn_step.stacked import hrnn_step_stacked
from metakern.ops.lstm_step import reference as lstm_reference
from metakern.ops.lstm_step.prepared import PreparedStep
from metakern.ops.lstm_step.stacked import lstm_step_stacked
from metakern.ops.lstm_step.state import pack_rows
from metakern.ops.mlp_update_step import Moments
from metakern.ops.mlp_update_step.stacked import mlp_update_step_stacked
from tests.conformance.ops.hrnn_step import HrnnStep
from tests.conformance.ops.mlp_update_step import make_call
from tests.conformance.ops.operators import Operator, gather
from tests.conftest import CAPABILITIES
from tests.ops.lstm_step.test_stages import PAIRS, SCALARS, make_staged

COPIES = 3


def copied(weights: Any) -> list[Tensor]:
    """Different copies of weights, [COPIES, *shape] each."""
    return Operator.copied(weights, COPIES)


def lstm_call(dtype: torch.dtype, features: str = "moments", head: str = "tanh", n: int = 64) -> Any:
    """Arguments of lstm_step_stacked with n coordinates for each copy."""
    staged = make_staged(COPIES * n, features, head, dtype, hidden=7)
    tensors = {"stage_state": pack_rows(staged.stage_state), "coordinate_inputs": staged.coordinate_inputs}
    arguments = [staged.params, staged.grads, pack_state(staged.h, staged.c).data, copied(staged.weights)]
    options = {"features": features, "head": head, **lstm_reference.Scalars(*SCALARS)._asdict()}
    return arguments, tensors, options


def lstm_together(arguments: Any, tensors: Any, options: Any, backend: str) -> list[Tensor]:
    params, grads, data, weights = arguments
    state = LSTMState(data, params.numel())
    new, state, rows = lstm_step_stacked(params, grads, state, weights, **tensors, **options, backend=backend)
    return [new, state.data, rows]


def lstm_alone(arguments: Any, tensors: Any, options: Any, backend: str) -> list[Tensor]:
    params, grads, data, weights = arguments
    n, found = params.numel() // COPIES, []
    for copy in range(COPIES):
        run, tiles = slice(copy * n, copy * n + n), slice(copy * n // 32, (copy + 1) * n // 32)
        new, state, rows = lstm_step_staged(
            *(params[run], grads[run], LSTMState(data[tiles], n), [w[copy] for w in weights]),
            stage_state=tensors["stage_state"][tiles],
            coordinate_inputs=tensors["coordinate_inputs"][:, run],
            **options,
            backend=backend,
        )
        found.append([new, state.data, rows])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def hrnn_call(dtype: torch.dtype) -> Any:
    """Arguments of hrnn_step_stacked, of several blocks."""
    tensors = HrnnStep().make(dtype, tasks=COPIES, shapes=((700,), (), (5, 3), (0,)), attention=True).tensors
    params, grads, states, weights = (gather(tensors, name) for name in ("params", "grads", "states", "weights"))
    return params, grads, states, tensors["biases"], tensors["mean_rate"], copied(weights)


def hrnn_together(*arguments: Any, backend: str) -> Any:
    return list(hrnn_step_stacked(*arguments, backend=backend))


def hrnn_alone(params: Any, grads: Any, states: Any, biases: Any, rate: Any, weights: Any, backend: str) -> Any:
    found = []
    for at in range(COPIES):
        lists = [[x[at : at + 1] for x in xs] for xs in (params, grads, states)]
        own = [w[at] for w in weights]
        found.append(hrnn_step(*lists, biases[:, at : at + 1], rate[at : at + 1], own, backend=backend))
    new, state, attended = ([torch.cat(x) for x in zip(*(s[i] for s in found), strict=True)] for i in (0, 1, 3))
    return [new, state, torch.cat([s.means for s in found], 1), attended]


def mlp_call(dtype: torch.dtype) -> Any:
    """Arguments of mlp_update_step_stacked; the decays differ, too."""
    params, grads, moments, weights, decays, *rest = make_call(((40, 30), (9,), (3, 2, 2), (0, 2)), dtype, COPIES)
    own = torch.stack([decays**power for power in range(1, COPIES + 1)])
    return params, grads, moments, copied(weights), own, *rest


def mlp_together(*arguments: Any, backend: str) -> Any:
    new, moments = mlp_update_step_stacked(*arguments, exp_mult=0.1, backend=backend)
    return [new, *moments]


def mlp_alone(params: Any, grads: Any, moments: Any, weights: Any, decays: Any, *rest: Any, backend: str) -> Any:
    rates, keep, steps = rest
    found = []
    for at in range(COPIES):
        one = slice(at, at + 1)
        lists = [[x[one] for x in xs] for xs in (params, grads, *moments)]
        own = ([w[at] for w in weights], decays[at], rates[:, one], keep[:, one], steps[one])
        new, state = mlp_update_step(lists[0], lists[1], Moments(*lists[2:]), *own, exp_mult=0.1, backend=backend)
        found.append([new, *state])
    return [[torch.cat(x) for x in zip(*xs, strict=True)] for xs in zip(*found, strict=True)]


CALLS = {"hrnn_step": (hrnn_call, hrnn_together, hrnn_alone), "mlp_update_step": (mlp_call, mlp_together, mlp_alone)}
OPERATORS = (*CALLS, *("-".join(pair) for pair in PAIRS))


def both(name: str, dtype: torch.dtype, backend: str = "cpp", check: Callable[[Any], None] = lambda _: None) -> Any:
    """Results of one call, and of a call for each copy; ``check`` sees the arguments."""
    if name in CALLS:
        make, together, alone = CALLS[name]
        arguments = make(dtype)
    else:
        arguments, together, alone = lstm_call(dtype, *name.split("-")), lstm_together, lstm_alone
    check(arguments)
    return together(*arguments, backend=backend), alone(*arguments, backend=backend)


@pytest.fixture(params=CAPABILITIES)
def capability(request: Any) -> Any:
    if request.param not in _backend._C.available_cpu_capabilities():
        pytest.skip(f"this processor or build has no {request.param}")
    before = _backend._C.cpu_capability()
    _backend._C.set_cpu_capability(request.param)
    yield
    _backend._C.set_cpu_capability(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_each_copy_has_the_bits_of_a_call_of_its_own(name, dtype, capability):
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        with torch.no_grad():
            got, expected = both(name, dtype)
        torch.set_num_threads(before)
        flat, wanted = pytree.tree_leaves(got), pytree.tree_leaves(expected)
        assert len(flat) == len(wanted) > 2
        for a, b in zip(flat, wanted, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_kernel_is_close_to_the_reference(name):
    with torch.no_grad():
        (got, _), (_, expected) = both(name, torch.float64), both(name, torch.float64, "reference")
    torch.testing.assert_close(pytree.tree_leaves(got), pytree.tree_leaves(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["hrnn_step", "mlp_update_step", "moments-tanh"])
def test_gradients_flow_where_they_are_recorded(name):
    """By a launch for each copy, which the launch for all has none of."""
    leaves: list[Tensor] = []

    def record(arguments: Any) -> None:
        leaves.extend(x.requires_grad_() for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor) and x.dim() > 1
                      and x.is_floating_point())  # fmt: skip

    got, expected = both(name, torch.float64, check=record)
    sums = [sum(x.square().sum() for x in pytree.tree_leaves(found)) for found in (got, expected)]
    found = [torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True) for total in sums]
    some = [(a, b) for a, b in zip(*found, strict=True) if b is not None]
    assert len(some) > 4
    for a, b in some:
        torch.testing.assert_close(a, b)


def test_a_prepared_step_has_the_bits_of_the_operator():
    """Also after the weights of one copy have changed."""
    arguments, tensors, options = lstm_call(torch.float32, "log_sign", "add")
    params, grads, data, weights = arguments
    options |= {"features_scale": 10.0, "head_scale": 0.1}
    step = PreparedStep(7, 2, ("log_sign", 10.0, "highest"), COPIES)
    for _ in range(2):
        new, state = step(params, grads, LSTMState(data, params.numel()), weights, 0.1)
        expected = lstm_alone(arguments, tensors, options, "cpp")
        assert torch.equal(new, expected[0])
        assert torch.equal(state.data, expected[1])
        weights[0][1] += 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lstm_together(*lstm_call(torch.float32, n=40), "cpp"), "copies of the weights, a multiple of 32, got"),
        (lambda: lstm_together(*lstm_call(torch.float32, n=40), "reference"), "copies of the weights, a multiple of"),
    ],
)
def test_coordinates_of_copies_fill_tiles(call, message):
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("name", ["hrnn_step", "mlp_update_step"])
def test_copies_are_as_many_as_tasks(name, backend):
    make, together, _ = CALLS[name]
    arguments = list(make(torch.float32))
    place = 5 if name == "hrnn_step" else 3
    arguments[place] = [w[:2] for w in arguments[place]]
    with torch.no_grad(), pytest.raises(ValueError, match=r"weights(\[0\])? .*must have"):
        together(*arguments, backend=backend)
