"""Operators under opcheck, torch.compile and torch.func, and derivatives that are not provided."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap

from metakern.ops.core.registry import operators
from tests.conformance.ops import raw_calls
from tests.conformance.ops.implementations import (
    CPP,
    CPP_EACH,
    CUDA,
    INTERPRETED,
    KERNELS,
    PUBLIC,
    REFERENCE,
    TRITON,
    Implementation,
    rows,
    total,
    with_gradients,
)
from tests.conformance.ops.operators import Example, Operator, Tensors, argument
from tests.conformance.ops.rows import ROWS
from tests.conftest import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close, assert_same_bits

F32, F64 = torch.float32, torch.float64

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_all_close(got: Any, expected: Any, tolerance: float) -> None:
    """Compare every tensor of two trees, bitwise if they must be the same."""
    pairs = zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected), strict=True)
    for index, (a, b) in enumerate(pairs):
        if tolerance:
            assert_close(f"result {index}", a, b, tolerance)
        else:
            assert_same_bits(f"result {index}", a, b)


# -------------------------------------------------------------------------------------------------------- opcheck

OPCHECKS = [pytest.param(name, arguments, id=kind) for op in ROWS for kind, name, arguments in op.opchecks()]


@pytest.mark.parametrize(("name", "arguments"), OPCHECKS)
def test_opcheck(name: str, arguments: Callable[[], tuple[Any, ...]]) -> None:
    torch.library.opcheck(getattr(torch.ops.metakern, name).default, arguments())


@pytest.mark.parametrize("name", raw_calls.TRITON)
def test_opcheck_of_tritons_operators(name: str, interpreter_like_a_gpu: None, quick_interpreter: None) -> None:
    operator, compiled = raw_calls.operator(name), raw_calls.operator(name.replace("_triton", ""))
    schemas = (str(f.default._schema).replace("SymInt", "int") for f in (operator, compiled))
    aliases = (re.sub(r"\(\w+!\)", "(!)", schema) for schema in schemas)
    assert next(aliases).replace("_triton", "") == next(aliases)
    arguments = raw_calls.arguments(name)
    torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [*raw_calls.ON_GPU, *raw_calls.TRITON])
def test_opcheck_on_a_gpu(name: str) -> None:
    constants = ("second_order", "step_weights")  # which the operators read on the CPU
    operator = raw_calls.operator(name).default
    arguments = raw_calls.arguments(name)
    moved = [
        x if a.name in constants else torch.utils._pytree.tree_map_only(Tensor, Tensor.cuda, x)
        for x, a in zip(arguments, operator._schema.arguments, strict=False)
    ]
    torch.library.opcheck(operator, moved, test_utils=("test_schema", "test_faketensor"))


def test_every_registered_operator_has_a_row() -> None:
    raw_calls.operator("lstm_step_triton")
    registered = {n.partition("::")[2] for n in torch._C._dispatch_get_all_op_names() if n.startswith("metakern::")}
    for names, expected in (
        (set(operators()), raw_calls.COMPILED),
        (registered, {*raw_calls.COMPILED, *raw_calls.TRITON}),
    ):
        # tests/ops/core defines toys, in the same process if it comes to that.
        assert {n.partition(".")[0] for n in names if not n.startswith("toy")} == set(expected)


def small(op: Operator, by: Implementation) -> Example:
    """Some dozen numbers; fewer for the interpreter."""
    return op.make(F64, **(op.tiny if by.kind == "interpreted" else op.small)).to(by.device)


# --------------------------------------------------------------------------------------------------- torch.compile


def compiled(function: Callable[..., Any], by: Implementation, **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    # The compiler inspects Triton kernels, which the interpreter does not have.
    mode = {"cpp": "aot_eager", "interpreted": "eager"}.get(by.kind, "inductor")
    return torch.compile(function, fullgraph=True, **({"backend": mode} | options))


def twice(op: Operator, example: Example, by: Implementation, tensors: Tensors) -> Tensors:
    """The results of a call, and the first one doubled by torch, so that the graph holds more than the call."""
    first = op.call(Example(tensors, example.options), by.backend)
    name = next(iter(first))
    return first | {f"{name} by itself": first[name] * 2}


@rows(KERNELS)
def test_compiled_in_one_graph_equals_eager(op: Operator, by: Implementation) -> None:
    example = small(op, by)
    function = compiled(lambda tensors: twice(op, example, by, tensors), by)
    got, want = (
        with_gradients(op, example, lambda leaves, call=call: call(leaves.tensors))
        for call in (function, lambda tensors: twice(op, example, by, tensors))
    )
    assert_all_close(got[0], want[0], FORWARD_TOLERANCE[F64])
    assert_all_close(got[1], want[1], GRADIENT_TOLERANCE[F64])


@rows([CPP], inductor=True)
def test_compiled_by_inductor_equals_eager(op: Operator, by: Implementation) -> None:
    example = op.make(F32, **op.small)
    function = compiled(lambda tensors: twice(op, example, by, tensors), by, backend="inductor")
    got, want = (
        with_gradients(op, example, lambda leaves, call=call: call(leaves.tensors))
        for call in (function, lambda tensors: twice(op, example, by, tensors))
    )
    assert_all_close(got[0], want[0], FORWARD_TOLERANCE[F32])
    assert_all_close(got[1], want[1], GRADIENT_TOLERANCE[F32])


@rows([CPP])
def test_compiled_for_any_size(op: Operator, by: Implementation) -> None:
    if not op.varied:
        pytest.skip("its sizes are constants of a graph")
    examples = [op.make(F32, **sizes) for sizes in op.varied]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def call(tensors: Tensors) -> Tensors:
        return op.call(Example(tensors, examples[0].options), by.backend)

    function = compiled(call, by, dynamic=True, backend=counter)
    for example in examples:
        got, want = (
            with_gradients(op, example, lambda leaves, run=run: run(leaves.tensors)) for run in (function, call)
        )
        assert_all_close(got, want, GRADIENT_TOLERANCE[F32])
    assert counter.frame_count <= 3, "every size compiles a graph of its own"


@rows([CPP])
def test_compiled_vmap_equals_eager(op: Operator, by: Implementation) -> None:
    example = op.make(F64, **op.small)
    batch = {name: stacked(x, 0) if x.is_floating_point() else x for name, x in example.tensors.items()}
    dims = ({name: 0 if x.is_floating_point() else None for name, x in example.tensors.items()},)
    mapped = vmap(lambda tensors: op.call(Example(tensors, example.options), by.backend), in_dims=dims)
    assert_all_close(compiled(mapped, by)(batch), mapped(batch), FORWARD_TOLERANCE[F64])


# ------------------------------------------------------------------------------------------------------- torch.func

BATCH = 3


def stacked(x: Tensor, dim: int) -> Tensor:
    """Stack several tensors like this one along a new axis."""
    rows = [x * (1 - 0.2 * i) if x.is_floating_point() else x.roll(i, 0) for i in range(BATCH)]
    return torch.stack(rows, dim)


def loss_of(op: Operator, example: Example, by: Implementation) -> Callable[[Tensors, Tensors], Tensor]:
    """A scalar function of the differentiable tensors and the others."""

    def loss(leaves: Tensors, rest: Tensors) -> Tensor:
        return total(op.call(Example({n: (leaves | rest)[n] for n in example.tensors}, example.options), by.backend))

    return loss


def parts(op: Operator, example: Example) -> tuple[Tensors, Tensors]:
    """Split into differentiable tensors and the others."""
    names = op.leaves(example)
    leaves = {name: example.tensors[name] for name in names}
    return leaves, {name: x for name, x in example.tensors.items() if name not in names}


def by_autograd(loss: Callable[..., Tensor], leaves: Tensors, *rest: Any) -> Tensors:
    """The gradient of every leaf."""
    fresh = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    found = torch.autograd.grad(loss(fresh, *rest), list(fresh.values()))
    return dict(zip(fresh, found, strict=True))


@rows(PUBLIC)
def test_func_grad_equals_autograd(op: Operator, by: Implementation) -> None:
    example = small(op, by)
    loss, (leaves, rest) = loss_of(op, example, by), parts(op, example)
    got = grad(loss)(leaves, rest)
    assert_all_close(got, by_autograd(loss, leaves, rest), GRADIENT_TOLERANCE[F64])
    assert all(bool(x.any()) for x in got.values() if x.numel())


@rows([by for by in PUBLIC if by.kind != "interpreted"])
def test_jacrev_equals_the_references(op: Operator, by: Implementation) -> None:
    example = small(op, by)
    leaves, rest = parts(op, example)

    def results(call: Callable[[Example], Tensors]) -> Callable[[Tensors], Tensor]:
        def run(leaves: Tensors) -> Tensor:
            found = call(Example({n: (leaves | rest)[n] for n in example.tensors}, example.options))
            return torch.stack([part for x in found.values() for part in (x.sin().sum(), x.square().sum())])

        return run

    got = jacrev(results(lambda e: op.call(e, by.backend)))(leaves)
    assert_all_close(got, jacrev(results(op.reference))(leaves), GRADIENT_TOLERANCE[F64])


def mapped_arguments(op: Operator) -> Iterator[tuple[str, ...]]:
    """Sets of arguments that carry vmap's axis: each alone, the operator's groups, and all."""
    names = dict.fromkeys(argument(name) for name in op.make(F64, **op.batched).tensors)
    yield from dict.fromkeys([*((name,) for name in names), *op.batches, tuple(names)])


MAPPED = [
    pytest.param(op, which, dim, options, id=f"{op}-{' '.join(which)}-{dim}-{'-'.join(map(str, options.values()))}")
    for op in ROWS
    for options in ({}, *op.batched_otherwise)
    for which in mapped_arguments(op)
    for dim in ((0, -1) if which in op.batches or len(which) == 1 else (0,))
]


@pytest.mark.parametrize(("op", "which", "dim", "options"), MAPPED)
def test_vmap_equals_a_loop(op: Operator, which: tuple[str, ...], dim: int, options: dict[str, Any]) -> None:
    """Results, gradients of per-element arguments, and gradients of shared arguments."""
    by = CPP
    example = op.make(F64, **{**op.batched, **options})
    in_dims = {name: dim if name in which or argument(name) in which else None for name in example.tensors}
    if all(dim is None for dim in in_dims.values()):
        pytest.skip("the call has no such argument")
    batch = {n: x if in_dims[n] is None else stacked(x, dim) for n, x in example.tensors.items()}
    elements = [{n: x if in_dims[n] is None else x.select(dim, i) for n, x in batch.items()} for i in range(BATCH)]

    def call(tensors: Tensors) -> Tensors:
        return op.call(Example(tensors, example.options), by.backend)

    exact = 0.0 if op.exact_batches else FORWARD_TOLERANCE[F64]
    got = vmap(call, in_dims=(in_dims,))(batch)
    rows = [call(tensors) for tensors in elements]
    assert_all_close(got, {name: torch.stack([row[name] for row in rows]) for name in got}, exact)

    loss, names = loss_of(op, example, by), op.leaves(example)

    def split(tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        rest = {n: x for n, x in tensors.items() if n not in names}
        return {n: tensors[n] for n in names}, rest

    each = vmap(grad(loss), in_dims=split(in_dims))(*split(batch))
    alone = [by_autograd(loss, *split(tensors)) for tensors in elements]
    tolerance = GRADIENT_TOLERANCE[F64]
    assert_all_close(each, {name: torch.stack([found[name] for found in alone]) for name in each}, tolerance)

    def summed(leaves: Tensors, rest: Tensors) -> Tensor:
        return vmap(loss, in_dims=split(in_dims))(leaves, rest).sum()

    def looped(leaves: Tensors, rest: Tensors) -> Tensor:
        both = leaves | rest
        one = ({n: x if in_dims[n] is None else x.select(dim, i) for n, x in both.items()} for i in range(BATCH))
        return torch.stack([loss(*split(tensors)) for tensors in one]).sum()

    leaves, rest = split(batch)
    want = by_autograd(looped, leaves, rest)
    assert_all_close(grad(summed)(leaves, rest), want, tolerance)
    assert_all_close(by_autograd(summed, leaves, rest), want, tolerance)


@pytest.mark.parametrize("name", [name for op in ROWS for name in op.batched_operators])
def test_vmap_of_a_raw_operator_equals_a_loop(name: str) -> None:
    operator, args = raw_calls.operator(name), raw_calls.arguments(name)
    constants = ("second_order", "step_weights")  # which must be the same for all elements
    schema = operator.default._schema.arguments  # type: ignore[attr-defined]
    places = [place for place in raw_calls.places(args) if schema[place[0]].name not in constants]
    for place in places:
        x = raw_calls.tensor_at(args, place)
        batch = stacked(x, 0)

        def call(x: Tensor, place: tuple[int, int | None] = place) -> list[Tensor]:
            found = torch.utils._pytree.tree_leaves(operator(*raw_calls.replaced(args, place, x)))
            return [y for y in found if isinstance(y, Tensor)]

        got, rows = vmap(call)(batch), [call(one) for one in batch]
        for index, x in enumerate(got):
            want = torch.stack([row[index] for row in rows])
            assert_close(f"result {index} by {schema[place[0]].name}", x, want, GRADIENT_TOLERANCE[F32])


@rows([INTERPRETED, CUDA, TRITON])
def test_vmap_of_other_kernels_equals_a_loop(op: Operator, by: Implementation) -> None:
    example = small(op, by)
    loss, (leaves, rest) = loss_of(op, example, by), parts(op, example)
    batch = {name: stacked(x, 0) for name, x in leaves.items()}
    got = vmap(grad(loss), in_dims=(0, None))(batch, rest)
    alone = [by_autograd(loss, {n: x[i] for n, x in batch.items()}, rest) for i in range(BATCH)]
    want = {name: torch.stack([found[name] for found in alone]) for name in got}
    assert_all_close(got, want, GRADIENT_TOLERANCE[F64])


@rows([CPP])
def test_vmap_inside_vmap(op: Operator, by: Implementation) -> None:
    example = op.make(F64, **op.small)
    loss, (leaves, rest) = loss_of(op, example, by), parts(op, example)
    first, *_ = op.differentiable

    def gradient(some: Tensors, others: Tensors) -> Tensors:
        return grad(lambda x: loss({n: (x | others)[n] for n in leaves}, rest))(some)

    some = {n: stacked(x, 0) for n, x in leaves.items() if argument(n) == first}
    others = {n: stacked(x, -1) for n, x in leaves.items() if argument(n) != first}
    got = vmap(vmap(gradient, in_dims=(None, -1)), in_dims=(0, None))(some, others)
    for i, j in itertools.product(range(BATCH), repeat=2):
        alone = gradient({n: x[i] for n, x in some.items()}, {n: x.select(-1, j) for n, x in others.items()})
        assert_all_close({n: x[i, j] for n, x in got.items()}, alone, GRADIENT_TOLERANCE[F64])


@rows([CPP])
def test_an_element_of_vmap_that_is_not_finite_leaves_the_others_alone(op: Operator, by: Implementation) -> None:
    example = op.make(F64, **op.batched)
    loss, (leaves, rest) = loss_of(op, example, by), parts(op, example)
    batch = {name: stacked(x, 0) for name, x in leaves.items()}
    before = vmap(grad(loss), in_dims=(0, None))(batch, rest)
    for name in op.differentiable:
        key = next(n for n in leaves if argument(n) == name)
        spoiled = batch[key].clone()
        spoiled[1].view(-1)[:1] = torch.nan
        after = vmap(grad(loss), in_dims=(0, None))(batch | {key: spoiled}, rest)
        kept = torch.tensor([0, 2])
        assert any(not bool(x[1].isfinite().all()) for x in after.values())
        assert_all_close({n: x[kept] for n, x in after.items()}, {n: x[kept] for n, x in before.items()}, 0.0)


# ------------------------------------------------------------------------------------------ what has a derivative


@rows(CPP_EACH)
def test_central_differences(op: Operator, by: Implementation) -> None:
    example = op.make(F64, **op.small)
    names = op.leaves(example)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        tensors = example.tensors | dict(zip(names, leaves, strict=True))
        return tuple(op.call(Example(tensors, example.options), by.backend).values())

    leaves = [example.tensors[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(call, leaves)
    if op.twice:
        assert torch.autograd.gradgradcheck(call, leaves)


@rows([REFERENCE])
def test_the_reference_has_second_and_forward_derivatives(op: Operator, by: Implementation) -> None:
    """The kernels' error messages recommend it for these."""
    example = op.make(F64, **op.tiny)
    names = op.leaves(example)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        tensors = example.tensors | dict(zip(names, leaves, strict=True))
        return tuple(op.call(Example(tensors, example.options), by.backend).values())

    leaves = [example.tensors[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradgradcheck(call, leaves)
    loss, (values, rest) = loss_of(op, example, by), parts(op, example)
    tangents = {name: torch.ones_like(x) for name, x in values.items()}
    _, slope = jvp(lambda v: loss(v, rest), (values,), (tangents,))
    want = torch.stack([x.sum() for x in grad(loss)(values, rest).values()]).sum()
    assert_close("slope", slope, want, GRADIENT_TOLERANCE[F64])


@pytest.mark.parametrize("wanted", range(4))
@rows([CPP], sanitize=True)
def test_only_what_requires_a_gradient_gets_one(op: Operator, by: Implementation, wanted: int) -> None:
    if wanted >= len(op.differentiable):
        pytest.skip("it has fewer arguments with a derivative")
    example = op.make(F32, **op.small)
    kept = op.differentiable[wanted]
    leaves = example.map(lambda name, x: x.clone().requires_grad_(argument(name) == kept))
    total(op.call(leaves, by.backend)).backward()
    assert {n for n, x in leaves.tensors.items() if x.grad is not None} == {
        n for n in example.tensors if argument(n) == kept
    }


@rows(KERNELS)
def test_a_result_that_is_not_used_has_no_part_in_the_gradients(op: Operator, by: Implementation) -> None:
    example = small(op, by)
    names = op.leaves(example)
    for used in op.call(example, by.backend):
        gradients = []
        for call in (lambda e: op.call(e, by.backend), op.reference):
            leaves = example.map(lambda name, x: x.clone().requires_grad_(name in names))
            found = torch.autograd.grad(
                call(leaves)[used].sum(), [leaves.tensors[n] for n in names], materialize_grads=True
            )
            gradients.append({n: op.visible(n, x, example) for n, x in zip(names, found, strict=True)})
        if op.one_scale:
            gradients = [{"gradients": torch.cat([x.flatten() for x in of.values()])} for of in gradients]
        assert_all_close(*gradients, GRADIENT_TOLERANCE[F64])


# -------------------------------------------------------------------------------- derivatives that are not provided


@rows(KERNELS, twice=False)
def test_a_second_derivative_is_refused(op: Operator, by: Implementation) -> None:
    example = small(op, by)
    loss, (leaves, rest) = loss_of(op, example, by), parts(op, example)
    refusal, provided = "backend='reference'", set()

    def firsts(of: Callable[[Tensors, Tensors], Tensor]) -> tuple[Tensors, Tensors]:
        fresh = {name: x.clone().requires_grad_() for name, x in leaves.items()}
        found = torch.autograd.grad(of(fresh, rest), list(fresh.values()), create_graph=True)
        return fresh, dict(zip(fresh, found, strict=True))

    fresh, gradients = firsts(loss)
    by_reference = loss_of(op, example, REFERENCE)
    for name, first in gradients.items():
        try:
            (second,) = torch.autograd.grad(first.square().sum(), fresh[name], retain_graph=True)
        except RuntimeError as error:
            assert refusal in str(error)  # noqa: PT017 (either outcome is sound)
            continue
        provided.add(argument(name))
        other, wanted = firsts(by_reference)
        (want,) = torch.autograd.grad(wanted[name].square().sum(), other[name])
        assert_close(f"second derivative by {name}", second, want, GRADIENT_TOLERANCE[F64])
    assert len(provided) <= 1

    def slope(leaves: Tensors) -> Tensor:
        return torch.stack([x.square().sum() for x in grad(loss)(leaves, rest).values()]).sum()

    with pytest.raises(RuntimeError, match=refusal):
        grad(slope)(leaves)
    with pytest.raises(RuntimeError, match=refusal):
        vmap(grad(slope))({name: stacked(x, 0) for name, x in leaves.items()})


def argument_alone(op: Operator, example: Example, by: Implementation, name: str) -> Callable[[Tensor], Tensor]:
    """A scalar function of one tensor of a call."""

    def call(x: Tensor) -> Tensor:
        return total(op.call(Example(example.tensors | {name: x}, example.options), by.backend))

    return call


@rows(KERNELS)
def test_a_forward_derivative_is_refused_not_silently_zero(op: Operator, by: Implementation) -> None:
    example = small(op, by)
    floating = {argument(name): name for name, x in example.tensors.items() if x.is_floating_point()}
    for name in floating.values():
        x = example.tensors[name]
        call = argument_alone(op, example, by, name)
        with pytest.raises((RuntimeError, NotImplementedError)):
            jvp(call, (x,), (torch.ones_like(x),))
        with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
            call(forward_ad.make_dual(x, torch.ones_like(x)))


@rows(KERNELS)
def test_a_derivative_of_an_argument_that_has_none_is_refused(op: Operator, by: Implementation) -> None:
    example = small(op, by)
    leaves = op.leaves(example)
    rest = [n for n, x in example.tensors.items() if x.is_floating_point() and n not in leaves]
    for name in rest:
        call, x = argument_alone(op, example, by, name), example.tensors[name]
        message = f"no gradient of {name.removeprefix('support_')}"  # as the raw operator calls it
        with pytest.raises(RuntimeError, match=message):
            call(x.clone().requires_grad_())
        with pytest.raises(RuntimeError, match=message):
            grad(call)(x)
        with pytest.raises(RuntimeError, match=message):
            grad(lambda x, call=call: vmap(call)(x).sum())(stacked(x, 0))
