"""task_norm_act_pool: PyTorch's three operators task by task, ties and NaN, statistics, derivatives, errors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

from metakern.ops import task_norm_act_pool
from tests.conftest import assert_close, assert_same_bits

F32, F64 = torch.float32, torch.float64

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=F64).to(dtype)


def by_pytorch(x: Tensor, gamma: Tensor, beta: Tensor, activation: Any = F.relu, pool: bool = True) -> Tensor:
    """A loop over the tasks, with PyTorch's own operators and batch statistics."""
    rows = [F.batch_norm(a, None, None, g, b, True) for a, g, b in zip(x, gamma, beta, strict=True)]
    return torch.stack([F.max_pool2d(activation(y), 2) if pool else activation(y) for y in rows])


ACTIVATIONS: dict[str, Any] = {
    "relu": F.relu,
    "leaky_relu": lambda y: F.leaky_relu(y, 0.1),
    "identity": lambda y: y,
}


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [(2, 2), (5, 7), (28, 28), (21, 84)])
def test_values_and_two_derivatives_are_those_of_pytorchs_operators(
    size: tuple[int, int], activation: str, pool: bool, capability: str
) -> None:
    def outcome(op: Any) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in (draw(2, 3, 3, *size), draw(2, 3), draw(2, 3, seed=1))]
        y = op(*leaves)
        seed = draw(*y.shape, seed=2).requires_grad_()
        first = torch.autograd.grad(y, leaves, seed, create_graph=True)
        slope = torch.stack([(x.tanh() * draw(*x.shape, seed=3)).sum() for x in first]).sum()
        return [y, *first, *torch.autograd.grad(slope, [seed, *leaves[:2]])]

    options: dict[str, Any] = {"activation": activation, "slope": 0.1, "pool": pool}
    got = outcome(lambda *leaves: task_norm_act_pool(*leaves, **options)[0])
    want = outcome(lambda *leaves: by_pytorch(*leaves, ACTIVATIONS[activation], pool))
    for name, a, b in zip(("y", "x", "gamma", "beta", "seed", "x again", "gamma again"), got, want, strict=True):
        assert_close(name, a, b, 1e-10)


def test_a_block_of_conv4_in_float32_is_as_close_as_pytorch_is() -> None:
    leaves = [draw(1, 75, 8, 28, 28, dtype=F32) + 3, draw(1, 8, dtype=F32), draw(1, 8, seed=1, dtype=F32)]
    wide = by_pytorch(*(x.double() for x in leaves))
    ours, pytorchs = (float((y - wide).abs().max()) for y in (task_norm_act_pool(*leaves)[0], by_pytorch(*leaves)))
    assert ours <= 2 * pytorchs


# ---------------------------------------------------------------------------------------------------- ties, NaN


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_of_equal_pixels_the_first_takes_the_gradient_as_in_pytorch(activation: str, capability: str) -> None:
    """Every window of pixels from -1, 0, 1."""
    pixels = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0], dtype=F32)] * 4)  # [81, 4]
    x = pixels.view(1, 81, 1, 2, 2)
    assert_gradient_is_pytorchs(x, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_wins_its_window_as_in_pytorch(activation: str, capability: str) -> None:
    """Every window of NaN, infinities and one number."""
    pixels = torch.cartesian_prod(*[torch.tensor([torch.nan, -torch.inf, torch.inf, 0.5], dtype=F32)] * 4)
    assert_gradient_is_pytorchs(pixels.view(1, 256, 1, 2, 2), activation)


def assert_gradient_is_pytorchs(x: Tensor, activation: str) -> None:
    """Of values that are not normalised, so that they stay as they are; as one image that is many windows wide too."""
    for images in (x, x.movedim(1, 3).reshape(1, 1, 1, 2, -1)):
        found = []
        for op in (
            lambda x: task_norm_act_pool(x, statistics="none", activation=activation, slope=0.1)[0],
            lambda x: F.max_pool2d(ACTIVATIONS[activation](x[0]), 2)[None],
        ):
            leaf = images.clone().requires_grad_()
            y = op(leaf)
            found.append([y, *torch.autograd.grad(y, leaf, torch.arange(1.0, y.numel() + 1).view(y.shape))])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_a_constant_channel_becomes_beta() -> None:
    x = torch.full((1, 5, 2, 9, 9), 1234.567, dtype=F32)
    y, mean, var = task_norm_act_pool(x, beta=torch.tensor([[0.5, -0.5]]), activation="identity")
    assert torch.equal(y, torch.tensor([0.5, -0.5]).view(1, 1, 2, 1, 1).expand_as(y))
    assert torch.equal(var, torch.zeros(1, 2))
    assert torch.equal(mean, x[:, 0, :, 0, 0])


# --------------------------------------------------------------------------------------------------- statistics


def test_the_statistics_update_running_ones_as_batch_norm_does() -> None:
    x = draw(3, 4, 2, 5, 6) * 2 + 1
    _, mean, var = task_norm_act_pool(x)
    for t in range(3):
        norm = torch.nn.BatchNorm2d(2, dtype=F64)
        norm(x[t])
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert_close("mean", 0.1 * mean[t], norm.running_mean, 1e-12)
        assert_close("var", 0.9 + 0.1 * var[t] * 120 / 119, norm.running_var, 1e-12)
    given = draw(3, 2), draw(3, 2, seed=1).exp()
    _, *found = task_norm_act_pool(x, None, None, *given, statistics="given")
    for got, want in zip(found, given, strict=True):
        assert_same_bits("given statistics", got, want)
        assert got.data_ptr() != want.data_ptr()
    _, mean, var = task_norm_act_pool(x, statistics="none")
    assert torch.equal(mean, torch.zeros(3, 2, dtype=F64))
    assert torch.equal(var, torch.ones(3, 2, dtype=F64))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_the_statistics_are_constants(backend: str) -> None:
    x = draw(2, 3, 2, 4, 4).requires_grad_()
    y, mean, var = task_norm_act_pool(x, backend=backend)
    assert (y.requires_grad, mean.requires_grad, var.requires_grad) == (True, False, False)

    def through_mean(x: Tensor) -> Tensor:
        y, mean, _ = task_norm_act_pool(x, backend=backend)
        return y.sin().sum() + mean.square().sum()

    want = grad(lambda x: task_norm_act_pool(x, backend=backend)[0].sin().sum())(x)
    assert_close("gradient", grad(through_mean)(x), want, 1e-12)


def test_given_statistics_have_no_derivative() -> None:
    given = [draw(2, 3).requires_grad_(), draw(2, 3, seed=1).exp()]
    with pytest.raises(RuntimeError, match="task_norm_act_pool provides no gradient of running_mean"):
        task_norm_act_pool(draw(2, 3, 3, 4, 4), None, None, *given, statistics="given")


# -------------------------------------------------------------------------------------------------- derivatives


def test_a_third_derivative_is_refused() -> None:
    x = draw(1, 2, 2, 4, 4).requires_grad_()
    value = task_norm_act_pool(x)[0].square().sum()
    for _ in range(2):
        (found,) = torch.autograd.grad(value, x, create_graph=True)
        value = found.square().sum()
    with pytest.raises(RuntimeError, match=r"task_norm_act_pool's backward provides no second .*='reference' does"):
        torch.autograd.grad(value, x)


def test_autograd_keeps_the_input_two_numbers_a_channel_and_a_byte_an_output() -> None:
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    x, gamma, beta = (t.requires_grad_() for t in (draw(2, 3, 4, 6, 8, dtype=F32), *[draw(2, 4, dtype=F32)] * 2))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        task_norm_act_pool(x, gamma, beta)
    sizes = sorted(t.numel() * t.element_size() for t in kept if t.data_ptr() not in (x.data_ptr(), gamma.data_ptr()))
    assert sizes == [2 * 4 * 4, 2 * 4 * 4, 2 * 3 * 4 * 3 * 4]


def test_vmap_of_a_block_is_one_call_for_all_tasks() -> None:
    """As an inner loop calls it, with a task of its own in every lane; forward, backward and its derivative."""
    x, gamma, beta = draw(4, 3, 2, 6, 6), draw(4, 2), draw(4, 2, seed=1)
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if str(func).startswith("metakern."):
                calls.append((str(func).removeprefix("metakern.task_norm_act_pool"), args[0].shape[0]))
            return func(*args, **(kwargs or {}))

    def loss(op: Any) -> Any:
        def adapted(gamma: Tensor, beta: Tensor, x: Tensor) -> Tensor:
            step = grad(lambda gamma: op(x[None], gamma[None], beta[None]).square().sum())(gamma)
            return op(x[None], (gamma - 0.1 * step)[None], beta[None]).sin().sum()

        return adapted

    with Count():
        got = vmap(grad(loss(lambda *a: task_norm_act_pool(*a)[0]), argnums=(0, 1, 2)))(gamma, beta, x)
    assert [n for _, n in calls] == [4] * len(calls)
    assert [name.removesuffix(".default") for name, _ in calls] == [
        *("", "_backward"),  # the inner step
        *("", "_backward", "_backward_backward", "_backward"),
    ]
    want = vmap(grad(loss(by_pytorch), argnums=(0, 1, 2)))(gamma, beta, x)
    for a, b in zip(got, want, strict=True):
        assert_close("gradient", a, b, 1e-10)


def test_a_block_of_a_network_in_its_place() -> None:
    """functional_call of a convolution and the operator, compared with the modules."""
    modules = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3, padding=1),
        torch.nn.BatchNorm2d(3, track_running_stats=False),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
    ).double()
    params = {name: p.detach() for name, p in modules.named_parameters()}
    x = draw(5, 2, 7, 9)

    def ours(params: dict[str, Tensor]) -> Tensor:
        y = F.conv2d(x, params["0.weight"], params["0.bias"], padding=1)
        return task_norm_act_pool(y[None], params["1.weight"][None], params["1.bias"][None])[0][0].sin().sum()

    got, want = grad(ours)(params), grad(lambda p: functional_call(modules, p, x).sin().sum())(params)
    for name in params:
        scale = want["0.weight"].abs().max()  # the gradient of a bias before batch norm is zero
        assert float((got[name] - want[name]).abs().max()) < 1e-12 * scale, name


# ------------------------------------------------------------------------------------------------- same bits


def test_threads_and_the_order_of_tasks_change_no_bit(threads: None) -> None:
    x, gamma, beta = draw(5, 3, 7, 9, 12, dtype=F32), draw(5, 7, dtype=F32), draw(5, 7, seed=1, dtype=F32)
    order = torch.tensor([3, 0, 4, 1, 2])

    def outcome(*leaves: Tensor) -> list[Tensor]:
        leaves = tuple(t.clone().requires_grad_() for t in leaves)
        y, mean, var = task_norm_act_pool(*leaves)
        first = torch.autograd.grad(y.sin().sum((1, 2, 3, 4)).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(torch.stack([t.sin().sum() for t in first]).sum(), leaves[:2])
        return [y, mean, var, *first, *second]

    want = outcome(x, gamma, beta)
    for count in (2, 3):
        torch.set_num_threads(count)
        for a, b in zip(outcome(x, gamma, beta), want, strict=True):
            assert_same_bits("result by other threads", a, b)
        for a, b in zip(outcome(x[order], gamma[order], beta[order]), want, strict=True):
            assert_same_bits("result of tasks in another order", a, b[order])


@pytest.mark.parametrize("order", ["channels last", "tasks last", "reversed view"])
def test_inputs_in_any_memory_order_give_the_same_bits(order: str) -> None:
    def moved(x: Tensor) -> Tensor:
        if order == "channels last":
            return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
        if order == "tasks last":
            return x.movedim(0, -1).contiguous().movedim(-1, 0)
        return x.flip(-1).contiguous().flip(-1)

    def outcome(change: Any) -> list[Tensor]:
        leaves = [draw(2, 3, 4, 6, 5, dtype=F32), draw(2, 4, dtype=F32), draw(2, 4, seed=1, dtype=F32)]
        x = change(leaves[0]).detach().requires_grad_()
        y, mean, var = task_norm_act_pool(x, *leaves[1:])
        return [y, mean, var, *torch.autograd.grad(y, x, change(draw(*y.shape, dtype=F32)))]

    for got, want in zip(outcome(moved), outcome(lambda x: x), strict=True):
        assert_same_bits("result", got, want)


# ------------------------------------------------------------------------------------------------------ errors

SIZE = (2, 3, 4, 6, 5)

BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("axes", lambda **b: task_norm_act_pool(draw(3, 4, 6, 5), **b), ValueError, "x must have shape [T, S, C, H, W]"),
    ("half", lambda **b: task_norm_act_pool(draw(*SIZE).half(), **b), TypeError, "float32 or float64, got"),
    ("channels", lambda **b: task_norm_act_pool(draw(2, 3, 0, 6, 5), **b), ValueError, "at least one channel"),
    ("one row", lambda **b: task_norm_act_pool(draw(2, 3, 4, 1, 5), **b), ValueError, "x must have at least 2 rows"),
    ("one column", lambda **b: task_norm_act_pool(draw(2, 3, 4, 5, 1), **b), ValueError, "at least 2 columns"),
    ("gamma", lambda **b: task_norm_act_pool(draw(*SIZE), draw(4), **b), ValueError, "gamma must have shape [2, 4]"),
    (
        "beta",
        lambda **b: task_norm_act_pool(draw(*SIZE), None, draw(2, 4).float(), **b),
        TypeError,
        "beta must have the dtype of x, torch.float64, got torch.float32",
    ),
    (
        "missing statistics",
        lambda **b: task_norm_act_pool(draw(*SIZE), statistics="given", **b),
        ValueError,
        "running_mean must be a tensor with these statistics, got None",
    ),
    (
        "unused statistics",
        lambda **b: task_norm_act_pool(draw(*SIZE), running_var=draw(2, 4), **b),
        ValueError,
        "running_var must be None with these statistics, got a tensor",
    ),
    ("eps", lambda **b: task_norm_act_pool(draw(*SIZE), eps=0.0, **b), ValueError, "eps must be positive and finite"),
    ("slope", lambda **b: task_norm_act_pool(draw(*SIZE), slope=-0.1, **b), ValueError, "slope must be finite and at"),
    ("word", lambda **b: task_norm_act_pool(draw(*SIZE), activation="gelu", **b), ValueError, "one of relu, leaky_"),
    ("no word", lambda **b: task_norm_act_pool(draw(*SIZE), statistics=1, **b), TypeError, "statistics must be a str"),
    ("pool", lambda **b: task_norm_act_pool(draw(*SIZE), pool=2, **b), TypeError, "pool must be a bool, got int"),
    ("number", lambda **b: task_norm_act_pool(draw(*SIZE), eps="small", **b), TypeError, "eps must be a number"),
]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(("case", "call", "error", "message"), BAD, ids=[row[0] for row in BAD])
def test_bad_arguments_are_named(case: str, call: Any, error: type[Exception], message: str, backend: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(backend=backend)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_batch_statistics_of_one_value_raise_pytorchs_error(backend: str) -> None:
    x = draw(2, 1, 3, 1, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value") as pytorchs:
        F.batch_norm(x[0], None, None, training=True)
    with pytest.raises(ValueError, match=f"^{re.escape(str(pytorchs.value))}$"):
        task_norm_act_pool(x, pool=False, backend=backend)
    y, *_ = task_norm_act_pool(x, statistics="none", pool=False, activation="identity", backend=backend)
    assert torch.equal(y, x)
