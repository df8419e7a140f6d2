"""mlp_inner_loop and mlp_meta_loss under torch.func and torch.compile, and the derivatives that they do not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.utils import _pytree as pytree

from metakern.ops import mlp_inner_loop, mlp_meta_loss
from tests.conftest import assert_close, assert_same_bits
from tests.mlp_problems import Case

F64 = torch.float64
T, K, B = 3, 2, 4
CALLS = ("mlp_inner_loop", "mlp_meta_loss")

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(own: bool = False) -> dict[str, Any]:
    """Every argument that may be a tensor: those of T tasks, and masks that leave every task a sample."""
    case = Case([2, 4, 1], T, 5, 4, own=own)
    masks = [torch.rand(T, samples, generator=case.generator) < 0.7 for samples in (5, 4)]
    for mask in masks:
        mask[:, 0] = True
    (x, y), (query_x, query_y) = case.support, case.query
    names = ("params", "lr", "x", "y", "mask", "query_x", "query_y", "query_mask")
    rates = [torch.full((K,), 0.1, dtype=F64) + 0.02 * i for i in range(4)]
    values = (case.params, rates, x, y, masks[0], query_x, query_y, masks[1])
    return dict(zip(names, values, strict=True))


def call(name: str, params: list[Tensor], lr: Any, x: Any, y: Any, mask: Any, *query: Any, backend: str = "cpp") -> Any:
    """The public function, with rates of every step where ``lr`` is a list."""
    options: dict[str, Any] = {"lr": lr, "steps": K, "per_step": isinstance(lr, list), "activation": "tanh"}
    options |= {"support_mask": mask, "backend": backend}
    if name == "mlp_inner_loop":
        return mlp_inner_loop(params, x, y, **options)
    return mlp_meta_loss(params, (x, y), query[:2], query_mask=query[2], step_weights=[0.25, 0.75], **options)


def raw(name: str, params: list[Tensor], lr: Any, x: Any, y: Any, mask: Any, *query: Any) -> Any:
    """The registered operator."""
    rates = lr if isinstance(lr, list) else []
    rate, flags, keep = 0.0 if rates else lr, torch.ones(K, dtype=torch.bool), False
    scalars = (rate, K, bool(rates), -1, 1, 0, K)
    if name == "mlp_inner_loop":
        return torch.ops.metakern.mlp_inner_loop.default(params, x, y, mask, rates, *scalars, keep, flags)[0]
    weights = torch.tensor([0.25, 0.75], dtype=F64)
    operator = torch.ops.metakern.mlp_meta_loss.default
    return operator(params, x, y, mask, *query, rates, *scalars, flags, weights, keep)[0]


def number(results: Any) -> Tensor:
    """A function of all results that is not symmetric in them."""
    results = pytree.tree_leaves(results)
    return sum((r.sin() * torch.linspace(1, 2, r.numel(), dtype=F64).view(r.shape)).sum() for r in results)


def stacked(value: Any, dim: Any, batch: int = B) -> Any:
    """A batch of similar values along ``dim``; the value itself where that is None."""
    if dim is None:
        return value
    if isinstance(value, list):
        return [stacked(x, dim) for x in value]
    rows = [value.roll(i, 0) if value.dtype == torch.bool else value * (1 - 0.2 * i) for i in range(batch)]
    return torch.stack(rows, dim)


def element(values: Any, dims: Any, index: int) -> Any:
    if isinstance(values, (list, tuple)):
        dims = dims if isinstance(dims, (list, tuple)) else [dims] * len(values)
        return [element(x, dim, index) for x, dim in zip(values, dims, strict=True)]
    return values if dims is None else values.select(dims, index)


def assert_all_close(got: Any, expected: Any, tolerance: float = 1e-12) -> None:
    for index, (a, b) in enumerate(zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True)):
        assert_close(f"result {index}", a, b, tolerance)


def looped(function: Callable[..., Any], batch: tuple[Any, ...], dims: tuple[Any, ...]) -> Any:
    """What vmap is to return."""
    rows = [function(*element(batch, dims, index)) for index in range(B)]
    return pytree.tree_map(lambda *xs: torch.stack(xs), *rows)


# ------------------------------------------------------------------------------------ opcheck


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_opcheck_with_rates_and_masks(name: str, own: bool) -> None:
    params, rates, *data = problem(own).values()
    leaves = [[x.requires_grad_() for x in xs] for xs in (params, rates)]
    scalars, flags = (0.0, K, True, -1, 1, 0, K), torch.ones(K, dtype=torch.bool)
    if name == "mlp_inner_loop":
        arguments = (leaves[0], *data[:3], leaves[1], *scalars, True, flags)
    else:
        arguments = (leaves[0], *data, leaves[1], *scalars, flags, torch.tensor([0.25, 0.75], dtype=F64), True)
    torch.library.opcheck(getattr(torch.ops.metakern, name).default, arguments)


# ------------------------------------------------------------------------------------ torch.func.vmap

# Which arguments carry the batch axis, and where.
BATCHED: dict[str, dict[str, Any]] = {
    "params": {"params": 0},
    "params, on the last axis": {"params": -1},
    "some params": {"params": [0, None, None, 1]},
    "rates": {"lr": 0},
    "support": {"x": 0, "y": 0},
    "x on an inner axis": {"x": 1},
    "masks": {"mask": 0, "query_mask": 0},
    "query": {"query_x": 0, "query_y": -1},
    "everything": dict.fromkeys(("params", "lr", "x", "y", "mask", "query_x", "query_y", "query_mask"), 0),
}


def batch_of(values: dict[str, Any], where: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments with a batch axis where it is wanted, and the places of that axis for vmap."""
    dims = {name: where.get(name) for name in values}
    batch = {name: element_wise(stacked, values[name], dim) for name, dim in dims.items()}
    return tuple(batch.values()), tuple(dims.values())


def element_wise(function: Callable[..., Any], value: Any, dim: Any) -> Any:
    if isinstance(dim, list):
        return [function(x, d) for x, d in zip(value, dim, strict=True)]
    return function(value, dim)


@pytest.mark.parametrize("which", BATCHED)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_vmap_equals_a_loop(name: str, own: bool, which: str) -> None:
    values = problem(own)
    for lr in (values["lr"], 0.1):
        if isinstance(lr, list) or "lr" not in BATCHED[which]:
            batch, dims = batch_of({**values, "lr": lr}, BATCHED[which])
            for function in (call, raw):
                got = vmap(lambda *args, f=function: f(name, *args), in_dims=dims)(*batch)
                assert_all_close(got, looped(lambda *args, f=function: f(name, *args), batch, dims), 1e-13)


@pytest.mark.parametrize("which", BATCHED)
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_vmap_of_grad_equals_a_loop(name: str, learned: bool, which: str) -> None:
    """Gradients of every element's own, of params that the elements share too."""
    batch, dims = batch_of(problem(), BATCHED[which])

    def loss(*args: Any) -> Tensor:
        return number(call(name, *args))

    gradient = grad(loss, argnums=(0, 1) if learned else 0)
    got = vmap(gradient, in_dims=dims)(*batch)
    assert_all_close(got, looped(gradient, batch, dims))
    assert all(g.any() for g in pytree.tree_leaves(got))


@pytest.mark.parametrize("which", BATCHED)
@pytest.mark.parametrize("name", CALLS)
def test_grad_of_vmap_equals_autograd_of_a_loop(name: str, which: str) -> None:
    batch, dims = batch_of(problem(own=True), BATCHED[which])
    params, lr, *data = batch

    def by_vmap(params: Any, lr: Any) -> Tensor:
        return number(vmap(lambda *args: call(name, *args), in_dims=dims)(params, lr, *data))

    leaves = [[x.clone().requires_grad_() for x in xs] for xs in (params, lr)]
    total = number(looped(lambda *args: call(name, *args), (*leaves, *data), dims))
    flat = pytree.tree_leaves(leaves)
    assert_all_close(grad(by_vmap, argnums=(0, 1))(params, lr), torch.autograd.grad(total, flat))
    assert_all_close(torch.autograd.grad(by_vmap(*leaves), flat), grad(by_vmap, argnums=(0, 1))(params, lr))


def forth_and_back(name: str, params: list[Tensor], lr: Any, x: Any, y: Any, mask: Any, *query: Any) -> Any:
    """The registered operators, what the way back needs passed from one to the other."""
    rates = lr if isinstance(lr, list) else []
    flags, operators = torch.ones(K, dtype=torch.bool), torch.ops.metakern
    scalars = (0.0 if rates else lr, K, bool(rates), -1, 1, 0, K)
    if name == "mlp_inner_loop":
        results, kept = operators.mlp_inner_loop.default(params, x, y, mask, rates, *scalars, True, flags)
        grads = [r.cos() for r in results]
        return operators.mlp_inner_loop_backward.default(grads, kept, params, x, y, mask, rates, *scalars, flags)
    weights = torch.tensor([0.25, 0.75], dtype=F64)
    losses, kept = operators.mlp_meta_loss.default(params, x, y, mask, *query, rates, *scalars, flags, weights, True)
    return operators.mlp_meta_loss_backward.default(losses.cos(), kept, params, x, y, rates, K, bool(rates), 0)


@pytest.mark.parametrize("which", BATCHED)
@pytest.mark.parametrize("name", CALLS)
def test_vmap_of_the_operators_there_and_back(name: str, which: str) -> None:
    values = problem()
    for lr in (values["lr"], 0.1):
        if isinstance(lr, list) or "lr" not in BATCHED[which]:
            batch, dims = batch_of({**values, "lr": lr}, BATCHED[which])
            got = vmap(lambda *args: forth_and_back(name, *args), in_dims=dims)(*batch)
            assert_all_close(got, looped(lambda *args: forth_and_back(name, *args), batch, dims))


@pytest.mark.parametrize("name", CALLS)
def test_vmap_of_vmap_of_grad(name: str) -> None:
    params, _, x, *rest = problem().values()
    outer, inner = [stacked(p, 0) for p in params], stacked(x, 1)

    def gradient(params: Any, x: Any) -> Any:
        return grad(lambda p: number(call(name, p, 0.1, x, *rest)))(params)

    got = vmap(vmap(gradient, in_dims=(None, 1)), in_dims=(0, None))(outer, inner)
    for i in range(B):
        for j in range(B):
            expected = gradient([p[i] for p in outer], inner[:, j])
            assert_all_close([g[i, j] for g in got], expected)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_an_element_that_is_not_finite_leaves_the_others_alone(name: str, learned: bool) -> None:
    batch, dims = batch_of(problem(), BATCHED["everything"])
    gradient = vmap(grad(lambda *args: number(call(name, *args)), argnums=(0, 1) if learned else 0), in_dims=dims)
    before = pytree.tree_leaves(gradient(*batch))
    batch[2][1, 0, 0, 0] = float("nan")
    others = torch.arange(B) != 1
    for after, expected in zip(pytree.tree_leaves(gradient(*batch)), before, strict=True):
        assert not after[1].isfinite().all()
        assert_same_bits("gradient", after[others], expected[others])


def test_vmap_refuses_what_it_cannot_batch() -> None:
    params, _, x, y, mask, *_ = problem().values()
    with pytest.raises(ValueError, match="the fused inner loop under vmap needs at least one element, got 0"):
        vmap(lambda x: call("mlp_inner_loop", params, 0.1, x, y, mask))(x.new_empty(0, *x.shape))

    def with_flags(flags: Tensor) -> Any:
        scalars = (0.1, K, False, -1, 1, 0, K)
        return torch.ops.metakern.mlp_inner_loop.default(params, x, y, mask, [], *scalars, False, flags)[0]

    with pytest.raises(ValueError, match="second_order and step_weights must be the same for all elements"):
        vmap(with_flags)(torch.ones(B, K, dtype=torch.bool))


# ------------------------------------------------------------------------------------ other transforms


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_grad_and_jacrev_equal_the_reference(name: str, learned: bool) -> None:
    params, lr, *data = problem().values()
    argnums = (0, 1) if learned else 0

    def results(backend: str) -> Callable[..., Tensor]:
        def run(params: Any, lr: Any) -> Tensor:
            found = call(name, params, lr, *data, backend=backend)
            return found if name == "mlp_meta_loss" else torch.stack([r.sum() for r in found])

        return run

    for transform in (lambda f: grad(lambda *args: number(f(*args)), argnums), lambda f: jacrev(f, argnums)):
        got, expected = (transform(results(backend))(params, lr) for backend in ("cpp", "reference"))
        assert_all_close(got, expected)


@pytest.mark.parametrize("name", CALLS)
def test_transforms_of_the_reference(name: str) -> None:
    """Where the errors of the others send their users."""
    params, lr, *data = problem().values()

    def loss(*args: Any) -> Tensor:
        return number(call(name, *args, lr, *data, backend="reference"))

    first, second = (lambda p: loss([p, *params[1:]])), params[0].new_ones(params[0].shape)
    assert_close("jvp", jvp(first, (params[0],), (second,))[1], (grad(first)(params[0]) * second).sum(), 1e-12)
    curvature = (hessian(first)(params[0]) * second).sum((2, 3))
    step = [(grad(first)(params[0] + offset * second)) for offset in (1e-5, -1e-5)]
    assert_close("product with the Hessian", curvature, (step[0] - step[1]) / 2e-5, 1e-7)


@pytest.mark.parametrize("name", CALLS)
def test_derivatives_that_are_not_provided_raise(name: str) -> None:
    params, lr, x, *data = problem().values()

    def loss(params: Any, x: Any) -> Tensor:
        return number(call(name, params, lr, x, *data))

    def slope(params: Any) -> Tensor:
        return number(grad(loss)(params, x))

    def with_x(x: Any) -> Tensor:
        return loss(params, x)

    twice = "the fused inner loop provides no second derivative of its own; backend='reference' does"
    forward = "the fused inner loop provides no forward-mode derivative; backend='reference' does"
    samples = "the fused inner loop provides no gradient of x, which requires one; backend='reference' does"
    for message, derivative in (
        (twice, lambda: grad(slope)(params)),
        (twice, lambda: vmap(grad(slope))([stacked(p, 0) for p in params])),
        (forward, lambda: jvp(with_x, (x,), (x,))),
        (forward, lambda: jvp(lambda p: loss(p, x), (params,), (params,))),
        (samples, lambda: grad(with_x)(x)),
        (samples, lambda: grad(lambda x: vmap(with_x)(x).sum())(stacked(x, 0))),
        (samples, lambda: with_x(x.clone().requires_grad_())),
    ):
        with pytest.raises(RuntimeError, match=message):
            derivative()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(params[0], torch.ones_like(params[0]))
        with pytest.raises(RuntimeError, match=forward):
            loss([dual, *params[1:]], x)


@pytest.mark.parametrize("name", CALLS)
def test_compiled_vmap_equals_eager(name: str) -> None:
    params, _, x, *rest = problem().values()
    batch = [stacked(p, 0) for p in params]
    mapped = vmap(lambda p: call(name, p, 0.1, x, *rest))
    assert_all_close(torch.compile(mapped, fullgraph=True, backend="aot_eager")(batch), mapped(batch), 1e-13)
