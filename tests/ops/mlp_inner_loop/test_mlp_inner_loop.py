"""mlp_inner_loop and mlp_meta_loss: the compiled inner loops against the reference, bit by bit and from bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from metakern.ops import mlp_inner_loop, mlp_meta_loss
from metakern.ops.mlp_inner_loop import ACTIVATIONS
from metakern.ops.mlp_inner_loop.reference import LOSSES
from tests.conftest import GRADIENT_TOLERANCE, assert_close, assert_same_bits
from tests.mlp_problems import Case, assert_equal

F64 = torch.float64

#: Of activations, each kind and another slope.
NAMES = (*ACTIVATIONS, "leaky_relu:0.5", "identity")


# ------------------------------------------------------------------------------------ against the reference


@settings(max_examples=80, deadline=None)
@given(
    tasks=st.sampled_from((1, 2, 7, 16, 33)),
    samples=st.integers(1, 20),
    steps=st.integers(1, 4),
    widths=st.lists(st.integers(1, 14), min_size=2, max_size=5),
    activation=st.sampled_from(ACTIVATIONS) | st.lists(st.sampled_from(NAMES), min_size=3, max_size=3),
    clip_norm=st.sampled_from((None, None, 0.1, 2.0)),
    loss=st.sampled_from(LOSSES),
    first_order=st.booleans(),
    every=st.sampled_from((None, 1, 2, 3)),
    own=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_reference(
    tasks: int,
    samples: int,
    steps: int,
    widths: list[int],
    activation: str | list[str],
    clip_norm: float | None,
    loss: str,
    first_order: bool,
    every: int | None,
    own: bool,
    seed: int,
) -> None:
    assume(loss != "cross_entropy" or widths[-1] > 1)  # of one class it is zero, and so is every gradient
    case = Case(widths, tasks, samples, loss=loss, own=own, seed=seed)
    names = activation if isinstance(activation, str) else activation[: len(widths) - 2]
    options = {"steps": steps, "activation": names, "first_order": first_order, "checkpoint_every": every}
    options["clip_norm"] = clip_norm
    assert_equal(case.meta("cpp", **options), case.meta("reference", **options), 1e-10)
    assert_equal(case.adapt("cpp", **options), case.adapt("reference", **options), 1e-10)


@pytest.mark.sanitize
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float32_on_every_instruction_set(activation: str, loss: str, capability: str) -> None:
    case = Case([3, 40, 17, 5], 17, 10, 10, loss)
    options = {"steps": 5, "activation": activation, "lr": 0.05}
    expected = case.meta("reference", **options)
    assert_equal(case.meta("cpp", torch.float32, **options), expected, GRADIENT_TOLERANCE[torch.float32])
    assert_equal(case.meta("cpp", **options), expected, 1e-10)
    assert_equal(case.adapt("cpp", **options), case.adapt("reference", **options), 1e-10)


@pytest.mark.sanitize
@pytest.mark.parametrize("loss", LOSSES)
def test_models_too_large_for_lanes(loss: str, capability: str) -> None:
    case = Case([90, 100, 3], 3, 9, 11, loss)
    options = {"steps": 2, "activation": "tanh", "lr": 0.05}
    assert_equal(case.meta("cpp", **options), case.meta("reference", **options), 1e-10)
    assert_equal(case.adapt("cpp", **options), case.adapt("reference", **options), 1e-10)


@pytest.mark.sanitize
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("tasks", [1, 15, 16, 17, 33])
def test_groups_of_tasks_that_are_not_full(tasks: int, dtype: torch.dtype, own: bool, capability: str) -> None:
    """With odd widths, learned rates of every step, masks, weights of steps and a last segment of one step."""
    case, steps = Case([3, 7, 5, 1], tasks, 17, 3, own=own), 5
    masks = [torch.rand(tasks, samples, generator=case.generator) < 0.6 for samples in (17, 3)]
    for mask in masks:
        mask[:, -1] = True
    lr = [0.1 + 0.05 * case.draw(steps, *(p.shape[1:] if own else p.shape)) for p in case.params]
    options = {"lr": lr, "steps": steps, "per_step": True, "support_mask": masks[0], "checkpoint_every": 2}
    weights = {"query_mask": masks[1], "step_weights": [0.2, 0.0, 0.1, 0.0, 0.7]}
    pairs = [
        [case.adapt(backend, d, **options), case.meta(backend, d, **options, **weights)]
        for backend, d in (("cpp", dtype), ("reference", F64))
    ]
    for got, expected in zip(*pairs, strict=True):
        assert_equal(got, expected, 1e-10 if dtype == F64 else GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("steps_of", ["tensor", "parameter", "step", "step and parameter"])
@pytest.mark.parametrize("first_order", [False, True, (False, True, False)])
def test_learned_rates(steps_of: str, first_order: Any) -> None:
    case, steps = Case([2, 9, 3], 11), 3
    lead = (steps,) if "step" in steps_of else ()
    shapes = [(*lead, *p.shape) if "parameter" in steps_of else lead for p in case.params]
    lr = [0.1 + 0.05 * case.draw(*shape) for shape in shapes]
    options = {"lr": lr, "steps": steps, "per_step": bool(lead), "first_order": first_order, "activation": "tanh"}
    assert_equal(case.meta("cpp", **options), case.meta("reference", **options), 1e-10)
    assert_equal(case.adapt("cpp", **options), case.adapt("reference", **options), 1e-10)
    if steps_of == "tensor":  # one for everything
        params, rate = [p.requires_grad_() for p in case.params], torch.tensor(0.1, dtype=F64, requires_grad=True)
        gradients = []
        for backend in ("cpp", "reference"):
            losses = mlp_meta_loss(params, case.support, case.query, lr=rate, steps=2, backend=backend)
            gradients.append(torch.autograd.grad(losses.sum(), [rate, *params]))
        assert_equal(*(list(g) for g in gradients), 1e-10)


@pytest.mark.sanitize
def test_parameters_that_do_not_adapt_receive_meta_gradients() -> None:
    case = Case([2, 9, 3], 11)
    options = {"steps": 3, "adapted": [False, False, True, True], "activation": "sigmoid"}
    got = case.adapt("cpp", **options)
    assert_same_bits("body", got[0], case.params[0].expand(11, 9, 2))
    assert_equal(got, case.adapt("reference", **options), 1e-10)
    assert_equal(case.meta("cpp", **options), case.meta("reference", **options), 1e-10)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("every", [None, 2])
def test_masks_and_weights_of_steps(loss: str, every: int | None) -> None:
    case = Case([2, 9, 3], 18, 6, 5, loss)
    masks = [torch.rand(18, n, generator=case.generator) < 0.6 for n in (6, 5)]
    for mask in masks:
        mask[:, 1] = True
    options = {"steps": 4, "support_mask": masks[0], "query_mask": masks[1], "checkpoint_every": every}
    options["step_weights"] = [0.3, 0.0, 0.2, 0.5]
    assert_equal(case.meta("cpp", **options), case.meta("reference", **options), 1e-10)


def test_central_differences() -> None:
    case = Case([2, 4, 1], 3)
    gradients = case.meta("cpp", steps=3, activation="gelu")[1:]
    weights = torch.linspace(0.5, 1.5, 3, dtype=F64)
    for p, gradient in zip(case.params, gradients, strict=True):
        for index in range(p.numel()):
            values = []
            for offset in (1e-5, -1e-5):
                p.view(-1)[index] += offset
                losses = mlp_meta_loss(case.params, case.support, case.query, lr=0.1, steps=3, activation="gelu")
                values.append((losses * weights).sum())
                p.view(-1)[index] -= offset
            assert_close("derivative", gradient.view(-1)[index], (values[0] - values[1]) / 2e-5, 1e-6)


def test_large_arguments_of_the_losses() -> None:
    for loss in ("cross_entropy", "binary_cross_entropy_with_logits"):
        case = Case([2, 3, 3], 5, loss=loss)
        case.params[2] *= 300
        options = {"steps": 1, "lr": 1e-4, "activation": "tanh"}
        got, want = case.meta("cpp", **options), case.meta("reference", **options)
        assert want[0].isfinite().all()
        assert_equal(got, want, 1e-10)


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
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    case, results = Case([3, 20, 4], 67), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(case.meta("cpp", dtype, steps=3) + case.adapt("cpp", dtype, steps=3))
    for other in results[1:]:
        for index, (a, b) in enumerate(zip(results[0], other, strict=True)):
            assert_same_bits(f"result {index}", a, b)


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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["support", "query", "params"])
@pytest.mark.parametrize("task", [5, 17])  # one in a group of lanes, one by itself
def test_a_task_that_is_not_finite_leaves_the_others_alone(task: int, where: str, value: float) -> None:
    case = Case([2, 9, 3], 18, own=True)
    before = case.meta("cpp", steps=2)
    spoiled = {"support": case.support[0], "query": case.query[0], "params": case.params[0]}[where]
    spoiled[task].view(-1)[0] = value
    after = case.meta("cpp", steps=2)
    others = torch.arange(18) != task
    for index, (a, b) in enumerate(zip(after, before, strict=True)):
        assert_same_bits(f"result {index}", a[others], b[others])
    assert not after[0][task].isfinite()
    assert not after[1][task].isfinite().all()


# ------------------------------------------------------------------------------------ torch


def arguments(case: Case, steps: int = 2) -> tuple[Any, ...]:
    params = [p.requires_grad_() for p in case.params]
    return params, *case.support, None, [], 0.1, steps, False, -1, 1, 0, steps


@pytest.mark.parametrize("name", ["mlp_inner_loop", "mlp_meta_loss"])
def test_opcheck(name: str) -> None:
    case, steps = Case([2, 4, 1], 3), 2
    params, x, y, mask, *rest = arguments(case, steps)
    flags = torch.ones(steps, dtype=torch.bool)
    if name == "mlp_inner_loop":
        args = (params, x, y, mask, *rest, True, flags)
    else:
        weights = torch.tensor([0.0, 1.0], dtype=F64)
        args = (params, x, y, mask, *case.query, None, *rest, flags, weights, True)
    torch.library.opcheck(getattr(torch.ops.metakern, name).default, args)


@pytest.mark.parametrize("call", ["meta", "adapt"])
def test_torch_compile(call: str) -> None:
    case = Case([2, 6, 3], 5)
    lr = [torch.full((3,), 0.1, dtype=F64) for _ in case.params]
    expected = getattr(case, call)("cpp", lr=lr, steps=3, per_step=True)

    def function(params: list[Tensor], rates: list[Tensor]) -> Any:
        if call == "meta":
            return mlp_meta_loss(params, case.support, case.query, lr=rates, steps=3, per_step=True)
        return mlp_inner_loop(params, *case.support, lr=rates, steps=3, per_step=True)

    params, rates = [p.requires_grad_() for p in case.params], [r.requires_grad_() for r in lr]
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(params, rates)
    if call == "meta":
        total, results = (got * torch.linspace(0.5, 1.5, 5, dtype=F64)).sum(), [got]
    else:
        total = sum((r * torch.linspace(-1, 1, r.numel(), dtype=F64).view(r.shape)).sum() for r in got)
        results = list(got)
    for index, (a, b) in enumerate(
        zip([*results, *torch.autograd.grad(total, [*params, *rates])], expected, strict=True)
    ):
        assert_same_bits(f"result {index}", a, b)


@pytest.mark.parametrize("call", [mlp_inner_loop, mlp_meta_loss])
def test_a_second_derivative_raises(call: Any) -> None:
    case = Case([2, 4, 1], 3)
    params = [p.requires_grad_() for p in case.params]
    sets = (case.support, case.query) if call is mlp_meta_loss else case.support
    result = call(params, *sets, lr=0.1, steps=2)
    total = result.sum() if isinstance(result, Tensor) else sum(r.sum() for r in result)
    gradient = torch.autograd.grad(total, params, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again; backend='reference' takes"):
        (total + gradient.sum()).backward()


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
    """Of the backward operator, for 3 tasks, 2 steps and 17 parameters a task."""
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
