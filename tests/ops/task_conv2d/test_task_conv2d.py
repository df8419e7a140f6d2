"""task_conv2d: PyTorch's convolution task by task, options that no kernel serves, higher derivatives, errors."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from metakern.core import backend as _backend
from metakern.ops import task_conv2d, task_conv2d_input, task_conv2d_weight
from tests.conftest import assert_close, assert_same_bits

F64 = torch.float64

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=F64).to(dtype)


def by_loop(x: Tensor, weight: Tensor, bias: Tensor | None = None, *options: Any) -> Tensor:
    """A loop over the tasks."""
    biases = [None] * len(x) if bias is None else bias
    return torch.stack([F.conv2d(a, w, b, *options) for a, w, b in zip(x, weight, biases, strict=True)])


@pytest.mark.parametrize("options", [(1, 1), ((2, 1), (0, 3)), (2, 0, 2), (1, (1, 0), 1, 3), (2, 1, (1, 2), 3)])
def test_every_option_of_pytorch(options: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_warned", set())
    groups = options[3] if len(options) > 3 else 1
    x, weight, bias = draw(2, 3, 6, 9, 7), draw(2, 9, 6 // groups, 3, 3), draw(2, 9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = task_conv2d(x, weight, bias, *options)
    assert_close("y", y, by_loop(x, weight, bias, *options), 1e-12)
    assert [w.category for w in caught] == ([_backend.FallbackWarning] if len(options) > 2 else [])


def test_a_backend_asked_for_by_name_refuses_what_it_does_not_serve() -> None:
    with pytest.raises(RuntimeError, match=r"backend 'cpp' cannot run: .*dilation 1 and groups 1"):
        task_conv2d(draw(1, 1, 2, 5, 5), draw(1, 2, 1, 3, 3), groups=2, backend="cpp")


@pytest.mark.parametrize("order", ["channels last", "tasks last", "gaps", "reversed view"])
def test_inputs_in_any_memory_order_give_the_same_bits(order: str) -> None:
    def moved(x: Tensor) -> Tensor:
        if order == "channels last":
            return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
        if order == "tasks last":
            return x.movedim(0, -1).contiguous().movedim(-1, 0)
        wide = torch.stack([x, x + 1], -1)
        return wide[..., 0] if order == "gaps" else x.flip(-1).contiguous().flip(-1)

    x, weight = draw(2, 3, 4, 6, 5, dtype=torch.float32), draw(2, 7, 4, 3, 3, dtype=torch.float32)
    g = draw(2, 3, 7, 6, 5, dtype=torch.float32)
    assert_same_bits("y", task_conv2d(moved(x), moved(weight), None, 1, 1), task_conv2d(x, weight, None, 1, 1))
    got, want = task_conv2d_input(moved(g), moved(weight), (6, 5), 1, 1), task_conv2d_input(g, weight, (6, 5), 1, 1)
    assert_same_bits("gradient by x", got, want)
    pairs = zip(task_conv2d_weight(moved(x), moved(g), 3, 1, 1), task_conv2d_weight(x, g, 3, 1, 1), strict=True)
    for got, want in pairs:
        assert_same_bits("gradients by weight and bias", got, want)


@pytest.mark.parametrize("stride", [1, 2])
def test_third_derivatives(stride: int) -> None:
    """Three inner products with derivatives, each by all arguments, against PyTorch's own convolution."""

    def third(conv: Any) -> list[Tensor]:
        leaves = [draw(2, 2, 2, 5, 4), 0.5 * draw(2, 3, 2, 3, 3), draw(2, 3)]
        leaves = [x.requires_grad_() for x in leaves]
        value = conv(*leaves, stride, 1).tanh().square().sum()
        for seed in range(2):
            found = torch.autograd.grad(value, leaves, create_graph=True)
            value = torch.stack([(x.tanh() * draw(*x.shape, seed=seed)).sum() for x in found]).sum()
        return list(torch.autograd.grad(value, leaves))

    for got, want in zip(third(task_conv2d), third(by_loop), strict=True):
        assert float(want.abs().max()) > 1e-3
        assert_close("third derivative", got, want, 1e-10)


def test_vmap_of_a_convolution_is_one_call_for_all_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an inner loop calls it: every task has a convolution of its own, or shares the weights."""
    x, weight = draw(4, 3, 2, 6, 6), draw(4, 5, 2, 3, 3)

    def one(x: Tensor, weight: Tensor) -> Tensor:
        return task_conv2d(x[None], weight[None], padding=1)[0]

    calls = []
    kernel = torch.ops.metakern.task_conv2d.default

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is kernel:
                calls.append(tuple(args[0].shape[:2]))
            return func(*args, **(kwargs or {}))

    with Count():
        own, shared = vmap(one)(x, weight), vmap(one, in_dims=(0, None))(x, weight[0])
    assert calls == [(4, 3), (1, 12)]
    assert_close("own weights", own, by_loop(x, weight, None, 1, 1), 1e-12)
    assert_close("shared weights", shared, by_loop(x, weight[:1].expand_as(weight), None, 1, 1), 1e-12)
    got = vmap(grad(lambda w, x: one(x, w).square().sum()))(weight, x)
    want = grad(lambda w: by_loop(x, w, None, 1, 1).square().sum())(weight)
    assert_close("gradients", got, want, 1e-12)


IMAGES, WEIGHT, GRAD = (2, 3, 4, 6, 5), (2, 7, 4, 3, 3), (2, 3, 7, 4, 3)

BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("small", lambda **b: task_conv2d(draw(2, 3, 4, 2, 5), draw(*WEIGHT), **b), ValueError, "x must have at least as"),
    ("no image", lambda **b: task_conv2d(draw(2, 4, 6, 5), draw(*WEIGHT), **b), ValueError, "x must have shape [T, S"),
    ("channels", lambda **b: task_conv2d(draw(*IMAGES), draw(2, 7, 3, 3, 3), **b), ValueError, "[2, 7, 4, 3, 3] for"),
    ("no kernel", lambda **b: task_conv2d(draw(*IMAGES), draw(2, 7, 4, 0, 3), **b), ValueError, "at least one of rows"),
    ("no rows", lambda **b: task_conv2d(draw(*IMAGES), draw(2, 0, 4, 3, 3), **b), ValueError, "one output channel"),
    ("half", lambda **b: task_conv2d(draw(*IMAGES).half(), draw(*WEIGHT), **b), TypeError, "float32 or float64, got"),
    (
        "mixed",
        lambda **b: task_conv2d(draw(*IMAGES), draw(*WEIGHT).float(), **b),
        TypeError,
        "must have the dtype of x",
    ),
    (
        "bias",
        lambda **b: task_conv2d(draw(*IMAGES), draw(*WEIGHT), draw(7), **b),
        ValueError,
        "bias must have shape [2",
    ),
    ("stride", lambda **b: task_conv2d(draw(*IMAGES), draw(*WEIGHT), None, 0, **b), ValueError, "stride must be 1 to"),
    ("pairs", lambda **b: task_conv2d(draw(*IMAGES), draw(*WEIGHT), None, (1, 1, 1), **b), ValueError, "hold 2 integ"),
    ("words", lambda **b: task_conv2d(draw(*IMAGES), draw(*WEIGHT), None, 1, "same", **b), TypeError, "got 'same'"),
    (
        "size",
        lambda **b: task_conv2d_input(draw(*GRAD), draw(*WEIGHT), (7, 5), **b),
        ValueError,
        "grad must have shape",
    ),
    ("kernel", lambda **b: task_conv2d_weight(draw(*IMAGES), draw(*GRAD), 2, **b), ValueError, "grad must have shape"),
    ("tasks", lambda **b: task_conv2d_weight(draw(*IMAGES), draw(1, *GRAD[1:]), 3, **b), ValueError, "grad must have"),
]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(("case", "call", "error", "message"), BAD, ids=[row[0] for row in BAD])
def test_bad_arguments_are_named(case: str, call: Any, error: type[Exception], message: str, backend: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(backend=backend)
