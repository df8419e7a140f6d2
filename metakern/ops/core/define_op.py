"""define_op: define an operator of torch.ops.metakern from one declaration.

An operator declares its schema, the shapes of its results, its gradient formula, its backends and, if it has a better
one than a loop, a batching rule. define_op derives the fake kernel, autograd (eager, torch.compile and torch.func),
errors for missing derivatives, torch.func.vmap, and backend selection.

Arguments and results are addressed by their names in the schema, not by position.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from metakern.core import backend as _backend
from metakern.core.memo import outside_modes
from metakern.core.torch_private import below_autograd, forward_mode_is_active, func_is_active
from metakern.core.transforms import wants_gradient
from metakern.ops.core.batching import Batch, looped
from metakern.ops.core.by_operator import BackwardOperator, first_recorded
from metakern.ops.core.checks import check_dense
from metakern.ops.core.devices import check_constants, check_devices
from metakern.ops.core.functions import Backward, recorded, register, transformed
from metakern.ops.core.registry import OPERATORS
from metakern.ops.core.schema import Place, Schema, signature

#: Implementation by backend. Each implementation is a separate operator in torch.ops.metakern.
IMPLEMENTATIONS = {"cpp": "compiled", "cuda": "compiled", "triton": "triton"}

_NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Gradient:
    """The gradient of an operator: by a backward operator, or by a formula.

    Attributes:
        by: the backward operator, or a formula. A backward operator is matched by names: it takes ``grad_x`` for a
            result x, and arguments and results under their own names, and returns ``grad_y`` for an argument y. C++
            runs it without Python, and second derivatives raise. A formula maps a :class:`Backward` to gradients by
            argument name; missing ones are None. A formula of differentiable operators has second derivatives; if it
            calls an operator without a gradient, they raise.
        of: names of the arguments that get gradients; any other tensor that requires one raises
        saves: names of the arguments and results whose values the formula reads
        shapes: names of arguments of which it reads only shapes and dtypes
        private: names of results for the formula only, hidden from callers
        constant: with a formula: names of results that callers get without a gradient
        passes: with a backward operator: arguments whose gradient is that of a result, by the result's name
    """

    by: Operator | Callable[[Backward], dict[str, Any]]
    of: Sequence[str]
    saves: Sequence[str] = ()
    shapes: Sequence[str] = ()
    private: Sequence[str] = ()
    constant: Sequence[str] = ()
    passes: Mapping[str, str] = field(default_factory=dict)


class Operator:
    """An operator and all its implementations. Made by :func:`define_op`, which documents the arguments."""

    def __init__(
        self,
        schema: Schema,
        family: str,
        shapes: Callable[[Any], Any],
        gradient: Gradient | None,
        batching: Callable[[Batch], tuple[Any, Any]] | None,
        constants: Sequence[str],
        backends: Sequence[str],
        triton: str | None,
        reference: Callable[..., Any] | None,
        title: str | None,
        way_out: str,
    ) -> None:
        self.schema, self.name, self.family = schema, schema.name, family
        self.shapes, self.gradient, self.batching, self.constants = shapes, gradient, batching, frozenset(constants)
        self.backends, self.reference, self._triton = tuple(backends), reference, triton
        self._plan()
        self.title = title or family
        self.no_second = f"{self.title} provides no second derivative of its own; {way_out}"
        self.no_forward_mode = f"{self.title} provides no forward-mode derivative; {way_out}"
        self._no_gradient = f"{self.title} provides no gradient of {{}}, which requires one; {way_out}"
        self._kernels: dict[str, Kernel] = {}
        self._unserved = {name: f"{family} has no kernels for it" for name in IMPLEMENTATIONS if name not in backends}

    def _plan(self) -> None:
        """Precompute the positions of the tensors that each kind of call needs."""
        schema, gradient = self.schema, self.gradient or Gradient(_refused, [p.name for p in self.schema.tensors])
        names, results = [p.name for p in schema.tensors], [p.name for p in schema.outputs]
        for what, given, among in (
            ("Gradient.of", gradient.of, names),
            ("Gradient.saves", gradient.saves, names + results),
            ("Gradient.shapes", gradient.shapes, names),
            ("Gradient.private", gradient.private, results),
            ("Gradient.constant", gradient.constant, results),
            ("constants", self.constants, names),
        ):
            schema.check_names(what, given, among)

        def places(among: Sequence[Place], chosen: Callable[[str], bool]) -> tuple[Place, ...]:
            return tuple(place for place in among if chosen(place.name))

        by = gradient.by
        self.backward: BackwardOperator | None = None
        self.formula: Callable[[Backward], dict[str, Any]]
        if isinstance(by, Operator):
            if gradient.constant:
                raise ValueError(f"Gradient.constant of {self.name} needs a formula, not a backward operator")
            self.backward = BackwardOperator(schema, by, gradient.passes)
            self.formula = self.backward.formula
        else:
            self.formula = by
        self.provided = frozenset(gradient.of)
        self.differentiable = places(schema.tensors, lambda name: name in gradient.of)
        self.others = places(schema.tensors, lambda name: name not in gradient.of)
        self.saved_arguments = places(schema.tensors, lambda name: name in gradient.saves)
        self.saved_results = places(schema.outputs, lambda name: name in gradient.saves)
        self.read = places(schema.tensors, lambda name: name in gradient.saves or name in gradient.shapes)
        self.dropped = places(schema.tensors, lambda name: name not in gradient.shapes or name in gradient.saves)
        self.private = places(schema.outputs, lambda name: name in gradient.private)
        self.public = places(schema.outputs, lambda name: name not in gradient.private)
        self.constant = places(schema.outputs, lambda name: name in gradient.constant)
        #: Whether no result is private or a list, so that autograd can take the results unchanged.
        self.is_flat = not self.private and not any(place.is_list for place in schema.outputs)

    def name_of(self, implementation: str) -> str:
        """The name in torch.ops.metakern; the implementation follows the family's name."""
        suffix = "" if implementation == "compiled" else f"_{implementation}"
        return f"{self.family}{suffix}{self.name.removeprefix(self.family)}"

    def batch(self, batch: Batch) -> tuple[Any, Any]:
        """Results of a batched call, and their batch axes."""
        return looped(batch) if self.batching is None else self.batching(batch)

    def fake(self, *arguments: Any) -> Any:
        """The fake kernel: results without values; raises unless the arguments are on one device."""
        named = self.schema.Arguments(*arguments)
        tensors = {place.name: named[place.position] for place in self.schema.tensors}
        first, device = next(
            (f"{name}[0]" if isinstance(x, (list, tuple)) else name, _first(x).device)
            for name, x in tensors.items()
            if x is not None and (isinstance(x, Tensor) or x)
        )
        check_devices(first, device, **{name: x for name, x in tensors.items() if name not in self.constants})
        check_constants(device, **{name: x for name, x in tensors.items() if name in self.constants})
        return self.shapes(named)

    # ------------------------------------------------------------------------------------------------- gradients

    def check_provided(self, wants: frozenset[str]) -> None:
        """Raise RuntimeError for a wanted gradient that the formula does not provide."""
        for name in wants:
            if name not in self.provided:
                raise RuntimeError(self._no_gradient.format(name))

    def check_others(self, arguments: Sequence[Any]) -> None:
        """Raise RuntimeError if a tensor without a gradient formula requires a gradient."""
        for name, index, is_list in self.others:
            x = arguments[index]
            if x is not None and (any(y.requires_grad for y in x) if is_list else x.requires_grad):
                raise RuntimeError(self._no_gradient.format(name))

    def is_recorded(self, arguments: Sequence[Any]) -> bool:
        """Whether autograd records this call, outside of transforms.

        Raises:
            RuntimeError: if a tensor without a gradient formula requires a gradient
        """
        if not torch.is_grad_enabled():
            return False
        if self.others:
            self.check_others(arguments)
        for _, index, is_list in self.differentiable:
            x = arguments[index]
            if x is not None and (True in map(_requires_grad, x) if is_list else x.requires_grad):
                return True
        return False

    def wanted(self, arguments: Sequence[Any]) -> frozenset[str]:
        """Names of the arguments that require gradients, also inside transforms.

        Raises:
            RuntimeError: if a tensor without a gradient formula requires a gradient
        """
        if not torch.is_grad_enabled():
            return _NOTHING
        found = frozenset(
            name
            for name, index, is_list in self.schema.tensors
            if (x := arguments[index]) is not None and (any(map(wants_gradient, x)) if is_list else wants_gradient(x))
        )
        self.check_provided(found)
        return found

    def check_dense(self, arguments: Sequence[Any]) -> None:
        """Raise TypeError for a tensor with another layout than torch.strided."""
        for name, index, is_list in self.schema.tensors:
            value = arguments[index]
            for number, x in enumerate(value if is_list else [value]):
                if x is not None:
                    check_dense(x, f"{name}[{number}]" if is_list else name)

    # ------------------------------------------------------------------------------------------- implementations

    def kernel(self, implementation: str) -> Kernel:
        """The operator of one implementation; its formulas are registered at the first call."""
        found = self._kernels.get(implementation)
        if found is None:
            with outside_modes():
                if implementation == "triton" and self._triton is not None:
                    importlib.import_module(self._triton)
                found = self._kernels.get(implementation) or self._registered(implementation)
        return found

    def _registered(self, implementation: str) -> Kernel:
        name = self.name_of(implementation)
        overload = getattr(torch.ops.metakern, name).default
        if signature(overload._schema) != signature(self.schema.parsed):
            raise RuntimeError(
                f"torch.ops.metakern.{name} must have the schema {self.schema.text}, got {overload._schema}: it was "
                "built from other sources; reinstall metakern"
            )
        kernel = self._kernels[implementation] = Kernel(self, implementation, overload)
        kernel.recorder = None if self.backward is None else functools.partial(first_recorded, kernel, self.backward)
        torch.library.register_fake(f"metakern::{name}", self.fake)
        if not self.schema.mutated:
            register(kernel)
        return kernel

    def triton_kernel(self, launch: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Decorator for a Triton launcher opaque to torch.compile; it gets the arguments as a named tuple."""

        @functools.wraps(launch)
        def function(*arguments: Any) -> Any:
            return launch(self.schema.Arguments(*arguments))

        schema = self.schema.text[self.schema.text.index("(") :]
        name = f"metakern::{self.name_of('triton')}"
        torch.library.custom_op(name, function, mutates_args=self.schema.mutated, schema=schema)
        self._registered("triton")
        return launch

    def traced_triton_kernel(self, launch: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator for a Triton launcher that torch.compile traces, with kernels wrapped by ``wrap_triton``.

        It takes the schema's arguments one by one, as torch infers the schema from its signature.
        """
        torch.library.triton_op(f"metakern::{self.name_of('triton')}", launch, mutates_args=self.schema.mutated)
        self._registered("triton")
        return launch

    # --------------------------------------------------------------------------------------------------- backends

    def choose(
        self, backend: str | None, device: torch.device, unserved: dict[str, str] | None = None
    ) -> Kernel | None:
        """The kernel that serves a call; None for the reference.

        Args:
            backend: the public functions' argument
            device: of the tensors
            unserved: by backend, the reason why it cannot serve this call

        Raises:
            ValueError: for an unknown backend
            RuntimeError: for a backend requested by name that cannot run
        """
        if self._unserved:
            unserved = {**self._unserved, **(unserved or {})}
        name = _backend.resolve(backend, device, unserved)
        return None if name == "reference" else self.kernel(IMPLEMENTATIONS[name])

    def prepare(self, backend: str | None) -> None:
        """Import what ``backend`` needs ahead of the first call, as torch.compile cannot trace imports."""
        if "triton" in self.backends and _backend.prefers_triton(backend):
            self.kernel("triton")


class Kernel:
    """An operator of one implementation."""

    __slots__ = ("implementation", "operator", "overload", "recorder")

    def __init__(self, operator: Operator, implementation: str, overload: Callable[..., Any]) -> None:
        self.operator, self.implementation, self.overload = operator, implementation, overload
        self.recorder: Callable[[tuple[Any, ...]], Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """The public results in the form of torch.ops: a tensor, a list, or a tuple of those."""
        return self.call(arguments)

    def call(
        self, arguments: Sequence[Any], wants: frozenset[str] | None = None, is_recorded: bool | None = None
    ) -> Any:
        """Call the operator through eager autograd, torch.func or the dispatcher, whichever applies.

        Args:
            arguments: in the schema's order
            wants: names of the arguments whose gradients are requested, if the caller knows them
            is_recorded: the result of :meth:`Operator.is_recorded`, if the caller has it
        """
        operator = self.operator
        if torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                operator.check_others(arguments)
            returned = self.overload(*arguments)
            return self._public(returned) if operator.private else returned
        try:
            if func_is_active() or forward_mode_is_active():
                wants = operator.wanted(arguments) if wants is None else wants
                return self._public(transformed(self, arguments, wants))
            if self.recorder is not None and is_recorded is not False and torch.is_grad_enabled():
                results = self.recorder(tuple(arguments))
                if results is not None:
                    return results
            if operator.is_recorded(arguments) if is_recorded is None else is_recorded:
                return self._public(recorded(self, arguments))
            with below_autograd():
                returned = self.overload(*arguments)
        except NotImplementedError:  # torch has no kernel for tensors of this layout
            operator.check_dense(arguments)
            raise
        return self._public(returned) if operator.private else returned

    def _public(self, results: Sequence[Any]) -> Any:
        """Results in the form of torch.ops: a single one, a tuple of several, or None."""
        public = self.operator.public
        if len(public) == 1:
            return results[public[0].position]
        return tuple([results[index] for _, index, _ in public]) if public else None


def define_op(
    schema: str,
    *,
    results: Sequence[str] = (),
    shapes: Callable[[Any], Any],
    gradient: Gradient | None = None,
    batching: Callable[[Batch], tuple[Any, Any]] | None = None,
    constants: Sequence[str] = (),
    family: str | None = None,
    title: str | None = None,
    backends: Sequence[str] = ("cpp",),
    triton: str | None = None,
    reference: Callable[..., Any] | None = None,
    way_out: str = "backend='reference' does",
) -> Operator:
    """Define an operator of torch.ops.metakern.

    The compiled library registers the kernels of the same schema; :meth:`Operator.triton_kernel` those of Triton.

    Args:
        schema: ``"name(Tensor x, Tensor[] ys, float scale) -> Tensor"``; arguments with defaults are optional
        results: names of the results
        shapes: maps the named arguments to results of the right shapes, dtypes and devices, without values
        gradient: the gradient formula; None makes derivatives raise
        batching: torch.func.vmap rule, from a :class:`Batch` to all results and their batch axes; None is a loop
        constants: names of arguments that may be on the CPU whatever device the others are on
        family: name of the public operator that this one belongs to, if different
        title: name in messages; the family's name by default
        backends: backends with kernels
        triton: the module of the Triton kernels, imported on first use
        reference: the definition in plain PyTorch; None for an internal operator
        way_out: advice at the end of messages about missing derivatives

    Raises:
        ValueError: for a name that is not in the schema
    """
    parsed = Schema(schema, results)
    family = family or parsed.name
    operator = Operator(
        parsed, family, shapes, gradient, batching, constants, backends, triton, reference, title, way_out
    )
    OPERATORS[parsed.name] = operator
    if hasattr(torch.ops.metakern, parsed.name):
        operator.kernel("compiled")
    elif _backend.is_compiled():
        reason = f"the compiled library has no {parsed.name}: it was built from other sources; reinstall metakern"
        operator._unserved |= {name: reason for name in ("cpp", "cuda") if name in backends}
    operator.prepare(None)
    return operator


#: Implemented in C, faster than a generator expression.
_requires_grad = attrgetter("requires_grad")


def _first(x: Tensor | Sequence[Tensor]) -> Tensor:
    return x if isinstance(x, Tensor) else x[0]


def _refused(backward: Backward) -> dict[str, Any]:
    """The formula of an operator without a gradient."""
    raise RuntimeError(backward._kernel.operator.no_second)
