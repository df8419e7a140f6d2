"""hrnn_step in the suite.

Axis legend: M tensors, T tasks, n coordinates of a segment, H = 10 hidden units, R = 21 rows of the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from metakern.ops import hrnn_step
from metakern.ops.hrnn_step import reference
from tests.conformance.ops.operators import CPP, Example, Operator, Spec, Tensors, argument, gather, listed

F32, F64 = torch.float32, torch.float64
HALVES = (torch.bfloat16, torch.float16)
HIDDEN = 10

#: Where an example is quick.
COMPILED = ("reference", "cpp", "triton")

#: Arguments and results by the axis of their tasks.
TASK_AXES = {
    **dict.fromkeys(("params", "grads", "states", "mean_rate", "new params", "new states", "attended"), 0),
    **dict.fromkeys(("biases", "means"), 1),
}


def make_states(tasks: int, number: int, generator: torch.Generator, hidden: int = HIDDEN) -> Tensor:
    """States as after some steps, [T, R, n] in float64."""
    state = torch.randn(tasks, reference.num_rows(hidden), number, generator=generator, dtype=F64)
    state[:, :hidden].tanh_()
    state[:, hidden + 4 : hidden + 8] = state[:, hidden : hidden + 4].square() + state[:, hidden + 4 : hidden + 8].exp()
    state[:, -3] = 0.5 * state[:, -3] - 3
    state[:, -2:].sigmoid_()
    return state


def make_weights(attention: bool, generator: torch.Generator, hidden: int = HIDDEN) -> list[Tensor]:
    """Weights in the order of the operator, float64, of a size that makes everything matter."""
    shapes = reference.weight_shapes(hidden, attention)
    return [0.4 * torch.randn(tuple(shape), generator=generator, dtype=F64) for shape in shapes]


class HrnnStep(Operator):
    """One step of the hierarchical RNN; its units are the tasks."""

    name = "hrnn_step"
    specs = (
        Spec("three tensors", {"tasks": 3, "shapes": ((5, 3), (), (7,))}, on=COMPILED),
        Spec("attention", {"tasks": 2, "shapes": ((9,), (2, 2)), "attention": True}, on=COMPILED),
        Spec("several blocks", {"tasks": 1, "shapes": ((70,), (0,))}, (F32,), ("interpreted", "triton")),
        Spec("attention of one", {"tasks": 2, "shapes": ((1,),), "attention": True}, HALVES, ("interpreted",)),
        Spec("fresh state", {"tasks": 1, "shapes": ((3,),), "fresh": True}, (F32, F64)),
        Spec("no coordinates", {"tasks": 2, "shapes": ((0,), (3,), (2, 0))}, (F32,), COMPILED),
        Spec("no tasks", {"tasks": 0, "shapes": ((3,), ())}, (F32,)),
        Spec("several programs", {"tasks": 600, "shapes": ((3,), (20_001,))}, (F32,), ("triton",)),
        *(
            Spec(f"n={','.join(map(str, sizes))}", {"tasks": 2, "shapes": tuple((n,) for n in sizes)}, (F32, F64), CPP)
            for sizes in ((1, 7, 8, 9), (15, 16, 17, 31), (32, 33, 63, 65), (1, 1000, 4097))
        ),
        Spec("many tasks", {"tasks": 70, "shapes": ((2,), (1,))}, (F32,), CPP, sanitize=True),
    )
    small = {"tasks": 2, "shapes": ((2,), (1,)), "attention": True}
    tiny = {"tasks": 1, "shapes": ((2,),)}
    spread = {"tasks": 3, "shapes": ((7001,), (2, 300), ())}
    scheduled = small
    viewed = {"tasks": 2, "shapes": ((5, 9),), "attention": True}
    batched = {"tasks": 2, "shapes": ((3,), (2, 2)), "attention": True}
    faulted = {"tasks": 3, "shapes": ((5, 2), (3,)), "attention": True}
    isolated = (({"tasks": 3, "shapes": ((37,), (2,))}, (0, 2)),)
    draws = st.fixed_dictionaries(
        {
            "tasks": st.integers(1, 4),
            "shapes": st.lists(st.tuples(st.integers(1, 70)), min_size=1, max_size=3),
            "attention": st.booleans(),
        }
    )
    differentiable = ("params", "grads", "states", "biases", "mean_rate", "weights")
    hides_infinity = ("states", "biases")  # the gates saturate
    one_scale = True
    operators = ("hrnn_step", "hrnn_step_backward")
    cpu_operators = ("hrnn_step_stacked",)

    def serves(self, kind: str, dtype: torch.dtype) -> bool:
        return kind not in ("emulated", "cuda")

    def make(
        self,
        dtype: torch.dtype,
        *,
        tasks: int,
        shapes: Sequence[Sequence[int]],
        attention: bool = False,
        fresh: bool = False,
        seed: int = 0,
    ) -> Example:
        """``fresh``: moving means, their squares and decays are zero, as before the first step."""
        generator = torch.Generator().manual_seed(seed)
        wide = F64 if dtype == F64 else F32

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=F64)

        params, grads = ([draw(tasks, *shape).to(dtype) for shape in shapes] for _ in range(2))
        states = [make_states(tasks, math.prod(shape), generator) for shape in shapes]
        if fresh:
            for state in states:
                state[:, HIDDEN : HIDDEN + 8] = 0
                state[:, -2:] = 0
        tensors = {
            **listed("params", params),
            **listed("grads", grads),
            **listed("states", [x.to(wide) for x in states]),
            "biases": draw(len(shapes), tasks, 3 * HIDDEN).to(wide),
            "mean_rate": (0.5 * draw(tasks) - 3).to(wide),
            **listed("weights", [w.to(wide) for w in make_weights(attention, generator)]),
        }
        return Example(tensors)

    @staticmethod
    def _arguments(tensors: Tensors) -> tuple[Any, ...]:
        lists = [gather(tensors, name) for name in ("params", "grads", "states")]
        return (*lists, tensors["biases"], tensors["mean_rate"], gather(tensors, "weights"))

    @staticmethod
    def _named(step: reference.Step) -> Tensors:
        named = listed("new params", step.params) | listed("new states", step.states) | {"means": step.means}
        return named | listed("attended", step.attended)

    def call(self, example: Example, backend: str) -> Tensors:
        return self._named(hrnn_step(*self._arguments(example.tensors), backend=backend))

    def reference(self, example: Example) -> Tensors:
        params, grads, states, *rest = self._arguments(example.tensors)
        flat, flat_grads = (
            [x.reshape(s.shape[0], s.shape[2]) for x, s in zip(xs, states, strict=True)] for xs in (params, grads)
        )
        step = reference.hrnn_step(flat, flat_grads, states, *rest)
        shaped = [[x.view(p.shape) for x, p in zip(xs, params, strict=False)] for xs in (step.params, step.attended)]
        return self._named(step._replace(params=shaped[0], attended=shaped[1]))

    def dtype_of(self, result: str, example: Example) -> torch.dtype:
        like = "params[0]" if argument(result) in ("new params", "attended") else "biases"
        return example.tensors[like].dtype

    def unit_axis(self, name: str, example: Example) -> int | None:
        return TASK_AXES.get(argument(name))

    def spoil(self, name: str, x: Tensor, unit: int, value: float, example: Example) -> Tensor:
        if name != "biases":
            return super().spoil(name, x, unit, value, example)
        spoiled = x.clone()
        spoiled[0, unit, 0] = value
        return spoiled

    def fewer(self, sizes: Mapping[str, Any], units: tuple[int, ...]) -> tuple[Mapping[str, Any], tuple[int, ...]]:
        return {"tasks": 2, "shapes": ((2,),)}, (1,)

    def raw(self, operator: str, seed: int = 0, tasks: int = 3, loss: int = 0, suffix: str = "") -> list[Any]:
        example = self.make(F32, tasks=tasks, shapes=((5, 2), (3,)), attention=True, seed=seed)
        params, grads, states, biases, mean_rate, weights = self._arguments(example.tensors)
        if operator.endswith("stacked"):
            return [params, grads, states, biases, mean_rate, self.copied(weights, tasks)]
        if not operator.endswith("backward"):
            return [params, grads, states, biases, mean_rate, weights]
        generator = torch.Generator().manual_seed(seed + 1)

        def like(x: Tensor) -> Tensor:
            return torch.randn(x.shape, generator=generator)

        steps = [torch.rand(tasks, 2, x.shape[2], generator=generator) for x in states]
        rms = torch.rand(2, tasks, 2, generator=generator) + 0.5
        of_means = torch.randn(2, tasks, HIDDEN + 13, generator=generator)
        cotangents = [[like(p) for p in params], [like(x) for x in states], of_means]
        attended = [like(p) for p in params]
        return [*cotangents, attended, grads, states, steps, rms, biases, mean_rate, weights]

    def opchecks(self) -> Iterable[tuple[str, str, Callable[[], tuple[Any, ...]]]]:
        for name in (*self.operators, *self.cpu_operators):
            yield name, name, lambda name=name: tuple(self.raw(name))
