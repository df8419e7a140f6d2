"""CoordinatewiseLSTM: the plain PyTorch computation, trees of tensors, moving weights both ways, copies, errors."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metakern.ops import LSTMState, unpack_state
from metakern.ops.lstm_step import reference
from metakern.rules import CoordinatewiseLSTM
from tests.conftest import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close, assert_same_bits


def modules(
    hidden: int = 6, layers: int = 2, inputs: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[nn.LSTM, nn.Linear]:
    torch.manual_seed(0)
    return nn.LSTM(inputs, hidden, layers, dtype=dtype), nn.Linear(hidden, 1, dtype=dtype)


def plain_optimizer(
    lstm: nn.LSTM, head: nn.Linear, params: Tensor, grads: Tensor, steps: int, preprocess: str
) -> Tensor:
    """The module as a user writes it without metakern: features [1, N, F] through nn.LSTM, nn.Linear, scaled update."""
    state = None
    for _ in range(steps):
        out, state = lstm(reference.preprocess_gradient(grads, preprocess, 10.0).unsqueeze(0), state)
        params = params + 0.1 * head(out).view(-1)
    return params


# ------------------------------------------------------------------------------------------ a drop-in for modules


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("preprocess", reference.PREPROCESS)
def test_from_nn_lstm_reproduces_the_plain_computation(preprocess: str, layers: int, backend: str) -> None:
    if backend == "triton" and (preprocess, layers) != ("log_sign", 2):
        pytest.skip("the interpreter takes 10 s for it; the operator's own suite holds it to every size")
    lstm, head = modules(6, layers, reference.num_features(preprocess))
    rule = CoordinatewiseLSTM.from_modules(lstm, head, preprocess=preprocess, backend=backend)
    params, grads = torch.randn(37), torch.randn(37)
    expected = plain_optimizer(lstm, head, params, grads, 3, preprocess)
    state, got = rule.init_state(params), params
    for _ in range(3):
        got, state = rule(got, grads, state)
    assert_close("params after 3 steps", got, expected, 3 * FORWARD_TOLERANCE[torch.float32])
    gradients = torch.autograd.grad(got.square().sum(), list(rule.parameters()))
    expected_gradients = torch.autograd.grad(expected.square().sum(), [*lstm.parameters(), *head.parameters()])
    for (name, _), a, b in zip(rule.named_parameters(), gradients, expected_gradients, strict=True):
        assert_close(f"gradient of {name}", a, b, 3 * GRADIENT_TOLERANCE[torch.float32])


def test_from_a_list_of_cells_reproduces_the_plain_computation() -> None:
    torch.manual_seed(0)
    cells, head = [nn.LSTMCell(2, 6), nn.LSTMCell(6, 6)], nn.Linear(6, 1)
    params, grads = torch.randn(37), torch.randn(37)
    expected, states = params, [None, None]
    for _ in range(3):
        x = reference.preprocess_gradient(grads, "log_sign", 10.0)
        for layer, cell in enumerate(cells):
            states[layer] = cell(x, states[layer])
            x = states[layer][0]
        expected = expected + 0.1 * head(x).view(-1)
    for given in (cells, tuple(cells), nn.ModuleList(cells)):
        rule = CoordinatewiseLSTM.from_modules(given, head)
        state, got = rule.init_state(params), params
        for _ in range(3):
            got, state = rule(got, grads, state)
        assert_close("params after 3 steps", got, expected, 3 * FORWARD_TOLERANCE[torch.float32])


def test_weights_are_copied_and_come_back_from_to_modules() -> None:
    lstm, head = modules()
    rule = CoordinatewiseLSTM.from_modules(lstm, head, output_scale=1.0)
    back_lstm, back_head = rule.to_modules()
    assert type(back_lstm) is nn.LSTM
    assert type(back_head) is nn.Linear
    pairs = [(lstm, back_lstm), (head, back_head), (lstm, rule.lstm), (head, rule.head)]
    for module, other in pairs:
        assert list(module.state_dict()) == list(other.state_dict())
        for name, tensor in module.state_dict().items():
            assert_same_bits(name, other.state_dict()[name], tensor)
    with torch.no_grad():
        back_head.weight.zero_()
        head.weight.fill_(7)
    assert rule.head.weight.any()
    assert not (rule.head.weight == 7).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_moving_weights_both_ways_keeps_every_bit_in_every_dtype(dtype: torch.dtype) -> None:
    lstm, head = modules(dtype=dtype)
    rule = CoordinatewiseLSTM.from_modules(lstm, head)
    for module, other in zip((lstm, head), rule.to_modules(), strict=True):
        for (name, tensor), got in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
            assert_same_bits(name, got, tensor)
    assert {p.dtype for p in rule.parameters()} == {dtype}


def test_names_of_the_state_dict_are_those_of_the_modules() -> None:
    lstm, head = modules(20, 2)
    rule = CoordinatewiseLSTM()
    expected = [f"lstm.{name}" for name in lstm.state_dict()] + [f"head.{name}" for name in head.state_dict()]
    assert list(rule.state_dict()) == expected
    assert sum(p.numel() for p in rule.parameters()) == 5301  # as the paper's optimizer with PyTorch's two biases
    rule.lstm.load_state_dict(lstm.state_dict())
    rule.head.load_state_dict(head.state_dict())
    for name, tensor in lstm.state_dict().items():
        assert_same_bits(name, rule.state_dict()[f"lstm.{name}"], tensor)


class NotLSTM(nn.Module):
    """Something else where a head or a cell belongs."""


BAD_MODULES: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "bidirectional": (
        nn.LSTM(2, 6, bidirectional=True),
        nn.Linear(6, 1),
        {},
        ValueError,
        "bidirectional=False, got bidirectional=True",
    ),
    "proj_size": (nn.LSTM(2, 6, proj_size=3), nn.Linear(3, 1), {}, ValueError, "proj_size=0, got proj_size=3"),
    "dropout": (nn.LSTM(2, 6, 2, dropout=0.5), nn.Linear(6, 1), {}, ValueError, "dropout=0.0, got dropout=0.5"),
    "bias of the lstm": (nn.LSTM(2, 6, bias=False), nn.Linear(6, 1), {}, ValueError, "bias=True"),
    "bias of the head": (nn.LSTM(2, 6), nn.Linear(6, 1, bias=False), {}, ValueError, "bias=True"),
    "bias of a cell": (
        [nn.LSTMCell(2, 6), nn.LSTMCell(6, 6, bias=False)],
        nn.Linear(6, 1),
        {},
        ValueError,
        "bias=True",
    ),
    "input size": (
        nn.LSTM(1, 6),
        nn.Linear(6, 1),
        {},
        ValueError,
        "lstm.weight_ih_l0 must have shape [24, 2] for preprocess='log_sign', got [24, 1]",
    ),
    "input size of none": (
        nn.LSTM(2, 6),
        nn.Linear(6, 1),
        {"preprocess": "none"},
        ValueError,
        "lstm.weight_ih_l0 must have shape [24, 1] for preprocess='none', got [24, 2]",
    ),
    "hidden sizes of cells": (
        [nn.LSTMCell(2, 6), nn.LSTMCell(6, 7)],
        nn.Linear(7, 1),
        {},
        ValueError,
        "lstm.weight_ih_l1 must have shape [24, 6]",
    ),
    "hidden size": (nn.LSTM(2, 65), nn.Linear(65, 1), {}, ValueError, "hidden_size must be 1 to 64, got 65"),
    "layers": (nn.LSTM(2, 6, 4), nn.Linear(6, 1), {}, ValueError, "num_layers must be 1 to 3, got 4"),
    "outputs of the head": (nn.LSTM(2, 6), nn.Linear(6, 2), {}, ValueError, "head.weight must have shape [1, 6]"),
    "inputs of the head": (nn.LSTM(2, 6), nn.Linear(7, 1), {}, ValueError, "head.weight must have shape [1, 6]"),
    "no cells": (
        [],
        nn.Linear(6, 1),
        {},
        ValueError,
        "lstm must be an nn.LSTM or a non-empty sequence of nn.LSTMCell, got an empty sequence",
    ),
    "a cell not in a list": (
        nn.LSTMCell(2, 6),
        nn.Linear(6, 1),
        {},
        TypeError,
        "lstm must be an nn.LSTM or a sequence of nn.LSTMCell, got LSTMCell",
    ),
    "a GRU": (
        nn.GRU(2, 6),
        nn.Linear(6, 1),
        {},
        TypeError,
        "lstm must be an nn.LSTM or a sequence of nn.LSTMCell, got GRU",
    ),
    "cells of a GRU": (
        [nn.GRUCell(2, 6)],
        nn.Linear(6, 1),
        {},
        TypeError,
        "lstm must be an nn.LSTM or a sequence of nn.LSTMCell, got GRUCell",
    ),
    "no module": (
        None,
        nn.Linear(6, 1),
        {},
        TypeError,
        "lstm must be an nn.LSTM or a sequence of nn.LSTMCell, got NoneType",
    ),
    "head not linear": (nn.LSTM(2, 6), NotLSTM(), {}, TypeError, "head must be an nn.Linear, got NotLSTM"),
}


@pytest.mark.parametrize("case", BAD_MODULES)
def test_modules_that_the_kernels_do_not_serve_are_named(case: str) -> None:
    lstm, head, options, error, message = BAD_MODULES[case]
    with pytest.raises(error, match=re.escape(message)):
        CoordinatewiseLSTM.from_modules(lstm, head, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size must be 1 to 64, got 0"),
        ({"hidden_size": -3}, ValueError, "hidden_size must be 1 to 64, got -3"),
        ({"hidden_size": 20.0}, TypeError, "hidden_size must be an integer, got 20.0 of type float"),
        ({"hidden_size": True}, TypeError, "hidden_size must be an integer, got True of type bool"),
        ({"num_layers": 4}, ValueError, "num_layers must be 1 to 3, got 4"),
        ({"preprocess": "log"}, ValueError, "preprocess must be one of none, log_sign, log_and_clip, got 'log'"),
        ({"preprocess_scale": 0.0}, ValueError, "preprocess_scale must be 1e-06 to 88.0, got 0.0"),
        ({"preprocess_scale": math.inf}, ValueError, "preprocess_scale must be 1e-06 to 88.0, got inf"),
        ({"output_scale": math.nan}, ValueError, "output_scale must be finite in float32, got nan"),
        ({"preprocess_scale": "10"}, TypeError, "preprocess_scale must be a number, got '10' of type str"),
        ({"backend": "gpu"}, ValueError, "backend must be one of auto, cpp, cuda, triton, reference, got 'gpu'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        CoordinatewiseLSTM(**options)


# ------------------------------------------------------------------------------------------------ trees of tensors


def tree_of(fill: float = 0.0) -> dict[str, Any]:
    """Every shape and nesting that a model's parameters come in."""
    torch.manual_seed(1)
    tree = {
        "weight": torch.randn(5, 3, 2),
        "scale": torch.randn(()),
        "nothing": torch.randn(0, 4),
        "layers": [torch.randn(7), (torch.randn(1, 1), {"deep": torch.randn(33)})],
    }
    return pytree.tree_map(lambda x: x + fill, tree)


def test_a_tree_gives_what_its_flat_coordinates_give(backend: str) -> None:
    rule = CoordinatewiseLSTM(6, 2, backend=backend)
    params, grads = tree_of(), tree_of(0.5)
    flat_params, flat_grads = (torch.cat([x.reshape(-1) for x in pytree.tree_leaves(t)]) for t in (params, grads))
    state, flat_state = rule.init_state(params), rule.init_state(flat_params)
    assert state.num_coordinates == flat_params.numel() == 30 + 1 + 7 + 1 + 33
    for _ in range(2):
        params, state = rule(params, grads, state)
        flat_params, flat_state = rule(flat_params, flat_grads, flat_state)
    assert pytree.tree_structure(params) == pytree.tree_structure(grads)
    assert [x.shape for x in pytree.tree_leaves(params)] == [x.shape for x in pytree.tree_leaves(grads)]
    assert_same_bits("params", torch.cat([x.reshape(-1) for x in pytree.tree_leaves(params)]), flat_params)
    assert_same_bits("state", state.data, flat_state.data)


@pytest.mark.parametrize(
    ("dtypes", "state_dtype"),
    [
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.bfloat16, torch.bfloat16), torch.float32),
        ((torch.float64, torch.float32), torch.float64),
        ((torch.float16, torch.float64), torch.float64),
    ],
)
def test_mixed_dtypes_keep_their_own(dtypes: tuple[torch.dtype, ...], state_dtype: torch.dtype, backend: str) -> None:
    rule = CoordinatewiseLSTM(6, 2, backend=backend)
    params = [torch.randn(5).to(dtypes[0]), torch.randn(4).to(dtypes[1])]
    grads = [torch.randn_like(p) for p in params]
    new_params, state = rule(params, grads, rule.init_state(params))
    assert [p.dtype for p in new_params] == list(dtypes)
    assert state.data.dtype == state_dtype
    for index in range(2):  # alone, each of them gives the same up to the rounding of its own dtype
        alone, _ = rule(params[index], grads[index], rule.init_state(params[index]))
        assert_close(f"params[{index}]", new_params[index], alone, FORWARD_TOLERANCE[dtypes[index]] * 2)


def test_a_rule_in_another_dtype_serves_every_param_dtype() -> None:
    params = torch.randn(5)
    for rule_dtype in (torch.float64, torch.bfloat16):
        rule = CoordinatewiseLSTM(6, 2).to(rule_dtype)
        for dtype in (torch.float32, torch.float64, torch.float16):
            x = params.to(dtype)
            new_params, _ = rule(x, x, rule.init_state(x))
            assert new_params.dtype == dtype
            new_params.sum().backward()
        assert all(p.grad is not None and p.grad.dtype == rule_dtype for p in rule.parameters())


def test_states_that_do_not_fit_are_named() -> None:
    rule = CoordinatewiseLSTM(6, 2)
    params = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    state = rule.init_state(params)
    cases: list[tuple[Any, type[Exception], str]] = [
        (rule.init_state(torch.zeros(11)), ValueError, "as many coordinates as params, 10, got 11"),
        (LSTMState.zeros(10, hidden_size=7), ValueError, "must have shape [28, 2], got [24, 2]"),
        (LSTMState.zeros(10, hidden_size=6, num_layers=1), ValueError, "weights must hold 4 tensors"),
        (LSTMState(state.data, 10, 9), ValueError, "state has layout version 9"),
        (None, TypeError, "state must be an LSTMState"),
    ]
    for given, error, message in cases:
        with pytest.raises(error, match=re.escape(message)):
            rule(params, params, given)
    with pytest.raises(TypeError, match="params must hold tensors only, got NoneType as leaf 0"):
        rule.init_state([None])


# --------------------------------------------------------------------------------------------- gradients and copies


def test_gradients_reach_every_weight_params_grads_and_state() -> None:
    rule = CoordinatewiseLSTM(6, 2)
    params, grads = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    data = torch.randn_like(rule.init_state(params).data).requires_grad_()
    new_params, _ = rule({"w": params}, {"w": grads}, LSTMState(data, 20))
    new_params["w"].square().sum().backward()
    for x in (params, grads, data, *rule.parameters()):
        assert x.grad is not None
        assert x.grad.any()


def test_a_step_in_place_equals_a_step_and_takes_a_learning_rate(backend: str) -> None:
    rule = CoordinatewiseLSTM(6, 2, backend=backend)
    params, grads = torch.randn(37), torch.randn(37)
    expected, expected_state = rule(params, grads, rule.init_state(params))
    got, state = params.clone(), rule.init_state(params)
    rule.step_(got, grads, state)
    assert_same_bits("params", got, expected.detach())
    assert_same_bits("state", state.data, expected_state.data.detach())
    assert not got.requires_grad
    whole, half = torch.zeros(37), torch.zeros(37)
    rule.step_(whole, grads, rule.init_state(whole))
    rule.step_(half, grads, rule.init_state(half), lr=0.5)
    assert_close("half a step", half, whole / 2, FORWARD_TOLERANCE[torch.float32])


def test_the_state_is_that_of_zero_hidden_states() -> None:
    state = CoordinatewiseLSTM(6, 3).init_state({"a": torch.zeros(2, 5), "b": torch.zeros(23)})
    assert (state.num_coordinates, state.hidden_size, state.num_layers) == (33, 6, 3)
    assert not any(x.any() for x in unpack_state(state))


def test_a_broken_gradient_in_one_tensor_stays_with_its_coordinate(backend: str) -> None:
    rule = CoordinatewiseLSTM(6, 2, backend=backend)
    params, grads = tree_of(), tree_of(0.5)
    expected, _ = rule(params, grads, rule.init_state(params))
    grads["layers"][0][3] = math.inf
    got, _ = rule(params, grads, rule.init_state(params))
    assert got["layers"][0].isnan().tolist() == [i == 3 for i in range(7)]
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        kept = ~a.isnan()
        assert_same_bits("params", a[kept], b[kept])


def test_autocast_does_not_lower_the_precision_of_a_step(backend: str) -> None:
    rule = CoordinatewiseLSTM(6, 2, backend=backend)
    params = torch.randn(37)
    expected, _ = rule(params, params, rule.init_state(params))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, state = rule(params, params, rule.init_state(params))
    assert_same_bits("new params", got.detach(), expected.detach())
    assert state.data.dtype == torch.float32
