"""inner_update as a registered operator: opcheck, torch.compile, torch.func, second derivatives under them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.func import grad, vmap

from metakern.ops import inner_update
from tests.conftest import assert_close
from tests.updates import LAYOUTS, draw, make_lr, step_of

SHAPES: list[tuple[int, ...]] = [(3, 2), (), (5,)]
ACTIVE = torch.tensor([True, False, True])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip_norm": 2.5},
    "clipped, some rest": {"clip_norm": 2.5, "active": ACTIVE},
}


def problem(layout: str, dtype: torch.dtype = torch.float64, tasks: int = 3) -> tuple[list[Tensor], list[Tensor], Any]:
    return draw(tasks, dtype, 0, SHAPES), draw(tasks, dtype, 1, SHAPES), make_lr(layout, dtype, SHAPES)


# ---------------------------------------------------------------------------------------------------- opcheck


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype: torch.dtype, layout: str, options: str) -> None:
    params, grads, lr = problem(layout, dtype)
    step = step_of(layout)
    if layout == "tensor and step":
        lr, step = lr[1], None  # what the public function gives
    rates = lr if isinstance(lr, list) else [lr] if isinstance(lr, Tensor) else []
    lists = [[x.clone().requires_grad_() for x in xs] for xs in (params, grads, rates)]
    scalars = (0.3, -1 if step is None else step, OPTIONS[options].get("clip_norm"))
    torch.library.opcheck(torch.ops.metakern.inner_update.default, (*lists, *scalars, OPTIONS[options].get("active")))


# ---------------------------------------------------------------------------------------------- torch.compile


def two_steps(params: list[Tensor], grads: list[Tensor], lr: list[Tensor], active: Tensor) -> list[Tensor]:
    params = inner_update(params, grads, lr, step=0, clip_norm=2.5, active=active, backend="cpp")
    return inner_update(params, [p * g for p, g in zip(params, grads, strict=True)], lr, step=1, backend="cpp")


def results_and_gradients(function: Any, tasks: int = 3) -> list[Tensor]:
    params, grads, lr = problem("per parameter and step", torch.float32, tasks)
    leaves = [[x.clone().requires_grad_() for x in xs] for xs in (params, grads, lr)]
    updated = function(*leaves, torch.arange(tasks) % 2 == 0)
    return [*updated, *torch.autograd.grad(sum(x.square().sum() for x in updated), [x for xs in leaves for x in xs])]


@pytest.mark.parametrize("mode", ["inductor", "aot_eager"])
def test_compiled_in_one_graph_equals_eager_forward_and_backward(mode: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(two_steps, fullgraph=True, backend=mode)
    for got, expected in zip(results_and_gradients(compiled), results_and_gradients(two_steps), strict=True):
        assert_close("result or gradient", got, expected, 1e-6)


def test_compiled_for_any_count_of_tasks() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(two_steps, fullgraph=True, dynamic=True, backend=counter)
    for tasks in (2, 3, 5, 8):
        pairs = zip(results_and_gradients(compiled, tasks), results_and_gradients(two_steps, tasks), strict=True)
        for got, expected in pairs:
            assert_close(f"result or gradient of {tasks} tasks", got, expected, 1e-6)
    assert counter.frame_count <= 2, "every count of tasks compiles a graph of its own"


# ------------------------------------------------------------------------------------------------- torch.func


def loss_of(params: list[Tensor], grads: list[Tensor], lr: Any, **options: Any) -> Tensor:
    return torch.stack([new.sin().sum() for new in inner_update(params, grads, lr, **options)]).sum()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "number"])
def test_func_grad_equals_autograd_to_second_order(layout: str, options: str) -> None:
    params, grads, lr = problem(layout)
    arguments = {**OPTIONS[options], "step": step_of(layout), "backend": "cpp"}

    def slope(grads: list[Tensor], lr: Any, gradient: Any) -> Tensor:
        found = gradient(params, grads, lr)
        return torch.stack([x.square().sum() for x in found]).sum()

    def by_autograd(params: list[Tensor], grads: list[Tensor], lr: Any) -> Any:
        return torch.autograd.grad(loss_of(params, grads, lr, **arguments), grads, create_graph=True)

    def by_func(params: list[Tensor], grads: list[Tensor], lr: Any) -> Any:
        return grad(lambda g: loss_of(params, g, lr, **arguments))(grads)

    got = grad(slope, argnums=(0, 1))(grads, lr, by_func)
    leaves = [g.clone().requires_grad_() for g in grads]
    rates = [x.clone().requires_grad_() for x in lr] if isinstance(lr, list) else lr.clone().requires_grad_()
    flat = [*leaves, *rates] if isinstance(rates, list) else [*leaves, rates]
    expected = torch.autograd.grad(slope(leaves, rates, by_autograd), flat)
    flat_got = [*got[0], *(got[1] if isinstance(got[1], list) else [got[1]])]
    assert any(x.any() for x in expected[3:])
    for a, b in zip(flat_got, expected, strict=True):
        assert_close("second derivative", a, b, 1e-12)


# Which of params, grads, lr and active carry the batch axis.
BATCHED = {
    "params and grads": (0, 0, None, None),
    "params": (0, None, None, None),
    "grads": (None, 0, None, None),
    "grads on the last axis": (None, -1, None, None),
    "lr": (None, None, 0, None),
    "everything": (0, 0, 0, 0),
    "active": (None, None, None, 0),
    "params and active": (0, None, None, 0),
}


MAPPED = [
    (which, layout, options)
    for which, dims in BATCHED.items()
    for layout in ("number", "tensor", "per tensor and step", "per parameter", "per task")
    for options in OPTIONS
    if (dims[2] is None or layout != "number") and (dims[3] is None or "active" in OPTIONS[options])
]


@pytest.mark.parametrize(("which", "layout", "options"), MAPPED)
@pytest.mark.parametrize("raw", [False, True])
def test_vmap_equals_a_loop(raw: bool, which: str, layout: str, options: str) -> None:
    batch, dims = 4, BATCHED[which]
    arguments = dict(OPTIONS[options])
    active = arguments.pop("active", None)
    shapes = [(3, *shape) for shape in SHAPES] if layout == "per task" else SHAPES
    name = "per parameter" if layout == "per task" else layout
    lr = make_lr(name, torch.float64, shapes)
    tensors = [draw(3, torch.float64, 0, SHAPES), draw(3, torch.float64, 1, SHAPES), lr, active]
    scale = torch.linspace(0.5, 2.0, batch, dtype=torch.float64)

    def stacked(x: Any, dim: int | None) -> Any:
        if dim is None or isinstance(x, float):
            return x
        if isinstance(x, list):
            return [stacked(y, dim) for y in x]
        rows = [x.roll(i, 0) if x.dtype == torch.bool else x * scale[i] for i in range(batch)]
        return torch.stack(rows, dim)

    def picked(x: Any, dim: int | None, index: int) -> Any:
        if dim is None or isinstance(x, float):
            return x
        return [picked(y, dim, index) for y in x] if isinstance(x, list) else x.select(dim, index)

    def call(params: Any, grads: Any, lr: Any, active: Any) -> list[Tensor]:
        if not raw:
            return inner_update(params, grads, lr, step=step_of(name), active=active, backend="cpp", **arguments)
        rates = lr if isinstance(lr, list) else [lr] if isinstance(lr, Tensor) else []
        step = step_of(name)
        scalars = (0.3, -1 if step is None else step, arguments.get("clip_norm"))
        return torch.ops.metakern.inner_update.default(params, grads, rates, *scalars, active)

    batched = [stacked(x, dim) for x, dim in zip(tensors, dims, strict=True)]
    got = vmap(call, in_dims=dims)(*batched)
    rows = [call(*(picked(x, dim, i) for x, dim in zip(batched, dims, strict=True))) for i in range(batch)]
    for new, want in zip(got, zip(*rows, strict=True), strict=True):
        assert_close("updated", new, torch.stack(want), 1e-14)


def test_vmap_of_tensors_of_one_task_and_gradients_of_it() -> None:
    params, grads, lr = draw(4, torch.float64, 0, SHAPES), draw(4, torch.float64, 1, SHAPES), torch.tensor(0.1).double()

    def loss(params: list[Tensor], grads: list[Tensor], lr: Tensor) -> Tensor:
        return loss_of(params, grads, lr, backend="cpp")

    got = vmap(grad(loss, argnums=(0, 1, 2)), in_dims=(0, 0, None))(params, grads, lr)
    for task in range(4):
        leaves = [[x[task].clone().requires_grad_() for x in xs] for xs in (params, grads)]
        rate = lr.clone().requires_grad_()
        expected = torch.autograd.grad(loss(*leaves, rate), [*leaves[0], *leaves[1], rate])
        for a, b in zip([*got[0], *got[1], got[2]], expected, strict=True):
            assert_close("gradient", a[task], b, 1e-13)


def test_dual_tensors_are_refused_not_silently_cut_off() -> None:
    params, grads, _ = problem("number")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(grads[0], torch.ones_like(grads[0]))
        with pytest.raises((RuntimeError, NotImplementedError)):
            inner_update(params, [dual, *grads[1:]], 0.1, backend="cpp")
