"""task_conv2d, task_conv2d_input and task_conv2d_weight in the suite.

Axis legend: T tasks, S samples, C channels of x, O channels of y, [H, W] and [Ho, Wo] their images, [kh, kw] kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from metakern.ops import task_conv2d, task_conv2d_input, task_conv2d_weight
from metakern.ops.task_conv2d import reference
from metakern.ops.task_conv2d.reference import output_size
from tests.conformance.ops.operators import CPP, Example, Operator, Spec, Tensors

F32, F64 = torch.float32, torch.float64

#: Where an example is quick.
COMPILED = ("reference", "cpp", "triton")


def axis(name: str, largest: int) -> st.SearchStrategy[tuple[int, int, int, int]]:
    """Image, kernel, stride and padding along one axis."""

    def sizes(kernel: int, stride: int, padding: int) -> st.SearchStrategy[tuple[int, int, int, int]]:
        smallest = max(1, kernel - 2 * padding)
        return st.tuples(st.integers(smallest, largest), *(st.just(x) for x in (kernel, stride, padding)))

    kernels = st.sampled_from((1, 2, 3, 5, 7))
    return kernels.flatmap(
        lambda k: st.tuples(st.just(k), st.integers(1, 3), st.integers(0, k)).flatmap(lambda found: sizes(*found))
    )


class Convolution(Operator):
    """What the three operators share; units are the tasks."""

    folder = "task_conv2d"
    dtypes = (F32, F64)
    specs = (
        Spec("three by three", {"padding": (1, 1)}),
        Spec("stride 2", {"size": (7, 6), "stride": (2, 2), "padding": (1, 0)}, sanitize=True),
        Spec("one of each", {"tasks": 1, "samples": 1, "channels": 1, "outputs": 1, "size": (3, 3)}),
        Spec("no tasks", {"tasks": 0}, (F32,)),
        Spec("no samples", {"samples": 0}, (F32,)),
        Spec("wide", {"outputs": 70, "channels": 33, "size": (9, 11), "padding": (1, 1)}, on=CPP),
        Spec("seven", {"kernel": (7, 5), "size": (9, 5), "padding": (7, 2), "stride": (3, 2)}, on=CPP),
        Spec("large kernel", {"kernel": (4, 1), "size": (2, 3), "padding": (1, 0)}, on=COMPILED),
        Spec("many samples", {"samples": 75, "size": (5, 5), "padding": (1, 1), "outputs": 16}, (F32,), CPP),
    )
    small = {"tasks": 2, "samples": 1, "channels": 2, "outputs": 2, "size": (3, 4), "kernel": (2, 3), "stride": (1, 2)}
    tiny = {"tasks": 1, "samples": 1, "channels": 1, "outputs": 2, "size": (3, 2), "kernel": (2, 1)}
    spread = {"tasks": 3, "samples": 7, "channels": 5, "outputs": 40, "size": (13, 9), "padding": (1, 1)}
    scheduled = small
    viewed = {"tasks": 2, "channels": 3, "outputs": 9, "size": (5, 9)}
    batched = {"tasks": 2, "samples": 2, "padding": (1, 1)}
    faulted = {"tasks": 3}
    isolated = (({"tasks": 3, "padding": (1, 1), "outputs": 17}, (0, 2)),)
    draws = st.builds(
        lambda rows, columns, **rest: rest | dict(zip(("size", "kernel", "stride", "padding"), zip(rows, columns))),  # noqa: B905
        axis("rows", 12),
        axis("columns", 12),
        tasks=st.integers(1, 3),
        samples=st.integers(1, 6),
        channels=st.integers(1, 20),
        outputs=st.integers(1, 40),
    )
    twice = True
    #: Names of the tensors, those of the images first.
    names: tuple[str, ...]

    def serves(self, kind: str, dtype: torch.dtype) -> bool:
        return kind not in ("emulated", "cuda") and dtype in self.dtypes

    def make(
        self,
        dtype: torch.dtype,
        *,
        tasks: int = 2,
        samples: int = 3,
        channels: int = 2,
        outputs: int = 5,
        size: tuple[int, int] = (4, 5),
        kernel: tuple[int, int] = (3, 3),
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        seed: int = 0,
    ) -> Example:
        generator = torch.Generator().manual_seed(seed)
        out = [output_size(*axis) for axis in zip(size, kernel, stride, padding, strict=True)]
        shapes = {
            "x": (tasks, samples, channels, *size),
            "grad": (tasks, samples, outputs, *out),
            "weight": (tasks, outputs, channels, *kernel),
            "bias": (tasks, outputs),
        }
        tensors = {name: torch.randn(shapes[name], generator=generator, dtype=F64).to(dtype) for name in self.names}
        return Example(tensors, {"size": size, "kernel_size": kernel, "stride": stride, "padding": padding})

    def unit_axis(self, name: str, example: Example) -> int | None:
        return 0

    def fewer(self, sizes: Mapping[str, Any], units: tuple[int, ...]) -> tuple[Mapping[str, Any], tuple[int, ...]]:
        return {"tasks": 2, "samples": 1}, (1,)

    def slack(self, name: str, dtype: torch.dtype, kind: str) -> float:
        """PyTorch's float32 sums lose more than the kernels' over many samples and taps."""
        return 5 if kind == "reference" and dtype == F32 else 1

    def opchecks(self) -> Iterable[tuple[str, str, Callable[[], tuple[Any, ...]]]]:
        for requires_grad in (False, True):

            def arguments(requires_grad: bool = requires_grad) -> tuple[Any, ...]:
                raw = self.raw(self.name)
                return tuple(x.requires_grad_(requires_grad) if isinstance(x, Tensor) else x for x in raw)

            yield f"{self.name}{' with gradients' if requires_grad else ''}", self.name, arguments

    def raw(self, operator: str, seed: int = 0, tasks: int = 3, loss: int = 0, suffix: str = "") -> list[Any]:
        example = self.make(F32, tasks=tasks, padding=(1, 1), stride=(2, 1), size=(5, 4), seed=seed)
        options = [list(example.options[name]) for name in self.options]
        return [*example.tensors.values(), *options]

    #: Names of the options, in the order of the operator.
    options: tuple[str, ...] = ("stride", "padding")


class TaskConv2d(Convolution):
    """Convolution."""

    name = "task_conv2d"
    names = differentiable = ("x", "weight", "bias")
    operators = batched_operators = ("task_conv2d",)
    batches = (("x", "weight"),)
    tolerates = (("type", "bias"),)

    def call(self, example: Example, backend: str) -> Tensors:
        steps = (example.options["stride"], example.options["padding"])
        return {"y": task_conv2d(*example.tensors.values(), *steps, backend=backend)}

    def reference(self, example: Example) -> Tensors:
        steps = (example.options["stride"], example.options["padding"])
        return {"y": reference.task_conv2d(*example.tensors.values(), *steps)}


class TaskConv2dInput(Convolution):
    """Its gradient by x."""

    name = "task_conv2d_input"
    names = differentiable = ("grad", "weight")
    operators = batched_operators = ("task_conv2d_input",)
    options = ("size", "stride", "padding")

    def call(self, example: Example, backend: str) -> Tensors:
        options = (example.options[name] for name in self.options)
        return {"grad x": task_conv2d_input(*example.tensors.values(), *options, backend=backend)}

    def reference(self, example: Example) -> Tensors:
        options = (example.options[name] for name in self.options)
        return {"grad x": reference.task_conv2d_input(*example.tensors.values(), *options)}


class TaskConv2dWeight(Convolution):
    """Its gradients by weight and bias."""

    name = "task_conv2d_weight"
    names = differentiable = ("x", "grad")
    operators = batched_operators = ("task_conv2d_weight",)
    options = ("kernel_size", "stride", "padding")

    def call(self, example: Example, backend: str) -> Tensors:
        options = (example.options[name] for name in self.options)
        found = task_conv2d_weight(*example.tensors.values(), *options, backend=backend)
        return dict(zip(("grad weight", "grad bias"), found, strict=True))

    def reference(self, example: Example) -> Tensors:
        options = (example.options[name] for name in self.options)
        found = reference.task_conv2d_weight(*example.tensors.values(), *options)
        return dict(zip(("grad weight", "grad bias"), found, strict=True))
