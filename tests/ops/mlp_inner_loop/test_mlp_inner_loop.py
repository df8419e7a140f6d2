"""mlp_inner_loop and mlp_meta_loss: the compiled inner loops against the reference, bit by bit and from bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from metakern.ops import mlp_inner_loop, mlp_meta_loss
from tests.conftest import assert_same_bits
from tests.mlp_problems import Case, assert_equal

F64 = torch.float64


# ------------------------------------------------------------------------------------ against the reference


@pytest.mark.sanitize
def test_parameters_that_do_not_adapt_receive_meta_gradients() -> None:
    case = Case([2, 9, 3], 11)
    options = {"steps": 3, "adapted": [False, False, True, True], "activation": "sigmoid"}
    got = case.adapt("cpp", **options)
    assert_same_bits("body", got[0], case.params[0].expand(11, 9, 2))
    assert_equal(got, case.adapt("reference", **options), 1e-10)
    assert_equal(case.meta("cpp", **options), case.meta("reference", **options), 1e-10)


# ------------------------------------------------------------------------------------ bits


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_gelu_and_its_slope_keep_their_relative_accuracy(dtype: torch.dtype, capability: str) -> None:
    """Every task's prediction is gelu of its own weight z; rounding z² costs e^(-z²/2) z²/2 units in the last place."""
    lowest = -8.0 if dtype == torch.float32 else -24.0  # the loss is the square
    z = torch.cat([torch.linspace(lowest, 12, 3001, dtype=F64), torch.tensor([0.0, -1e-15, 1e4], dtype=F64)]).to(dtype)
    weight = z.view(-1, 1, 1).clone().requires_grad_()
    ones, zeros = torch.ones_like(weight.detach()), torch.zeros_like(weight.detach())
    params = [weight, zeros[..., 0], ones, zeros[..., 0]]
    losses = mlp_meta_loss(params, (ones, zeros), (ones, zeros), lr=0.0, steps=1, activation="gelu", backend="cpp")
    (got,) = torch.autograd.grad(losses.sum(), weight)

    z = z.double().requires_grad_()
    exact = z * torch.special.erfc(z * -(0.5**0.5)) / 2
    (slope,) = torch.autograd.grad(exact.sum(), z)
    z, exact = z.detach(), exact.detach()
    bound = (8 + z.square()) * torch.finfo(dtype).eps
    assert bool(((losses.detach().double().sqrt() - exact.abs()).abs() <= bound * exact.abs()).all())
    density = torch.exp(-z.square() / 2)
    terms = exact / z.where(z != 0, torch.ones_like(z)) + z.abs() * density  # of the slope, where they cancel
    errors = (got.flatten().double() - 2 * exact * slope).abs()
    assert bool((errors <= 4 * bound * exact.abs() * terms.abs()).all())


@pytest.mark.sanitize
def test_gelu_of_what_is_not_finite(capability: str) -> None:
    """NaN of NaN and of minus infinity, infinity of infinity."""
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0]).repeat(5)
    ones, zeros = torch.ones(20, 1, 1), torch.zeros(20, 1, 1)
    params = [ones, zeros[..., 0], ones, zeros[..., 0]]
    query = values.view(-1, 1, 1), zeros
    losses = mlp_meta_loss(params, (ones, zeros), query, lr=0.0, steps=1, activation="gelu", backend="cpp")
    expected = torch.nn.functional.gelu(values.double()).float().square()  # its float32 has NaN of infinity
    torch.testing.assert_close(losses, expected, equal_nan=True)


@pytest.mark.sanitize
def test_same_bits_with_and_without_a_graph_and_checkpoints() -> None:
    case = Case([3, 20, 4], 19)
    expected = case.meta("cpp", steps=7, step_weights=[0.1] * 7)
    for every in (1, 3, 7, 100):
        got = case.meta("cpp", steps=7, step_weights=[0.1] * 7, checkpoint_every=every)
        for index, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert_same_bits(f"result {index}", a, b)
    with torch.no_grad():
        plain = mlp_meta_loss(case.params, case.support, case.query, lr=0.1, steps=7, step_weights=[0.1] * 7)
    assert_same_bits("losses", plain, expected[0])


# ------------------------------------------------------------------------------------ torch


def arguments(case: Case, steps: int = 2) -> tuple[Any, ...]:
    params = [p.requires_grad_() for p in case.params]
    return params, *case.support, None, [], 0.1, steps, False, -1, 1, 0, steps


def test_vmap_refuses_what_it_cannot_batch() -> None:
    case = Case([2, 4, 1], 3)
    with pytest.raises(ValueError, match="the fused inner loop under vmap needs at least one element, got 0"):
        torch.func.vmap(lambda x: mlp_inner_loop(case.params, x, case.support[1], lr=0.1, steps=2))(
            case.support[0].new_empty(0, *case.support[0].shape)
        )

    given = arguments(case)

    def with_flags(flags: Tensor) -> Any:
        return torch.ops.metakern.mlp_inner_loop.default(*given, False, flags)[0]

    with pytest.raises(ValueError, match="second_order and step_weights must be the same for all elements"):
        torch.func.vmap(with_flags)(torch.ones(4, 2, dtype=torch.bool))


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 1.5}, TypeError, "steps must be an integer, got 1.5"),
        ({"activation": "elu"}, ValueError, "activation must be one of relu, .* and identity, got 'elu'"),
        ({"activation": "tanh:1"}, ValueError, "activation must be one of .*, got 'tanh:1'"),
        ({"activation": ["relu", 3]}, ValueError, "one name, or one for each of 1 hidden layers, got .'relu', 3."),
        ({"activation": [3]}, ValueError, "activation must be one of .*, got 3"),
        ({"activation": 3}, TypeError, "activation must be a name or a list of names, got int"),
        ({"activation": "leaky_relu:x"}, ValueError, "slope of a leaky_relu must be a finite number, .*relu:x'"),
        ({"activation": "leaky_relu:-0.1"}, ValueError, "slope of a leaky_relu must be .*, not negative, got"),
        ({"activation": "leaky_relu:nan"}, ValueError, "slope of a leaky_relu must be a finite number"),
        ({"clip_norm": 0}, ValueError, "clip_norm must be positive and finite, got 0.0"),
        ({"clip_norm": -1.0}, ValueError, "clip_norm must be positive and finite, got -1.0"),
        ({"clip_norm": float("nan")}, ValueError, "clip_norm must be positive and finite, got nan"),
        ({"clip_norm": float("inf")}, ValueError, "clip_norm must be positive and finite, got inf"),
        ({"clip_norm": "1"}, TypeError, "clip_norm must be None or a number, got str"),
        ({"clip_norm": True}, TypeError, "clip_norm must be None or a number, got bool"),
        ({"loss": "l1"}, ValueError, "loss must be one of mse, .*, got 'l1'"),
        ({"first_order": [True]}, ValueError, "first_order must have one bool a step, 2, got 1"),
        ({"adapted": [True]}, ValueError, "adapted must hold a bool for each of 4 params"),
        ({"adapted": [False] * 4}, ValueError, "adapted must hold a bool for each of 4 params, one True"),
        ({"params": []}, ValueError, "params must hold weight and bias of 1 to 8 layers, got 0 tensors"),
        ({"x": torch.ones(3, 5, 7, dtype=F64)}, ValueError, r"support_x must be \[3, samples, 2\], got \[3, 5, 7\]"),
        ({"x": torch.ones(3, 0, 2, dtype=F64)}, ValueError, r"support_x must be .*, got \[3, 0, 2\]"),
        ({"x": torch.ones(3, 5, 2)}, TypeError, "support_x must be torch.float64, got torch.float32"),
        ({"y": torch.ones(3, 4, 1, dtype=F64)}, ValueError, r"support_y must have shape \[3, 5, 1\], got \[3, 4, 1\]"),
        ({"support_mask": torch.ones(3, 4) > 0}, ValueError, r"support_mask must have shape \[3, 5\], got \[3, 4\]"),
        ({"lr": [torch.ones((), dtype=F64)] * 3}, ValueError, "lr must hold no tensor, 1 or one for each of the 4"),
        (
            {"lr": [torch.ones((), dtype=torch.float32)] * 4},
            TypeError,
            r"lr\[0\] must be torch.float64, got torch.float32",
        ),
        ({"lr": [torch.ones(3, dtype=F64)] * 4}, ValueError, r"lr\[0\] must hold 1 or 8 rates, got \[3\]"),
        ({"backend": "cuda"}, RuntimeError, "backend 'cuda' cannot run: the CUDA kernels serve tensors on cuda"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    case = Case([2, 4, 1], 3)
    values: dict[str, Any] = {"params": case.params, "x": case.support[0], "y": case.support[1], "lr": 0.1, "steps": 2}
    values |= change
    with pytest.raises(error, match=message):
        mlp_inner_loop(values.pop("params"), values.pop("x"), values.pop("y"), **values)


@pytest.mark.sanitize
@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_labels_without_an_output(label: int) -> None:
    case = Case([2, 4, 3], 3, loss="cross_entropy")
    case.query[1][1, 2] = label
    with pytest.raises(ValueError, match=f"query_y must be 0 to 2, as the model has 3 outputs, got {label}"):
        mlp_meta_loss(case.params, case.support, case.query, lr=0.1, steps=1, loss="cross_entropy")


@pytest.mark.sanitize
def test_tasks_of_own_parameters_must_be_as_many() -> None:
    case = Case([2, 4, 1], 3, own=True)
    with pytest.raises(ValueError, match=r"params\[0\] must share the task axis, T = 2, got \[3, 4, 2\]"):
        mlp_inner_loop(case.params, case.support[0][:2], case.support[1][:2], lr=0.1, steps=1)


def backward_arguments(name: str) -> list[Any]:
    """Arguments of the backward operator, for 3 tasks, 2 steps and 17 parameters per task."""
    case, steps = Case([2, 4, 1], 3), 2
    params, x, y, mask, lr, rate, *scalars = arguments(case, steps)
    params = [p.detach() for p in params]
    second_order = torch.ones(steps, dtype=torch.bool)
    if name == "mlp_inner_loop":
        adapted, trajectory = torch.ops.metakern.mlp_inner_loop(
            params, x, y, mask, lr, rate, *scalars, True, second_order
        )
        return [adapted, trajectory, params, x, y, mask, lr, rate, *scalars, second_order]
    weights = torch.tensor([0.0, 1.0], dtype=F64)
    sets = x, y, mask, *case.query, None
    losses, task_grads = torch.ops.metakern.mlp_meta_loss(
        params, *sets, lr, rate, *scalars, second_order, weights, True
    )
    return [losses, task_grads, params, x, y, lr, steps, False, 0]


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("name", "index", "change", "message"),
    [
        ("mlp_inner_loop", 0, lambda xs: xs[:3], "grad_adapted must hold one tensor for each of params, 4, got 3"),
        (
            *("mlp_inner_loop", 0, lambda xs: [xs[0][:2], *xs[1:]]),
            r"grad_adapted\[0\] must have the shape of the adapted tensor, got \[2, 4, 2\]",
        ),
        (
            "mlp_inner_loop",
            0,
            lambda xs: [x.float() for x in xs],
            r"grad_adapted\[0\] must be torch.float64, got torch.f",
        ),
        ("mlp_inner_loop", 1, lambda x: x[:-1], "trajectory must be the one of this problem, got 271 elements"),
        ("mlp_inner_loop", 1, lambda x: x.float(), "trajectory must be torch.float64, got torch.float32"),
        ("mlp_inner_loop", -2, lambda _: 1, "trajectory must be the one of this problem, got 272 elements"),
        ("mlp_inner_loop", -2, lambda _: 0, "checkpoint_every must be 1 to 2, got 0"),
        ("mlp_inner_loop", -1, lambda x: x[:1], r"second_order must have shape \[2\], got \[1\]"),
        ("mlp_meta_loss", 0, lambda x: x[:2], r"grad_losses must have shape \[3\], got \[2\]"),
        ("mlp_meta_loss", 0, lambda x: x.float(), "grad_losses must be torch.float64, got torch.float32"),
        ("mlp_meta_loss", 1, lambda x: x.float(), "task_grads must be torch.float64, got torch.float32"),
        ("mlp_meta_loss", 1, lambda x: x[:-1], "task_grads must be those of this problem, got 271 elements"),
    ],
)
def test_backward_operators_called_directly_guard_memory(name: str, index: int, change: Any, message: str) -> None:
    call = backward_arguments(name)
    operator = getattr(torch.ops.metakern, f"{name}_backward")
    operator(*call)
    call[index] = change(call[index])
    with pytest.raises(TypeError if "torch.f" in message else ValueError, match=message):
        operator(*call)
