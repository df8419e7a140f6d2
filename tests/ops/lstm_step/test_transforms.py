"""lstm_step as a registered operator: gradcheck, opcheck, torch.compile, torch.func, higher derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.func import functional_call, grad, vmap

from metakern.ops import LSTMState, lstm_step, lstm_step_, pack_state, unpack_state
from metakern.ops.lstm_step import reference
from tests.conftest import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close
from tests.problems import make_problem, weight_names

OPTIONS = (1, 10.0, 0.1, 0)  # log_sign, its scale, output scale, highest precision


def operator_arguments(n: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> tuple[Any, ...]:
    problem = make_problem(n, 3, 2, dtype)
    tensors = [x.clone().requires_grad_(requires_grad) for x in (problem.params, problem.grads, problem.state.data)]
    return *tensors, [w.clone().requires_grad_(requires_grad) for w in problem.weights], *OPTIONS


# -------------------------------------------------------------------------------------------------- gradcheck


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("preprocess", reference.PREPROCESS)
def test_gradcheck_of_all_inputs(preprocess: str, layers: int, capability: str) -> None:
    problem = make_problem(4, 3, layers, torch.float64, preprocess=preprocess, preprocess_scale=2.0)
    # Away from the kinks of the preprocessing, on both sides: e^-2 = 0.135.
    problem.grads = torch.tensor([0.5, -0.02, 0.05, -1.5], dtype=torch.float64)

    def call(params: Tensor, grads: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        state = pack_state(h, c)
        new_params, new_state = lstm_step(params, grads, state, weights, backend="cpp", **problem.options)
        return new_params, *unpack_state(new_state)

    leaves = [x.clone().requires_grad_() for x in (problem.params, problem.grads, problem.h, problem.c)]
    assert torch.autograd.gradcheck(call, [*leaves, *(w.requires_grad_() for w in problem.weights)])


# ---------------------------------------------------------------------------------------------------- opcheck


@pytest.mark.parametrize("n", [0, 5, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck_of_lstm_step(n: int, dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.metakern.lstm_step.default, operator_arguments(n, dtype, requires_grad=True))


@pytest.mark.parametrize("n", [0, 33])
def test_opcheck_of_lstm_step_in_place(n: int) -> None:
    torch.library.opcheck(torch.ops.metakern.lstm_step_.default, operator_arguments(n))


@pytest.mark.parametrize("n", [0, 33])
def test_opcheck_of_lstm_step_backward(n: int) -> None:
    params, grads, state, *rest = operator_arguments(n)
    arguments = (torch.randn_like(params), torch.randn_like(state), grads, state, *rest)
    torch.library.opcheck(torch.ops.metakern.lstm_step_backward.default, arguments)


# ---------------------------------------------------------------------------------------------- torch.compile


def two_steps(params: Tensor, grads: Tensor, state: LSTMState, weights: list[Tensor]) -> tuple[Tensor, LSTMState]:
    params, state = lstm_step(params, grads, state, weights, backend="cpp")
    return lstm_step(params, grads * 0.5, state, weights, preprocess="log_and_clip", backend="cpp")


def gradients_of(step: Callable[..., tuple[Tensor, LSTMState]], n: int) -> list[Tensor]:
    problem = make_problem(n, 5, 2)
    leaves = [x.clone().requires_grad_() for x in (problem.params, problem.grads, problem.state.data)]
    weights = [w.clone().requires_grad_() for w in problem.weights]
    params, state = step(leaves[0], leaves[1], LSTMState(leaves[2], n), weights)
    loss = params.square().sum() + state.data.square().sum()
    return [params, state.data, *torch.autograd.grad(loss, [*leaves, *weights])]


@pytest.mark.parametrize("mode", ["inductor", "aot_eager"])
def test_compiled_in_one_graph_equals_eager_forward_and_backward(mode: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(two_steps, fullgraph=True, backend=mode)
    names = ["new params", "new state", "grad params", "grad grads", "grad state", *weight_names(2)]
    for name, got, expected in zip(names, gradients_of(compiled, 33), gradients_of(two_steps, 33), strict=True):
        assert_close(name, got, expected, 1e-6)


def test_compiled_for_any_count_of_coordinates() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(two_steps, fullgraph=True, dynamic=True, backend=counter)
    for n in (33, 70, 100, 129, 200, 300):
        for got, expected in zip(gradients_of(compiled, n), gradients_of(two_steps, n), strict=True):
            assert_close(f"result for {n} coordinates", got, expected, 1e-6)
    assert counter.frame_count <= 3, "every count of coordinates compiles a graph of its own"


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


def loss_of(params: Tensor, grads: Tensor, state: LSTMState, weights: list[Tensor], backend: str = "cpp") -> Tensor:
    new_params, new_state = lstm_step(params, grads, state, weights, backend=backend)
    h, c = unpack_state(new_state)
    return new_params.square().sum() + h.sin().sum() + c.cos().sum()


def test_func_grad_of_every_argument_equals_autograd() -> None:
    problem = make_problem(33, 5, 2)
    got = grad(loss_of, argnums=(0, 1, 2, 3))(problem.params, problem.grads, problem.state, problem.weights)
    leaves = [x.clone().requires_grad_() for x in (problem.params, problem.grads, problem.state.data)]
    weights = [w.clone().requires_grad_() for w in problem.weights]
    loss = loss_of(leaves[0], leaves[1], LSTMState(leaves[2], 33), weights)
    expected = torch.autograd.grad(loss, [*leaves, *weights])
    assert isinstance(got[2], LSTMState)
    for name, a, b in zip(
        ["params", "grads", "state", *weight_names(2)], [*got[:2], got[2].data, *got[3]], expected, strict=True
    ):
        assert_close(f"gradient of {name}", a, b, 0.0)


def batch_of_problems(batch: int, n: int) -> tuple[Tensor, Tensor, LSTMState, list[Tensor]]:
    """Stacks of everything along a new first axis; the state is a pytree whose only leaf has it."""
    each = [make_problem(n, 5, 2, seed=seed) for seed in range(batch)]
    state = LSTMState(torch.stack([p.state.data for p in each]), n)
    weights = [torch.stack(ws) for ws in zip(*(p.weights for p in each), strict=True)]
    return torch.stack([p.params for p in each]), torch.stack([p.grads for p in each]), state, weights


def pick(argument: Any, index: int, batched: bool) -> Any:
    """What the mapped function sees of an argument at one index."""
    if not batched:
        return argument
    if isinstance(argument, LSTMState):
        return LSTMState(argument.data[index], argument.num_coordinates)
    return [w[index] for w in argument] if isinstance(argument, list) else argument[index]


# Which of params, grads, state and weights carry the batch axis.
BATCHED = {
    "params, grads and state": (True, True, True, False),
    "everything": (True, True, True, True),
    "params": (True, False, False, False),
    "grads": (False, True, False, False),
    "state": (False, False, True, False),
    "weights": (False, False, False, True),
    "grads and weights": (False, True, False, True),
}


@pytest.mark.parametrize("which", BATCHED)
@pytest.mark.parametrize("n", [1, 32, 45])
def test_vmap_equals_a_loop(n: int, which: str) -> None:
    batch, batched = 3, BATCHED[which]
    arguments = batch_of_problems(batch, n)
    arguments = [a if b else pick(a, 0, True) for a, b in zip(arguments, batched, strict=True)]
    in_dims = tuple(0 if b else None for b in batched)

    def call(*args: Any) -> tuple[Tensor, ...]:
        new_params, state = lstm_step(*args, backend="cpp")
        return new_params, *unpack_state(state)

    rows = [call(*(pick(a, i, b) for a, b in zip(arguments, batched, strict=True))) for i in range(batch)]
    for name, got, expected in zip(
        ("params", "h", "c"), vmap(call, in_dims=in_dims)(*arguments), zip(*rows, strict=True), strict=True
    ):
        assert_close(f"new {name}", got, torch.stack(expected), 0.0)

    per_example = grad(loss_of, argnums=(0, 1, 2, 3))
    got = vmap(per_example, in_dims=in_dims)(*arguments)
    looped = [per_example(*(pick(a, i, b) for a, b in zip(arguments, batched, strict=True))) for i in range(batch)]
    for index, expected in enumerate(looped):
        flat = [got[0][index], got[1][index], got[2].data[index], *(w[index] for w in got[3])]
        flat_expected = [*expected[:2], expected[2].data, *expected[3]]
        for name, a, b in zip(["params", "grads", "state", *weight_names(2)], flat, flat_expected, strict=True):
            assert_close(f"gradient of {name} of element {index}", a, b, GRADIENT_TOLERANCE[torch.float32])


@pytest.mark.parametrize("which", BATCHED)
def test_grad_of_vmap_equals_grad_of_a_loop(which: str) -> None:
    batch, n, batched = 3, 45, BATCHED[which]
    arguments = batch_of_problems(batch, n)
    arguments = [a if b else pick(a, 0, True) for a, b in zip(arguments, batched, strict=True)]

    def mapped(*args: Any) -> Tensor:
        return vmap(loss_of, in_dims=tuple(0 if b else None for b in batched))(*args).sum()

    def looped(*args: Any) -> Tensor:
        return sum(loss_of(*(pick(a, i, b) for a, b in zip(args, batched, strict=True))) for i in range(batch))

    got, expected = (grad(f, argnums=(0, 1, 2, 3))(*arguments) for f in (mapped, looped))
    for name, a, b in zip(
        ["params", "grads", "state", *weight_names(2)],
        [*got[:2], unpack_state(pick(got[2], slice(None), False))[0] if not batched[2] else got[2].data, *got[3]],
        [*expected[:2], unpack_state(expected[2])[0] if not batched[2] else expected[2].data, *expected[3]],
        strict=True,
    ):
        assert_close(f"gradient of {name}", a, b, GRADIENT_TOLERANCE[torch.float32])


def test_vmap_over_other_axes_and_inside_vmap() -> None:
    problem = make_problem(6 * 5, 4, 2)
    params, grads = problem.params.view(5, 6), problem.grads.view(5, 6)  # the batch is the last axis
    state = LSTMState.zeros(5, hidden_size=4)
    got = vmap(lambda p, g: lstm_step(p, g, state, problem.weights, backend="cpp")[0], in_dims=1, out_dims=1)(
        params, grads
    )
    rows = [lstm_step(params[:, i], grads[:, i], state, problem.weights, backend="cpp")[0] for i in range(6)]
    assert_close("new params", got, torch.stack(rows, 1), 0.0)

    nested, one = params.reshape(3, 2, 5), LSTMState.zeros(5, hidden_size=4)
    twice = vmap(vmap(lambda p: lstm_step(p, p, one, problem.weights, backend="cpp")[0]))(nested)
    flat = torch.stack([lstm_step(p, p, one, problem.weights, backend="cpp")[0] for p in nested.view(6, 5)])
    assert_close("new params of a nested vmap", twice, flat.view(3, 2, 5), 0.0)


def test_vmap_of_the_reference_equals_vmap_of_the_kernel() -> None:
    params, grads, state, weights = batch_of_problems(3, 45)
    got, expected = (
        vmap(lambda *a, b=b: loss_of(*a, backend=b))(params, grads, state, weights) for b in ("cpp", "reference")
    )
    assert_close("loss", got, expected, 1e-5)


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


def test_a_second_derivative_of_the_operator_itself_is_refused() -> None:
    problem = make_problem(5, 3, 1, torch.float64)
    leaves = [x.clone().requires_grad_() for x in (problem.params, problem.grads, problem.state.data)]
    weights = [w.requires_grad_() for w in problem.weights]
    new_params, _ = lstm_step(leaves[0], leaves[1], LSTMState(leaves[2], 5), weights, backend="cpp")
    for wanted in (leaves[1], leaves[2], weights[0]):
        (first,) = torch.autograd.grad(new_params.square().sum(), wanted, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative of its own; backend='reference' does"):
            torch.autograd.grad(first.square().sum(), wanted)


def test_a_second_derivative_by_torch_func_is_refused() -> None:
    problem = make_problem(5, 3, 1, torch.float64)

    def inner(weight: Tensor) -> Tensor:
        return loss_of(problem.params, problem.grads, problem.state, [weight, *problem.weights[1:]])

    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad(lambda w: grad(inner)(w).square().sum())(problem.weights[0])


def test_forward_mode_is_refused_not_silently_zero() -> None:
    problem = make_problem(5, 3, 1)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(
            lambda g: lstm_step(problem.params, g, problem.state, problem.weights, backend="cpp")[0],
            (problem.grads,),
            (torch.ones_like(problem.grads),),
        )


def test_the_reference_provides_second_derivatives() -> None:
    problem = make_problem(2, 2, 1, torch.float64, preprocess_scale=2.0)
    problem.grads = torch.tensor([0.5, -0.05], dtype=torch.float64)

    def call(params: Tensor, grads: Tensor, data: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        options = {"preprocess_scale": 2.0, "backend": "reference"}
        new_params, state = lstm_step(params, grads, LSTMState(data, 2), weights, **options)
        return new_params, *unpack_state(state)

    leaves = [x.clone().requires_grad_() for x in (problem.params, problem.grads, problem.state.data)]
    assert torch.autograd.gradgradcheck(call, [*leaves, *(w.requires_grad_() for w in problem.weights)])


# --------------------------------------------------------------------------------- partly differentiable inputs


@pytest.mark.parametrize("index", range(4))
def test_only_what_requires_a_gradient_gets_one(index: int) -> None:
    problem = make_problem(33, 3, 1)
    arguments: list[Any] = [problem.params, problem.grads, problem.state.data, problem.weights[0]]
    arguments[index] = arguments[index].clone().requires_grad_()
    params, grads, data, weight = arguments
    new_params, state = lstm_step(params, grads, LSTMState(data, 33), [weight, *problem.weights[1:]], backend="cpp")
    (new_params.sum() + state.data.sum()).backward()
    assert [x.grad is not None for x in arguments] == [i == index for i in range(4)]


def test_one_unused_result_has_zero_gradient() -> None:
    problem = make_problem(33, 3, 2)
    results = []
    for backend in ("cpp", "reference"):
        grads = problem.grads.clone().requires_grad_()
        new_params, state = lstm_step(problem.params, grads, problem.state, problem.weights, backend=backend)
        results.append([torch.autograd.grad(x.sum(), grads, retain_graph=True)[0] for x in (new_params, state.data)])
    for got, expected in zip(*results, strict=True):
        assert_close("gradient of grads", got, expected, GRADIENT_TOLERANCE[torch.float32])


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


def test_dual_tensors_are_refused_not_silently_cut_off() -> None:
    problem = make_problem(5, 3, 1)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(problem.grads, torch.ones_like(problem.grads))
        with pytest.raises((RuntimeError, NotImplementedError)):
            lstm_step(problem.params, dual, problem.state, problem.weights, backend="cpp")
