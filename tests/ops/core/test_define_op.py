"""define_op, tested on an operator with a schema, shapes, a gradient formula and a kernel from this file."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap

from metakern.ops.core.batching import Batch
from metakern.ops.core.define_op import Gradient, Operator, define_op
from metakern.ops.core.functions import Backward
from metakern.ops.core.registry import OPERATORS, operators
from tests.conftest import assert_close

# y_i = (x + scale) w_i where the mask is set, 0 elsewhere; and the kernel keeps x + scale for the way back.
SCHEMA = "toy(Tensor x, Tensor[] weights, Tensor? mask, Tensor index, float scale=1.0) -> (Tensor[], Tensor)"
BACKWARD = "toy_backward(Tensor[] grad_scaled, Tensor shifted, Tensor[] weights, Tensor? mask) -> (Tensor, Tensor[])"


def kernel(x: Tensor, weights: list[Tensor], mask: Tensor | None, index: Tensor, scale: float = 1.0) -> Any:
    shifted = x + scale
    return [shifted * w if mask is None else torch.where(mask, shifted * w, 0.0) for w in weights], shifted


def backward_kernel(grad_scaled: list[Tensor], shifted: Tensor, weights: list[Tensor], mask: Tensor | None) -> Any:
    grads = [g if mask is None else torch.where(mask, g, 0.0) for g in grad_scaled]
    return torch.stack([g * w for g, w in zip(grads, weights, strict=True)]).sum(0), [g * shifted for g in grads]


LIBRARY = torch.library.Library("metakern", "FRAGMENT")
for text, function in ((SCHEMA, kernel), (BACKWARD, backward_kernel)):
    LIBRARY.define(text)
    LIBRARY.impl(text.partition("(")[0], function, "CPU")


def gradients(backward: Backward) -> dict[str, Any]:
    a = backward.arguments
    grad_x, grad_weights = backward.call(
        TOY_BACKWARD, backward.grads.scaled, backward.results.shifted, a.weights, a.mask
    )
    return {"x": grad_x, "weights": grad_weights}


TOY_BACKWARD = define_op(
    BACKWARD,
    results=("grad_x", "grad_weights"),
    shapes=lambda a: (a.shifted.new_empty(a.shifted.shape), [w.new_empty(a.shifted.shape) for w in a.weights]),
    family="toy",
)
TOY = define_op(
    SCHEMA,
    results=("scaled", "shifted"),
    shapes=lambda a: ([a.x.new_empty(a.x.shape) for _ in a.weights], a.x.new_empty(a.x.shape)),
    gradient=Gradient(gradients, of=("x", "weights"), saves=("weights", "mask", "shifted"), private=("shifted",)),
    reference=kernel,
)

# Twice x, and x + 1 as a constant.
CONSTANT_SCHEMA = "toy_constant(Tensor x) -> (Tensor, Tensor)"
LIBRARY.define(CONSTANT_SCHEMA)
LIBRARY.impl("toy_constant", lambda x: (2 * x, x + 1), "CPU")
CONSTANT_TOY = define_op(
    CONSTANT_SCHEMA,
    results=("scaled", "shifted"),
    shapes=lambda a: (a.x.new_empty(a.x.shape), a.x.new_empty(a.x.shape)),
    gradient=Gradient(lambda backward: {"x": 2 * backward.grads.scaled}, of=("x",), constant=("shifted",)),
)
N = 5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arguments(mask: bool = True) -> tuple[Any, ...]:
    flags = torch.arange(N) % 3 != 0 if mask else None
    return drawn(N), [drawn(N, seed=1), drawn(N, seed=2)], flags, torch.arange(2), 0.5


def call(x: Tensor, weights: list[Tensor], *rest: Any) -> list[Tensor]:
    chosen = TOY.choose("cpp", x.device)
    assert chosen is not None
    found: list[Tensor] = chosen(x, weights, *rest)
    return found


def expected(x: Tensor, weights: list[Tensor], *rest: Any) -> list[Tensor]:
    found: list[Tensor] = kernel(x, weights, *rest)[0]
    return found


def total(function: Any, x: Tensor, weights: list[Tensor], rest: tuple[Any, ...]) -> Tensor:
    return torch.stack([y.sin().sum() for y in function(x, weights, *rest)]).sum()


def assert_all_close(got: Any, wanted: Any) -> None:
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert_close(f"tensor {index}", a, b, 1e-12)


@pytest.mark.parametrize("mask", [False, True])
def test_forward_gives_the_public_results(mask: bool) -> None:
    assert_all_close(call(*arguments(mask)), expected(*arguments(mask)))


def test_what_has_a_default_may_be_left_out() -> None:
    assert_all_close(call(*arguments()[:-1]), expected(*arguments()[:-1]))
    leaf = arguments()[0].requires_grad_()
    assert_all_close(call(leaf, *arguments()[1:-1]), expected(leaf, *arguments()[1:-1]))


@pytest.mark.parametrize("mask", [False, True])
def test_gradients_in_eager_mode(mask: bool) -> None:
    x, weights, *rest = arguments(mask)
    leaves = [x.requires_grad_(), *(w.requires_grad_() for w in weights)]
    found = torch.autograd.grad(total(call, x, weights, tuple(rest)), leaves)
    assert_all_close(found, torch.autograd.grad(total(expected, x, weights, tuple(rest)), leaves))


def test_only_what_requires_a_gradient_gets_one() -> None:
    x, weights, *rest = arguments()
    weights[1].requires_grad_()
    (found,) = torch.autograd.grad(total(call, x, weights, tuple(rest)), weights[1])
    assert_all_close([found], torch.autograd.grad(total(expected, x, weights, tuple(rest)), weights[1]))


@pytest.mark.parametrize("transform", [None, grad, "compile"])
def test_a_constant_result_has_no_gradient_however_it_is_used(transform: Any) -> None:
    def both(x: Tensor) -> Tensor:
        scaled, shifted = torch.ops.metakern.toy_constant(x) if transform == "compile" else call_it(x)
        assert transform is grad or not shifted.requires_grad
        return scaled.sin().sum() + shifted.square().sum()

    call_it = CONSTANT_TOY.kernel("compiled")
    x = drawn(N)
    if transform is grad:
        found = grad(both)(x)
    else:
        function = torch.compile(both, backend="aot_eager", fullgraph=True) if transform == "compile" else both
        (found,) = torch.autograd.grad(function(x.requires_grad_()), x)
    assert_close("gradient", found, 2 * (2 * x).cos(), 1e-12)


@pytest.mark.parametrize("transform", [grad, jacrev])
def test_gradients_by_torch_func(transform: Any) -> None:
    x, weights, *rest = arguments()
    found = transform(lambda *leaves: total(call, leaves[0], list(leaves[1:]), tuple(rest)), (0, 1, 2))(x, *weights)
    wanted = transform(lambda *leaves: total(expected, leaves[0], list(leaves[1:]), tuple(rest)), (0, 1, 2))
    assert_all_close(found, wanted(x, *weights))


@pytest.mark.parametrize("by_torch_ops", [False, True])
@pytest.mark.parametrize("dims", [(0, None), (1, None), (None, 0), (0, 0)])
def test_vmap_takes_one_element_after_another(dims: tuple[Any, Any], by_torch_ops: bool) -> None:
    _, weights, *rest = arguments()
    x = drawn(3, N) if dims[0] == 0 else drawn(N, 3) if dims[0] == 1 else drawn(N)
    if dims[1] is not None:
        weights[0] = drawn(3, N, seed=4)
    operator = raw if by_torch_ops else call
    in_dims = (dims[0], dims[1])

    def run(function: Any) -> Any:
        return vmap(lambda x, w: function(x, [w, weights[1]], *rest), in_dims)(x, weights[0])

    assert_all_close(run(operator), run(expected))


def test_vmap_of_grad_and_grad_of_vmap() -> None:
    _, weights, *rest = arguments()
    xs = drawn(3, N)
    found = vmap(grad(lambda x: total(call, x, weights, tuple(rest))))(xs)
    wanted = vmap(grad(lambda x: total(expected, x, weights, tuple(rest))))(xs)
    assert_all_close([found], [wanted])
    leaf = xs.clone().requires_grad_()
    for batched in (
        grad(lambda x: vmap(lambda row: total(call, row, weights, tuple(rest)))(x).sum())(xs),
        *torch.autograd.grad(vmap(lambda row: total(call, row, weights, tuple(rest)))(leaf).sum(), leaf),
    ):
        assert_all_close([batched], [wanted])


def test_vmap_of_no_elements_is_refused() -> None:
    rest = arguments()[1:]
    with pytest.raises(ValueError, match="toy under vmap needs at least one element, got 0"):
        vmap(lambda x: call(x, *rest)[0])(drawn(0, N))


@pytest.mark.parametrize("recorded", [False, True])
def test_opcheck(recorded: bool) -> None:
    x, weights, *rest = arguments()
    torch.library.opcheck(
        torch.ops.metakern.toy.default, (x.requires_grad_(recorded), weights, *rest), rtol=1e-12, atol=1e-12
    )
    grads = [drawn(N, seed=5), drawn(N, seed=6)]
    torch.library.opcheck(torch.ops.metakern.toy_backward.default, (grads, drawn(N), weights, rest[0]))


def test_compiled_in_one_graph() -> None:
    x, weights, *rest = arguments()
    leaves = [x.requires_grad_(), *(w.requires_grad_() for w in weights)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor, weights: list[Tensor]) -> Tensor:
        return total(call, x, weights, tuple(rest))

    found = torch.autograd.grad(compiled(x, weights), leaves)
    assert_all_close(found, torch.autograd.grad(total(expected, x, weights, tuple(rest)), leaves))


def raw(*arguments: Any) -> list[Tensor]:
    found: list[Tensor] = torch.ops.metakern.toy(*arguments)[0]
    return found


def second_derivative(way: str, x: Tensor, weights: list[Tensor], rest: tuple[Any, ...]) -> None:
    if way == "torch.func":
        grad(lambda x: grad(lambda x: total(call, x, weights, rest))(x).sum())(x)
        return
    loss = total(call if way == "eager" else raw, x.requires_grad_(), weights, rest)
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("way", ["eager", "torch.func", "raw"])
def test_a_second_derivative_is_refused(way: str) -> None:
    x, weights, *rest = arguments()
    with pytest.raises(RuntimeError, match="toy provides no second derivative of its own; backend='reference' does"):
        second_derivative(way, x, weights, tuple(rest))


def test_a_forward_derivative_is_refused() -> None:
    x, weights, *rest = arguments()
    message = "toy provides no forward-mode derivative; backend='reference' does"
    with pytest.raises(RuntimeError, match=message):
        jvp(lambda x: call(x, weights, *rest)[0], (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        call(torch.autograd.forward_ad.make_dual(x, x), weights, *rest)


def gradient_of_the_index(way: str, index: Tensor) -> None:
    x, weights, mask, _, scale = arguments()

    def loss(index: Tensor) -> Tensor:
        return total(raw if way == "raw" else call, x, weights, (mask, index, scale))

    if way == "torch.func":
        grad(loss)(index)
    elif way == "compiled":
        torch.compile(loss, backend="eager")(index.requires_grad_())
    else:
        loss(index.requires_grad_()).backward()


@pytest.mark.parametrize("way", ["eager", "torch.func", "raw", "compiled"])
def test_a_gradient_that_is_not_provided_is_refused_not_silently_zero(way: str) -> None:
    message = "toy provides no gradient of index, which requires one; backend='reference' does"
    with pytest.raises(RuntimeError, match=message):
        gradient_of_the_index(way, drawn(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gradient": Gradient(gradients, of=("y",))},
            "Gradient.of of toy must be among x, weights, mask, index, got 'y'",
        ),
        ({"gradient": Gradient(gradients, of=("x",), saves=("y",))}, "Gradient.saves of toy must be among"),
        ({"gradient": Gradient(gradients, of=("x",), shapes=("scale",))}, "Gradient.shapes of toy must be among"),
        ({"gradient": Gradient(gradients, of=("x",), private=("x",))}, "Gradient.private of toy must be among scaled"),
        (
            {"gradient": Gradient(gradients, of=("x",), constant=("x",))},
            "Gradient.constant of toy must be among scaled",
        ),
        (
            {"gradient": Gradient(TOY_BACKWARD, of=("x",), constant=("shifted",))},
            "Gradient.constant of toy needs a formula, not a backward operator",
        ),
        ({"constants": ("number",)}, "constants of toy must be among"),
        ({"results": ("scaled",)}, "results must name as many tensors, got"),
    ],
)
def test_names_that_are_not_in_the_schema_are_refused(changes: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"results": ("scaled", "shifted"), "shapes": lambda a: None}
    with pytest.raises(ValueError, match=re.escape(message)):
        define_op(SCHEMA, **{**options, **changes})
    assert OPERATORS["toy"] is TOY


def test_a_name_that_is_not_an_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        TOY.schema.Arguments(y=1)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'index'"):
        TOY.schema.Arguments(1, 2, 3)
    batch = Batch(TOY, lambda a: a, 2, arguments(), [None] * 5, frozenset())
    with pytest.raises(AttributeError, match="no attribute 'y'"):
        batch.has_axis("y")


def test_another_schema_than_the_kernel_has_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"must have the schema .* reinstall metakern"):
        define_op("toy(Tensor x) -> Tensor", results=("y",), shapes=lambda a: a.x)
    OPERATORS["toy"] = TOY


def test_a_backend_without_kernels_is_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: toy has no kernels for it"):
        TOY.choose("triton", torch.device("cpu"))


def test_every_operator_is_found_by_its_name() -> None:
    found = operators()
    assert found["toy"] is TOY
    assert {"inner_update"} <= found.keys()
    for name, operator in found.items():
        assert isinstance(operator, Operator)
        assert operator.schema.text.startswith(f"{name}(")
        assert operator.backends
