"""Gradients by a backward operator, whose arguments and results are matched with the forward's by their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from metakern.core import backend as _backend
from metakern.ops.core.functions import Backward
from metakern.ops.core.schema import Schema

if TYPE_CHECKING:
    from metakern.ops.core.define_op import Kernel, Operator

#: Prefix of gradients in a backward operator's schema.
_GRAD = "grad_"


class BackwardOperator:
    """A backward operator, matched with the operator that it belongs to.

    Attributes:
        operator: the backward operator
        passes: names of arguments whose gradient is that of a result, and the result's name
        sources: for each of its arguments the kind of value ("gradients", "results" or "arguments") and its name
    """

    def __init__(self, schema: Schema, operator: Operator, passes: Mapping[str, str]) -> None:
        """Match ``operator`` with the schema of the forward; raises ValueError for a name that it does not have."""
        self.operator, self.passes = operator, passes
        results, arguments = [place.name for place in schema.outputs], schema.names
        found = [place.name for place in operator.schema.outputs]
        schema.check_names("the results of the backward", found, [_GRAD + name for name in arguments])
        schema.check_names("Gradient.passes", [*passes, *passes.values()], [*arguments, *results])
        known = [*(_GRAD + name for name in results), *arguments, *results]
        schema.check_names("the arguments of the backward", operator.schema.names, known)
        self.sources: list[tuple[str, str]] = []
        for name in operator.schema.names:
            if name.removeprefix(_GRAD) in results and name.startswith(_GRAD):
                self.sources.append(("gradients", name.removeprefix(_GRAD)))
            else:
                self.sources.append(("arguments" if name in arguments else "results", name))

    def formula(self, backward: Backward) -> dict[str, Any]:
        """The formula for calls that C++ does not record; see :class:`metakern.ops.core.define_op.Gradient`."""
        parts = {"gradients": backward.grads, "results": backward.results, "arguments": backward.arguments}
        values = [getattr(parts[part], name) for part, name in self.sources]
        returned = backward.call(self.operator, *(list(x) if isinstance(x, tuple) else x for x in values))
        found = zip(self.operator.schema.outputs, self.operator.schema.results_of(returned), strict=True)
        wants = backward.wants  # under torch.func.vmap, a gradient that is not requested may have another shape
        passed = {name: getattr(backward.grads, result) for name, result in self.passes.items() if name in wants}
        return passed | {name: grad for place, grad in found if (name := place.name.removeprefix(_GRAD)) in wants}


def first_recorded(kernel: Kernel, backward: BackwardOperator, arguments: tuple[Any, ...]) -> Any:
    """The first call of ``kernel.recorder``, which makes the recorder: C++'s library is not loaded before."""
    kernel.recorder = _recorder(kernel, backward)
    return None if kernel.recorder is None else kernel.recorder(arguments)


def _recorder(kernel: Kernel, backward: BackwardOperator) -> Callable[[tuple[Any, ...]], Any] | None:
    """A function that calls a compiled kernel and records the call in C++; None where that is not available.

    It returns None for a call that must be recorded by Python, and for one that is not recorded.
    """
    library = _backend.autograd_library()
    if library is None or kernel.implementation != "compiled":
        return None
    operator = kernel.operator
    schema = operator.schema
    position = {
        "arguments": {name: index for index, name in enumerate(schema.names)},
        "results": {place.name: place.position for place in schema.outputs},
    }
    position["gradients"] = position["results"]
    kinds = {
        "gradients": library.Source.gradient,
        "results": library.Source.result,
        "arguments": library.Source.argument,
    }
    saved = [place.name for place in operator.saved_arguments]
    gradients = {name: (library.Source.gradient, position["results"][x]) for name, x in backward.passes.items()}
    for place in backward.operator.schema.outputs:
        gradients[place.name.removeprefix(_GRAD)] = library.Source.result, place.position
    return library.Recorder(  # type: ignore[no-any-return]
        forward=operator.name_of("compiled"),
        backward=backward.operator.name_of("compiled"),
        differentiable=[place.position for place in operator.differentiable],
        others=[place.position for place in operator.others],
        gradients=[gradients[place.name] for place in operator.differentiable],
        saved_arguments=[place.position for place in operator.saved_arguments],
        holds=[("arguments", name) in backward.sources and name not in saved for name in schema.names],
        saved_results=[place.position for place in operator.saved_results],
        visible=[place.position for place in operator.public],
        sources=[(kinds[part], position[part][name]) for part, name in backward.sources],
        no_second=backward.operator.no_second,
    )
