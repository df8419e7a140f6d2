"""The reference of lstm_step, held to torch's own LSTM modules and to the formulas of the paper."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from metakern.ops.lstm_step import reference
from tests.conftest import assert_close, assert_same_bits
from tests.problems import make_problem


def features_by_hand(g: float, preprocess: str, p: float) -> list[float]:
    """The formulas, one number at a time."""
    if preprocess == "none":
        return [g]
    if preprocess == "log_sign":
        if abs(g) >= math.exp(-p):
            return [math.log(abs(g)) / p, math.copysign(1.0, g)]
        return [-1.0, math.exp(p) * g]
    epsilon = 2.0**-23
    return [max(math.log(abs(g) + epsilon) / p, -1.0), min(max(g * math.exp(p), -1.0), 1.0)]


@pytest.mark.parametrize("p", [1.0, 5.0, 10.0])
@pytest.mark.parametrize("preprocess", reference.PREPROCESS)
def test_preprocessing_is_that_of_the_paper(preprocess: str, p: float) -> None:
    sizes = [0.0, 1e-300, 1e-12, 1e-5, 4.4e-5, 4.6e-5, 1e-3, 0.3, 1.0, 7.0, 1e5, 1e200]
    grads = [sign * size for size in sizes for sign in (1, -1)]
    expected = torch.tensor([features_by_hand(g, preprocess, p) for g in grads], dtype=torch.float64)
    got = reference.preprocess_gradient(torch.tensor(grads, dtype=torch.float64), preprocess, p)
    assert got.shape == (len(grads), reference.num_features(preprocess))
    assert_close("features", got, expected, 1e-13)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("preprocess", reference.PREPROCESS)
def test_features_of_a_gradient_that_is_not_finite_are_nan(preprocess: str, bad: float) -> None:
    features = reference.preprocess_gradient(torch.tensor([1.0, bad, 2.0]), preprocess, 10.0)
    assert features.isnan().any(-1).tolist() == [False, True, False]
    assert features[1].isnan().all()


@pytest.mark.parametrize("preprocess", ["log_sign", "log_and_clip"])
def test_gradient_of_the_preprocessing_is_finite_everywhere(preprocess: str) -> None:
    grads = torch.tensor([0.0, -0.0, 1e-45, 1e-30, math.exp(-10), 1.0, -1e30], requires_grad=True)
    reference.preprocess_gradient(grads, preprocess, 10.0).sum().backward()
    assert grads.grad.isfinite().all()


def plain_step(problem, lstm: nn.LSTM, head: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    """The step as written without metakern."""
    scale, options = problem.options["preprocess_scale"], problem.options
    features = reference.preprocess_gradient(problem.grads, options["preprocess"], scale)
    out, (h, c) = lstm(features.unsqueeze(0), (problem.h, problem.c))  # sequence length 1, batch N
    return problem.params + options["output_scale"] * head(out[0]).squeeze(-1), h, c


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("hidden", [1, 20, 64])
@pytest.mark.parametrize("preprocess", reference.PREPROCESS)
def test_equals_nn_lstm_and_linear(preprocess: str, hidden: int, layers: int) -> None:
    problem = make_problem(37, hidden, layers, torch.float64, preprocess=preprocess)
    lstm = nn.LSTM(reference.num_features(preprocess), hidden, layers).double()
    head = nn.Linear(hidden, 1).double()
    weights = [*lstm.parameters(), *head.parameters()]
    expected = plain_step(problem, lstm, head)
    got = reference.lstm_step(problem.params, problem.grads, problem.h, problem.c, weights, **problem.options)
    for name, a, b in zip(("new params", "new h", "new c"), got, expected, strict=True):
        assert_close(name, a, b, 1e-13)
    gradients = [torch.autograd.grad(x, weights, problem.cotangents) for x in (got, expected)]
    for index, (a, b) in enumerate(zip(*gradients, strict=True)):
        assert_close(f"gradient of weights[{index}]", a, b, 1e-12)


def test_equals_a_stack_of_nn_lstm_cell() -> None:
    problem = make_problem(37, 20, 2, torch.float64)
    cells, head = [nn.LSTMCell(2, 20).double(), nn.LSTMCell(20, 20).double()], nn.Linear(20, 1).double()
    x = reference.preprocess_gradient(problem.grads, "log_sign", 10.0)
    hs, cs = [], []
    for layer, cell in enumerate(cells):
        x, c = cell(x, (problem.h[layer], problem.c[layer]))
        hs.append(x)
        cs.append(c)
    expected = problem.params + 0.1 * head(x).squeeze(-1), torch.stack(hs), torch.stack(cs)
    weights = [p for module in (*cells, head) for p in module.parameters()]
    got = reference.lstm_step(problem.params, problem.grads, problem.h, problem.c, weights)
    for name, a, b in zip(("new params", "new h", "new c"), got, expected, strict=True):
        assert_close(name, a, b, 1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_params_take_part_in_float32(dtype: torch.dtype) -> None:
    problem = make_problem(37, dtype=dtype)
    arguments = (problem.h, problem.c, problem.weights)
    got = reference.lstm_step(problem.params, problem.grads, *arguments)
    wide = reference.lstm_step(problem.params.float(), problem.grads.float(), *arguments)
    assert_same_bits("new params", got[0], wide[0].to(dtype))
    assert_same_bits("new h", got[1], wide[1])
    assert got[1].dtype == got[2].dtype == torch.float32


def test_no_coordinates() -> None:
    problem = make_problem(0, 5, 3)
    got = reference.lstm_step(problem.params, problem.grads, problem.h, problem.c, problem.weights)
    assert [list(x.shape) for x in got] == [[0], [3, 0, 5], [3, 0, 5]]
