"""mlp_update_step in the suite.

Axis legend: M tensors, T tasks, n coordinates of a segment, W hidden units, L hidden layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from metakern.ops.mlp_update_step import Moments, factor_shapes, mlp_update_step, reference
from tests.conformance.ops.operators import Example, Operator, Spec, Tensors, argument, gather, listed

F32, F64 = torch.float32, torch.float64
HALVES = (torch.bfloat16, torch.float16)
LISTS = ("params", "grads", "m", "v", "r", "c")

#: Where an example is quick.
COMPILED = ("reference", "cpp", "triton")

#: Arguments and results by the axis of their tasks.
TASK_AXES = {
    **dict.fromkeys((*LISTS, *(f"new {name}" for name in ("params", *Moments._fields)), "steps"), 0),
    **dict.fromkeys(("rates", "keep"), 1),
}

#: Every rank; which axes are factored in every order, also with axes between, before and behind them; equal axes.
RANKS = {
    "rank 1": ((5,), (1,), (97,), (200,)),
    "rank 2": ((3, 4), (4, 3), (5, 5), (1, 1), (1, 7), (7, 1), (2, 150), (150, 2)),
    "rank 3": ((4, 3, 2), (2, 3, 4), (3, 2, 4), (4, 2, 3), (3, 4, 2), (2, 4, 3), (3, 3, 3), (6, 5, 1)),
    "rank 4": ((5, 4, 3, 2), (2, 3, 4, 5), (4, 2, 3, 5), (5, 2, 3, 4), (2, 5, 3, 4), (2, 5, 4, 3), (4, 5, 3, 3)),
}

#: A few coordinates, for widths.
SHAPES = ((3, 5, 2), (7,))

#: Segments of several blocks: cut along the first axis, the second, both, and one between them.
BLOCKS = ((4099, 9), (3, 8293), (17, 8200), (8500, 2, 3), (2, 4200, 2), (40, 30, 31))


def make_call(
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    tasks: int = 2,
    width: int = 8,
    layers: int = 2,
    fresh: bool = False,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Random arguments of mlp_update_step, at a few steps; ``fresh``: the moments are zero and no step was taken."""
    generator = torch.Generator().manual_seed(seed)
    wide = F64 if dtype == F64 else F32

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    def positive(*shape: int) -> Tensor:
        return (0.1 + normal(*shape).square()).to(wide) if not fresh else torch.zeros(shape, dtype=wide)

    factors = [factor_shapes(shape) for shape in shapes]
    params, grads = ([normal(tasks, *shape).to(dtype) for shape in shapes] for _ in range(2))
    moments = Moments(
        [(0.0 if fresh else 1.0) * normal(tasks, 3, *shape).to(wide) for shape in shapes],
        [positive(tasks, *shape) for shape in shapes],
        [positive(tasks, 3, *rows) for rows, _ in factors],
        [positive(tasks, 3, *columns) for _, columns in factors],
    )
    sizes = [39, *[width] * layers, 2]
    weights = []
    for inputs, outputs in itertools.pairwise(sizes):
        weights += [(1.4 * normal(outputs, inputs) / inputs**0.5).to(wide), (0.3 * normal(outputs)).to(wide)]
    decays = torch.tensor([0.9, 0.99, 0.999, 0.95, 0.8, 0.99, 0.999], dtype=wide)
    rates = (0.5 + normal(len(shapes), tasks).abs()).to(wide)
    keep = (1 - 0.1 * normal(len(shapes), tasks).abs()).to(wide)
    steps = torch.zeros(tasks, dtype=torch.int64) if fresh else 17 * torch.arange(tasks)
    return params, grads, moments, weights, decays, rates, keep, steps


class MlpUpdateStep(Operator):
    """One step of a per-parameter MLP optimizer; its units are the tasks."""

    name = "mlp_update_step"
    specs = (
        *(Spec(name, {"shapes": shapes}, sanitize=name == "rank 4", on=COMPILED) for name, shapes in RANKS.items()),
        *(
            Spec(f"W={width} L={layers}", {"shapes": SHAPES, "width": width, "layers": layers}, (F32, F64), COMPILED)
            for width, layers in ((4, 1), (5, 2), (16, 3), (33, 1), (64, 2), (7, 4))
        ),
        # Every rank and order of the factored axes, axes around them, several blocks, every number of layers.
        Spec("orders", {"shapes": ((3,), (3, 4), (4, 2, 3), (2, 3, 2, 2)), "width": 4}, (F32, F64), ("interpreted",)),
        Spec("blocks", {"shapes": ((70,), (2, 35)), "tasks": 1, "layers": 3}, (F32,), ("interpreted",)),
        Spec("16 bits", {"shapes": ((2, 1),), "width": 4, "layers": 1}, HALVES, ("interpreted",)),
        Spec("W=33 L=4", {"shapes": ((2,),), "width": 33, "layers": 4, "tasks": 1}, (F64,), ("interpreted",)),
        Spec("fresh", {"shapes": ((9, 4), (6,)), "fresh": True, "tasks": 3}, on=COMPILED),
        Spec("no coordinates", {"shapes": ((0, 5), (3, 2), (0,), (4, 0, 2))}, (F32,)),
        Spec("no tasks", {"shapes": ((3, 2), (4,)), "tasks": 0}, (F32,)),
        Spec("many tasks", {"shapes": ((2, 3), (1,)), "tasks": 70}, (F32,), on=("cpp",), sanitize=True),
        Spec("several blocks", {"shapes": BLOCKS, "tasks": 1}, (F64,), on=("cpp", "triton")),
        # In float32 some of the many hidden units change side by rounding, and their gradients jump.
        Spec("several blocks, forward", {"shapes": BLOCKS, "tasks": 1}, (F32,), on=("cpp",), gradients=False),
    )
    small = {"shapes": ((3, 2), (2,)), "width": 4, "layers": 1}
    tiny = {"shapes": ((2, 1),), "width": 4, "layers": 1, "tasks": 1}
    spread = {"shapes": ((4099, 9), (9000,), (5, 3), (70, 3, 2)), "tasks": 2, "width": 5}
    scheduled = small
    viewed = {"shapes": ((5, 9), (4, 3, 2), (6,)), "tasks": 3}
    batched = {"shapes": ((3, 2), (4,)), "width": 4}
    faulted = {"shapes": ((5, 2), (3,)), "tasks": 3}
    isolated = (({"shapes": ((7, 6), (9,)), "tasks": 3}, (0, 2)),)
    draws = st.fixed_dictionaries(
        {
            "shapes": st.lists(
                st.lists(st.integers(1, 12), min_size=1, max_size=4).filter(lambda s: len(s) < 4 or max(s) < 6),
                min_size=1,
                max_size=3,
            ),
            "tasks": st.integers(1, 3),
            "width": st.integers(4, 64),
            "layers": st.integers(1, 3),
        }
    )
    differentiable = (*LISTS, "weights", "decays", "rates", "keep")
    hides_infinity = ("rates", "keep")
    one_scale = True
    operators = ("mlp_update_step", "mlp_update_step_backward")
    cpu_operators = ("mlp_update_step_stacked",)

    def serves(self, kind: str, dtype: torch.dtype) -> bool:
        return kind not in ("emulated", "cuda")

    def make(self, dtype: torch.dtype, *, shapes: Sequence[Sequence[int]], **sizes: Any) -> Example:
        params, grads, moments, weights, decays, rates, keep, steps = make_call(shapes, dtype, **sizes)
        lists = dict(zip((*LISTS, "weights"), (params, grads, *moments, weights), strict=True))
        tensors = {key: x for name, xs in lists.items() for key, x in listed(name, xs).items()}
        return Example(tensors | {"decays": decays, "rates": rates, "keep": keep, "steps": steps})

    @staticmethod
    def _arguments(tensors: Tensors) -> tuple[Any, ...]:
        params, grads, *moments = (gather(tensors, name) for name in LISTS)
        numbers = (tensors[name] for name in ("decays", "rates", "keep", "steps"))
        return params, grads, Moments(*moments), gather(tensors, "weights"), *numbers

    @staticmethod
    def _named(params: Sequence[Tensor], moments: Moments) -> Tensors:
        named = listed("new params", params)
        for name, xs in moments._asdict().items():
            named |= listed(f"new {name}", xs)
        return named

    def call(self, example: Example, backend: str) -> Tensors:
        return self._named(*mlp_update_step(*self._arguments(example.tensors), exp_mult=0.1, backend=backend))

    def reference(self, example: Example) -> Tensors:
        return self._named(*reference.mlp_update_step(*self._arguments(example.tensors), 0.1))

    def dtype_of(self, result: str, example: Example) -> torch.dtype:
        return example.tensors["params[0]" if argument(result) == "new params" else "decays"].dtype

    def unit_axis(self, name: str, example: Example) -> int | None:
        return TASK_AXES.get(argument(name))

    def fewer(self, sizes: Mapping[str, Any], units: tuple[int, ...]) -> tuple[Mapping[str, Any], tuple[int, ...]]:
        return {"tasks": 2, "shapes": ((2, 1), (2,)), "width": 4, "layers": 1}, (1,)

    def raw(self, operator: str, seed: int = 0, tasks: int = 3, loss: int = 0, suffix: str = "") -> list[Any]:
        params, grads, moments, weights, *numbers = make_call(((5, 2), (3,)), F32, tasks, seed=seed)
        lists, rest = [params, grads, *moments], [weights, *numbers, 0.1]
        if operator.endswith("stacked"):
            decays, *others = numbers
            return [*lists, self.copied(weights, tasks), decays.repeat(tasks, 1), *others, 0.1]
        if not operator.endswith("backward"):
            return [*lists, *rest]
        generator = torch.Generator().manual_seed(seed + 1)
        cotangents = [[torch.randn(x.shape, generator=generator) for x in xs] for xs in (params, *moments)]
        new = [[x + 0.5 for x in xs] for xs in (moments.r, moments.c)]
        norms = 0.5 + torch.rand(2, tasks, 28, generator=generator)
        return [*cotangents, *lists, *new, norms, *rest]

    def opchecks(self) -> Iterable[tuple[str, str, Callable[[], tuple[Any, ...]]]]:
        for name in (*self.operators, *self.cpu_operators):
            yield name, name, lambda name=name: tuple(self.raw(name))
