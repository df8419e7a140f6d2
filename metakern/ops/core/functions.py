"""An operator's gradient formula as autograd functions: for eager mode, torch.func, and torch.compile.

One formula has three forms. The form registered with the operator serves torch.compile; torch.func fails on it
(pytorch issue 170834), and in eager mode it costs 40 µs more per call than an autograd.Function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from metakern.core.torch_private import below_autograd, forward_mode_is_active, func_is_active
from metakern.ops.core.batching import Batch
from metakern.ops.core.schema import Place, flatten, put, without_tensors

if TYPE_CHECKING:
    from metakern.ops.core.define_op import Kernel, Operator


#: Stands for the requested gradients where the callee does not need to know them.
_NOTHING: frozenset[str] = frozenset()


class Backward:
    """Input of a gradient formula.

    Attributes:
        arguments: by name; tensors not named in the formula's ``saves`` or ``shapes`` are None
        results: by name; only those named in ``saves``
        grads: gradients of the results, by the results' names; None for private results
    """

    __slots__ = ("_kernel", "_wants", "arguments", "grads", "results")

    def __init__(
        self, kernel: Kernel, arguments: Any, results: Any, grads: Any, wants: Callable[[], frozenset[str]]
    ) -> None:
        self._kernel, self._wants = kernel, wants
        self.arguments, self.results, self.grads = arguments, results, grads

    @property
    def wants(self) -> frozenset[str]:
        """Names of the arguments whose gradients are requested."""
        return self._wants()

    def call(self, operator: Operator, *arguments: Any) -> Any:
        """Call another operator by the implementation that ran the forward."""
        wants = self.wants if func_is_active() else None
        return operator.kernel(self._kernel.implementation).call(arguments, wants)


class Call:
    """One call of an operator, passed through autograd as an opaque object.

    Attributes:
        kernel: the operator of one implementation
        arguments: in the schema's order; tensors become None once the forward has run
        results: lists of None, as long as the lists of results
        wants: names of the arguments whose gradients are requested, if known before the backward
    """

    __slots__ = ("arguments", "kernel", "results", "wants")

    def __init__(self, kernel: Kernel, arguments: Sequence[Any], wants: frozenset[str]) -> None:
        self.kernel, self.arguments, self.wants = kernel, arguments, wants
        self.results: list[Any] = []

    def run(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """Run the kernel below autograd; returns all results."""
        with below_autograd():
            return self.kernel.operator.schema.results_of(self.kernel.overload(*arguments))

    def gradients(
        self, saved: Sequence[Any], places: Sequence[Place], grads: Sequence[Any], wants: Callable[[], frozenset[str]]
    ) -> dict[str, Any]:
        """Evaluate the formula; returns gradients by argument name.

        Args:
            saved: saved tensors: the arguments at ``places``, then the results that the formula reads
            places: of these arguments
            grads: one per result, None for private ones
            wants: returns the names of the arguments whose gradients are requested
        """
        operator, schema = self.kernel.operator, self.kernel.operator.schema
        arguments, results = list(self.arguments), self.results
        at = put(saved, arguments, places, arguments)
        if operator.saved_results:
            results = list(results)
            put(saved[at:], results, operator.saved_results, results)
        named = schema.Arguments._make(arguments), schema.Results._make(results), schema.Results._make(grads)
        return operator.formula(Backward(self.kernel, *named, wants))

    def flat_gradients(
        self,
        tensors: Sequence[Place],
        saved: Sequence[Any],
        places: Sequence[Place],
        grads: Sequence[Any],
        needs: Sequence[bool],
    ) -> list[Any]:
        """:meth:`gradients` as a flat sequence, one per tensor of ``tensors``; ``needs`` flags those requested."""
        own = self.arguments
        found = self.gradients(saved, places, grads, lambda: _wanted(tensors, own, needs))
        flat: list[Any] = []
        for name, index, is_list in tensors:
            grad = found.get(name)
            if is_list:
                flat += [None] * len(own[index]) if grad is None else grad
            else:
                flat.append(grad)
        return flat


def _wanted(tensors: Sequence[Place], arguments: Sequence[Any], needs: Sequence[bool]) -> frozenset[str]:
    """Names of the arguments with a tensor that needs a gradient; ``needs`` has one flag per tensor."""
    wants, at = [], 0
    for name, index, is_list in tensors:
        end = at + (len(arguments[index]) if is_list else 1)
        if True in needs[at:end]:
            wants.append(name)
        at = end
    return frozenset(wants)


def recorded(kernel: Kernel, arguments: Sequence[Any]) -> Sequence[Any]:
    """The results of a call recorded by eager autograd; private ones are None."""
    operator, call = kernel.operator, Call(kernel, arguments, _NOTHING)
    flat: Sequence[Any] = _Recorded.apply(call, *flatten(arguments, operator.differentiable))
    if operator.is_flat:
        return flat
    results = list(call.results)
    put(flat, results, operator.public, call.results)
    return results


def transformed(kernel: Kernel, arguments: Sequence[Any], wants: frozenset[str]) -> list[Any]:
    """All results of a call inside torch.func transforms."""
    schema, call = kernel.operator.schema, Call(kernel, arguments, wants)
    flat, results = _Transformed.apply(call, *flatten(arguments, schema.tensors)), list(call.results)
    put(flat, results, schema.outputs, call.results)
    return results


class _Recorded(torch.autograd.Function):
    """An operator in eager mode, without setup_context, with which apply() inspects signatures for 40 µs per call.

    Its inputs are the tensors that can have gradients; the others are in the call. Private results are not outputs:
    autograd would materialize zero gradients for them.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, *_: Any) -> tuple[Any, ...]:
        operator, arguments = call.kernel.operator, call.arguments
        results = call.run(arguments)
        ctx.call = call
        saved = flatten(arguments, operator.saved_arguments)
        if operator.saved_results:
            saved += flatten(results, operator.saved_results)
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*flatten(results, operator.constant))
        call.arguments = without_tensors(arguments, operator.dropped)
        call.results = without_tensors(results, operator.schema.outputs)
        return tuple(results if operator.is_flat else flatten(results, operator.public))

    @staticmethod
    def backward(ctx: Any, *flat: Any) -> tuple[Any, ...]:
        call: Call = ctx.call
        operator, grads = call.kernel.operator, flat
        if not operator.is_flat:
            grads = list(call.results)  # type: ignore[assignment]
            put(flat, grads, operator.public, call.results)  # type: ignore[arg-type]
        given, places = operator.differentiable, operator.saved_arguments
        return None, *call.flat_gradients(given, ctx.saved_tensors, places, grads, ctx.needs_input_grad[1:])


class _Transformed(torch.autograd.Function):
    """An operator under torch.func; its tensors are passed one by one, in the schema's order."""

    @staticmethod
    def forward(call: Call, *flat: Any) -> tuple[Any, ...]:
        schema = call.kernel.operator.schema
        arguments = list(call.arguments)
        put(flat, arguments, schema.tensors, arguments)
        results = call.run(arguments)
        call.results = without_tensors(results, schema.outputs)
        return tuple(flatten(results, schema.outputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        call: Call = inputs[0]
        operator, arguments, results = call.kernel.operator, list(call.arguments), list(call.results)
        put(inputs[1:], arguments, operator.schema.tensors, arguments)
        put(output, results, operator.schema.outputs, results)
        ctx.call = call
        ctx.mark_non_differentiable(*flatten(results, operator.private), *flatten(results, operator.constant))
        ctx.save_for_backward(*flatten(arguments, operator.read), *flatten(results, operator.saved_results))

    @staticmethod
    def backward(ctx: Any, *flat: Any) -> tuple[Any, ...]:
        call: Call = ctx.call
        operator, grads = call.kernel.operator, list(call.results)
        put(flat, grads, operator.schema.outputs, grads)
        for _, index, _ in operator.private:
            grads[index] = None
        given, places = operator.schema.tensors, operator.read
        return None, *call.flat_gradients(given, ctx.saved_tensors, places, grads, ctx.needs_input_grad[1:])

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(ctx.call.kernel.operator.no_forward_mode)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: Call, *flat: Any) -> tuple[Any, Any]:
        operator, arguments = call.kernel.operator, list(call.arguments)
        dims: list[Any] = [None] * len(arguments)
        put(flat, arguments, operator.schema.tensors, call.arguments)
        put(in_dims[1:], dims, operator.schema.tensors, call.arguments)

        def run(arguments: Any) -> Sequence[Any]:
            if func_is_active() or forward_mode_is_active() or operator.is_recorded(arguments):
                return transformed(call.kernel, arguments, call.wants)
            return call.run(arguments)

        results, out_dims = operator.batch(Batch(operator, run, info.batch_size, arguments, dims, call.wants))
        call.results = without_tensors(results, operator.schema.outputs)
        return tuple(flatten(results, operator.schema.outputs)), tuple(flatten(out_dims, operator.schema.outputs))


def register(kernel: Kernel) -> None:
    """Register the formula for torch.compile, and the batching rule, with the operator."""
    operator, schema = kernel.operator, kernel.operator.schema

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = schema.results_of(output)
        ctx.save_for_backward(*flatten(inputs, operator.read), *flatten(results, operator.saved_results))
        ctx.call = Call(kernel, without_tensors(inputs, schema.tensors), _NOTHING)
        ctx.call.results = without_tensors(results, schema.outputs)
        ctx.mark_non_differentiable(*flatten(results, operator.constant))

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        wants = (name for name, index, is_list in schema.tensors if (any(needs[index]) if is_list else needs[index]))
        names = frozenset(wants)
        operator.check_provided(names)
        found = ctx.call.gradients(ctx.saved_tensors, operator.read, grads, lambda: names)
        # The dispatcher omits arguments that equal their defaults, and expects no gradients for them.
        return tuple(
            ([None] * len(need) if isinstance(need, list) else None) if found.get(name) is None else found[name]
            for name, need in zip(schema.names, needs, strict=False)
        )

    def run(arguments: Any) -> Sequence[Any]:
        return schema.results_of(kernel.overload(*arguments))

    def batched(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        dims = [*in_dims, *[None] * (len(schema.names) - len(in_dims))]
        results, out_dims = operator.batch(Batch(operator, run, info.batch_size, arguments, dims, operator.provided))
        return (results[0], out_dims[0]) if len(schema.outputs) == 1 else (tuple(results), tuple(out_dims))

    name = f"metakern::{operator.name_of(kernel.implementation)}"
    torch.library.register_autograd(name, backward, setup_context=setup_context)
    torch.library.register_vmap(name, batched)
