"""Interface of an operator in the suite: example calls, the reference, derivatives, batching and units.

A new operator joins by one subclass of :class:`Operator`, a row, in a module of its own, and one line in rows.py.

A call is a dict of named tensors and a dict of options. Tensors of a list are named ``lr[0]``, ``lr[1]``, ...; the part
before the bracket, ``lr``, is the argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.cuda.device import Device

Tensors = dict[str, Tensor]

#: Where an example runs: see implementations.py.
EVERYWHERE = ("reference", "cpp", "interpreted", "emulated", "cuda", "triton")
CPP = ("cpp",)
BY_KERNELS = ("cpp", "interpreted", "emulated", "cuda", "triton")


@dataclass(frozen=True)
class Example:
    """The arguments of one call."""

    tensors: Tensors
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, device: str) -> Example:
        """The example on a device."""
        return self.map(lambda _, x: x.to(device))

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Example:
        """Apply a function of name and tensor to every tensor."""
        return replace(self, tensors={name: change(name, x) for name, x in self.tensors.items()})

    def double(self) -> Example:
        """The same numbers in float64."""
        return self.map(lambda _, x: x.detach().double() if x.is_floating_point() else x)


@dataclass(frozen=True, eq=False)
class Spec:
    """Description of an example: the arguments of :meth:`Operator.make`.

    Attributes:
        name: names the test
        sizes: arguments of :meth:`Operator.make`
        dtypes: of the call; None: all dtypes of the operator
        on: kinds of implementations that run it
        sanitize: whether the sanitizers run it too, which takes twenty times as long
        gradients: False where they overflow the dtype
    """

    name: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] | None = None
    on: tuple[str, ...] = EVERYWHERE
    sanitize: bool = False
    gradients: bool = True


def argument(name: str) -> str:
    """``lr`` of ``lr[3]``."""
    return name.partition("[")[0]


def gather(tensors: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """Collect the named tensors of one list argument, in order."""
    return [x for key, x in tensors.items() if argument(key) == name]


def listed(name: str, xs: Iterable[Tensor]) -> Tensors:
    """Name the tensors of a list argument."""
    return {f"{name}[{index}]": x for index, x in enumerate(xs)}


class Operator:
    """A row of the suite.

    Attributes:
        name: of the public function
        folder: of tests/ops, if not ``name``
        dtypes: of the public function on the CPU, by any backend
        specs: examples for checking results and gradients
        small: an example of some dozen numbers, for transforms, numerical derivatives and the compiler
        tiny: a smaller one, for second numerical derivatives of the reference
        spread: an example of several blocks, for threads
        scheduled: an example that an emulated device runs in a second, for thread schedules
        viewed: an example of a few tiles, for views
        batched: an example with every tensor argument, for vmap
        batched_otherwise: further variations of calls under vmap
        isolated: examples whose units must not see each other's NaN, and units in them
        varied: sizes of one axis that a graph compiled for any size must take
        draws: a hypothesis strategy of arguments of :meth:`make`
        differentiable: arguments that have a derivative
        twice: whether the kernels have a second derivative
        own_way_to_record: whether some calls that record a graph do not run the kernel
        inductor: whether to test with inductor, which fuses around the operator, as well as with aot_eager
        batches: sets of arguments that carry vmap's axis, besides each argument alone and all of them
        exact_batches: whether vmap gives the bits of a loop
        hides_infinity: tensors whose infinity may leave results finite
        one_scale: whether gradients are compared relative to the largest of all, as a single one may cancel
        operators: the raw operators torch.ops.metakern.* of the compiled library; Triton's insert ``_triton``
        cpu_operators: raw operators of the compiled library that serve the CPU alone
        batched_operators: raw operators that support vmap directly
        faulted: an example with every tensor argument, one of which is spoiled at a time
        tolerates: pairs of a fault (test_arguments.py) and an argument that raise no error
        spoken: regular expression for an argument in messages, if not just its name
    """

    name: str
    folder: str = ""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    specs: tuple[Spec, ...] = ()
    small: Mapping[str, Any]
    tiny: Mapping[str, Any]
    spread: Mapping[str, Any]
    scheduled: Mapping[str, Any]
    viewed: Mapping[str, Any]
    batched: Mapping[str, Any]
    batched_otherwise: tuple[Mapping[str, Any], ...] = ()
    isolated: tuple[tuple[Mapping[str, Any], tuple[int, ...]], ...] = ()
    varied: tuple[Mapping[str, Any], ...] = ()
    draws: st.SearchStrategy[dict[str, Any]]
    differentiable: tuple[str, ...] = ()
    twice = False
    own_way_to_record = False
    inductor = False
    batches: tuple[tuple[str, ...], ...] = ()
    exact_batches = False
    hides_infinity: tuple[str, ...] = ()
    one_scale = False
    operators: tuple[str, ...] = ()
    cpu_operators: tuple[str, ...] = ()
    batched_operators: tuple[str, ...] = ()
    faulted: Mapping[str, Any]
    tolerates: tuple[tuple[str, str], ...] = ()
    spoken: Mapping[str, str] = {}

    def make(self, dtype: torch.dtype, **sizes: Any) -> Example:
        """Random numbers, the same for the same sizes and ``seed``."""
        raise NotImplementedError

    def call(self, example: Example, backend: str) -> Tensors:
        """Named results of the public function."""
        raise NotImplementedError

    def reference(self, example: Example) -> Tensors:
        """Named results by the operator's reference.py, in the dtype of the tensors."""
        raise NotImplementedError

    def emulate(self, example: Example, device: Device, seeds: Callable[[Tensors], Tensors]) -> tuple[Tensors, Tensors]:
        """Named results and gradients, from ``seeds(results)``, by the CUDA kernels on the emulated device."""
        raise NotImplementedError

    def serves(self, kind: str, dtype: torch.dtype) -> bool:
        """Whether an implementation of this kind takes the dtype."""
        return dtype in self.dtypes

    def dtype_of(self, result: str, example: Example) -> torch.dtype:
        """The dtype of a result: that of the first tensor."""
        return next(iter(example.tensors.values())).dtype

    def differentiates_reference(self, dtype: torch.dtype) -> bool:
        """Whether gradients by backend="reference" are exact in this dtype."""
        return True

    def visible(self, name: str, x: Tensor, example: Example) -> Tensor:
        """The meaningful part of a tensor, without layout padding."""
        return x

    def unit_axis(self, name: str, example: Example) -> int | None:
        """The axis of :meth:`visible` for independent units; None for a tensor that they share."""
        return None

    def spoil(self, name: str, x: Tensor, unit: int, value: float, example: Example) -> Tensor:
        """A copy with one number of a unit replaced by a bad value."""
        axis = self.unit_axis(name, example)
        assert axis is not None
        spoiled = x.clone()
        spoiled.select(axis, unit).view(-1)[:1] = value
        return spoiled

    def fewer(self, sizes: Mapping[str, Any], units: tuple[int, ...]) -> tuple[Mapping[str, Any], tuple[int, ...]]:
        """The part of :attr:`isolated` for interpreters and emulators."""
        return sizes, units[:1]

    def slack(self, name: str, dtype: torch.dtype, kind: str) -> float:
        """Factor on the table's tolerance; overrides document why it is not 1."""
        return 1.0

    def raw(self, operator: str, seed: int = 0, tasks: int = 3, loss: int = 0, suffix: str = "") -> list[Any]:
        """Arguments of a raw operator in schema order; ``suffix`` is ``_triton`` for Triton's."""
        raise NotImplementedError

    @staticmethod
    def copied(weights: Iterable[Tensor], copies: int) -> list[Tensor]:
        """Different copies of weights, [copies, *shape] each."""
        return [torch.stack([w * (1 + 0.1 * copy) for copy in range(copies)]) for w in weights]

    def opchecks(self) -> Iterable[tuple[str, str, Callable[[], tuple[Any, ...]]]]:
        """Names, operators and arguments for torch.library.opcheck, some of which require gradients."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.name

    def leaves(self, example: Example) -> list[str]:
        """Names of the tensors that have a derivative."""
        return [name for name in example.tensors if argument(name) in self.differentiable]
