"""lstm_step as a registered operator: gradcheck, opcheck, torch.compile, torch.func, higher derivatives."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.func import functional_call, grad, vmap

from metakern.ops import LSTMState, lstm_step, lstm_step_
from tests.conftest import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close
from tests.problems import make_problem, weight_names

# -------------------------------------------------------------------------------------------------- gradcheck


# ---------------------------------------------------------------------------------------------------- opcheck


# ---------------------------------------------------------------------------------------------- torch.compile


def test_compiled_in_place_equals_eager() -> None:
    torch._dynamo.reset()
    problem = make_problem(33)

    def run(params: Tensor, state: LSTMState) -> Tensor:
        lstm_step_(params, problem.grads, state, problem.weights, backend="cpp")
        return params * 2

    expected, expected_state = problem.params.clone(), problem.state
    doubled = run(expected, expected_state)
    params, state = problem.params.clone(), problem.state
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(params, state)
    for name, a, b in (
        ("result", got, doubled),
        ("params", params, expected),
        ("h, c", state.data, expected_state.data),
    ):
        assert_close(name, a, b, 0.0)


# ------------------------------------------------------------------------------------------------- torch.func


# ------------------------------------------------------------------------------------------ second derivatives


def unroll(params: Tensor, weights: list[Tensor], backend: str, steps: int = 3) -> Tensor:
    """Sum of an optimizee's losses; its gradient depends on params, and that path is differentiated too."""
    target = torch.linspace(-1, 1, params.numel(), dtype=params.dtype)

    def optimizee(x: Tensor) -> Tensor:
        return ((x - target).square() * (1 + x.sin())).sum()

    state = LSTMState.zeros(params.numel(), hidden_size=5, num_layers=2, dtype=params.dtype)
    total = params.new_zeros(())
    for _ in range(steps):
        loss = optimizee(params)
        (gradient,) = torch.autograd.grad(loss, params, create_graph=True)
        params, state = lstm_step(params, gradient, state, weights, preprocess_scale=3.0, backend=backend)
        total = total + loss
    return total + optimizee(params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_second_derivatives_of_the_optimizee_pass_through(dtype: torch.dtype) -> None:
    problem = make_problem(40, 5, 2, torch.float64)
    outcomes = []
    for backend, kind in (("cpp", dtype), ("reference", torch.float64)):
        params = problem.params.to(kind).requires_grad_()
        weights = [w.detach().to(kind).requires_grad_() for w in problem.weights]
        total = unroll(params, weights, backend)
        outcomes.append([total.detach(), *torch.autograd.grad(total, [params, *weights])])
    assert_close("loss", outcomes[0][0], outcomes[1][0], FORWARD_TOLERANCE[dtype])
    for name, got, expected in zip(["params", *weight_names(2)], outcomes[0][1:], outcomes[1][1:], strict=True):
        assert_close(f"meta-gradient of {name}", got, expected, GRADIENT_TOLERANCE[dtype])
    # It is a different number without that path, so the comparison above sees it.
    params = problem.params.to(dtype).requires_grad_()
    cut = lstm_step(
        params,
        torch.autograd.grad(params.pow(3).sum(), params)[0],
        LSTMState.zeros(40, hidden_size=5, dtype=dtype),
        [w.to(dtype) for w in problem.weights],
        backend="cpp",
    )[0]
    assert bool((torch.autograd.grad(cut.sum(), params)[0] == 1).all())


def test_second_derivatives_pass_through_functional_grad_and_vmap() -> None:
    problem = make_problem(12, 5, 2, torch.float64)
    weights, start = problem.weights, problem.params.view(3, 4)
    target = torch.linspace(-1, 1, 4, dtype=torch.float64)

    def meta_loss(weights: list[Tensor], params: Tensor, backend: str) -> Tensor:
        state = LSTMState.zeros(4, hidden_size=5, num_layers=2, dtype=torch.float64)
        for _ in range(2):
            gradient = grad(lambda x: ((x - target).square() * (1 + x.sin())).sum())(params)
            params, state = lstm_step(params, gradient, state, weights, preprocess_scale=3.0, backend=backend)
        return (params - target).square().sum()

    for argnums in (0, 1):
        got, expected = (
            vmap(grad(lambda w, p, b=b: meta_loss(w, p, b), argnums=argnums), in_dims=(None, 0))(weights, start)
            for b in ("cpp", "reference")
        )
        for a, b in zip(*([x] if isinstance(x, Tensor) else x for x in (got, expected)), strict=True):
            assert_close(f"meta-gradient of argument {argnums}", a, b, GRADIENT_TOLERANCE[torch.float64])


# --------------------------------------------------------------------------------- partly differentiable inputs


def test_weights_of_a_module_through_functional_call() -> None:
    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = torch.nn.LSTM(2, 5, 2), torch.nn.Linear(5, 1)

        def forward(self, x: Tensor) -> Tensor:
            weights = [*self.lstm.parameters(), *self.head.parameters()]
            return lstm_step(x, x, LSTMState.zeros(4, hidden_size=5), weights, backend="cpp")[0]

    module, x = Step(), torch.randn(4)
    named = {name: p.detach() for name, p in module.named_parameters()}
    got = grad(lambda w: functional_call(module, w, (x,)).sum())(named)
    expected = torch.autograd.grad(module(x).sum(), list(module.parameters()))
    for (name, a), b in zip(got.items(), expected, strict=True):
        assert_close(name, a, b, 0.0)
