"""task_norm_act_pool in the suite.

Axis legend: T tasks, S samples, C channels, [H, W] the images of x, [Ho, Wo] those of y.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from metakern.ops import task_norm_act_pool
from metakern.ops.task_norm_act_pool import reference
from metakern.ops.task_norm_act_pool.reference import ACTIVATIONS, STATISTICS, output_size
from tests.conformance.ops.operators import CPP, Example, Operator, Spec, Tensors

F32, F64 = torch.float32, torch.float64


class TaskNormActPool(Operator):
    """Units are the tasks. Its results are y alone: the statistics have no derivative and are tested apart."""

    name = "task_norm_act_pool"
    dtypes = (F32, F64)
    specs = (
        Spec("conv4's block", sanitize=True),
        Spec("odd", {"size": (5, 7)}, sanitize=True),
        Spec("not pooled", {"pool": False, "size": (3, 5)}, sanitize=True),
        Spec("leaky", {"activation": "leaky_relu", "slope": 0.1, "size": (4, 3)}),
        Spec("leaky, not pooled", {"activation": "leaky_relu", "slope": 0.1, "pool": False}),
        Spec("norm alone", {"activation": "identity", "pool": False}),
        Spec("norm and pool", {"activation": "identity"}),
        Spec("not affine", {"affine": False}),
        Spec("given", {"statistics": "given", "size": (5, 4)}),
        Spec("given, one value", {"statistics": "given", "samples": 1, "size": (1, 1), "pool": False}),
        Spec("not normalised", {"statistics": "none"}),
        Spec("not normalised, leaky", {"statistics": "none", "activation": "leaky_relu", "affine": False}),
        Spec("one sample", {"tasks": 1, "samples": 1, "channels": 1, "size": (2, 3)}),
        Spec("no tasks", {"tasks": 0}, (F32,)),
        Spec("no samples", {"samples": 0}, (F32,)),
        Spec("wide", {"size": (4, 83), "channels": 2}, on=CPP),
        Spec("several chunks", {"size": (85, 70), "channels": 1, "samples": 2}, on=CPP),
        Spec("rows longer than a chunk", {"size": (3, 2100), "channels": 1, "tasks": 1}, on=CPP),
        Spec("many samples", {"samples": 75, "size": (7, 7)}, on=CPP),
    )
    small = {"tasks": 2, "samples": 2, "channels": 2, "size": (3, 2)}
    tiny = {"tasks": 1, "samples": 2, "channels": 2, "size": (2, 2)}
    spread = {"tasks": 3, "samples": 4, "channels": 5, "size": (13, 10)}
    scheduled = small
    viewed = {"tasks": 2, "channels": 3, "size": (5, 10)}
    batched = {"tasks": 2, "samples": 2, "statistics": "given"}
    batched_otherwise = ({"statistics": "batch"}, {"affine": False, "activation": "leaky_relu", "pool": False})
    batches = (("x", "gamma", "beta"),)
    faulted = {"tasks": 3, "statistics": "given"}
    isolated = (({"tasks": 3}, (0, 2)), ({"tasks": 3, "pool": False, "statistics": "none"}, (1,)))
    hides_infinity = ("beta", "x")
    draws = st.builds(
        dict,
        size=st.tuples(st.integers(2, 40), st.integers(2, 40)),
        pool=st.booleans(),
        affine=st.booleans(),
        statistics=st.sampled_from(STATISTICS),
        activation=st.sampled_from(ACTIVATIONS),
        tasks=st.integers(1, 3),
        samples=st.integers(1, 5),
        channels=st.integers(1, 6),
    )
    differentiable = ("x", "gamma", "beta")
    twice = True
    one_scale = True
    operators = batched_operators = (
        "task_norm_act_pool",
        "task_norm_act_pool_backward",
        "task_norm_act_pool_backward_backward",
    )
    tolerates = tuple(("type", name) for name in ("gamma", "beta", "running_mean", "running_var"))

    def serves(self, kind: str, dtype: torch.dtype) -> bool:
        return kind not in ("emulated", "cuda") and dtype in self.dtypes

    def make(
        self,
        dtype: torch.dtype,
        *,
        tasks: int = 2,
        samples: int = 3,
        channels: int = 3,
        size: tuple[int, int] = (4, 6),
        affine: bool = True,
        statistics: str = "batch",
        activation: str = "relu",
        slope: float = 0.2,
        pool: bool = True,
        seed: int = 0,
    ) -> Example:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=F64)

        tensors = {"x": 1.5 * normal(tasks, samples, channels, *size) + 0.3}
        if affine:
            tensors |= {"gamma": 1 + 0.5 * normal(tasks, channels), "beta": 0.3 * normal(tasks, channels)}
        if statistics == "given":
            tensors |= {"running_mean": normal(tasks, channels), "running_var": normal(tasks, channels).exp()}
        options = {"statistics": statistics, "activation": activation, "slope": slope, "pool": pool, "eps": 1e-5}
        return Example({name: x.to(dtype) for name, x in tensors.items()}, options)

    def call(self, example: Example, backend: str) -> Tensors:
        return {"y": task_norm_act_pool(**example.tensors, **example.options, backend=backend)[0]}

    def reference(self, example: Example) -> Tensors:
        names = ("gamma", "beta", "running_mean", "running_var")
        tensors = {name: example.tensors.get(name) for name in names}
        return {"y": reference.task_norm_act_pool(example.tensors["x"], **tensors, **example.options)[0]}

    def unit_axis(self, name: str, example: Example) -> int | None:
        return 0

    def fewer(self, sizes: Mapping[str, Any], units: tuple[int, ...]) -> tuple[Mapping[str, Any], tuple[int, ...]]:
        return {**sizes, "tasks": 2}, (1,)

    def opchecks(self) -> Iterable[tuple[str, str, Callable[[], tuple[Any, ...]]]]:
        for name in self.operators:
            for requires_grad in (False, True)[: 1 if name.endswith("_backward_backward") else 2]:

                def arguments(name: str = name, requires_grad: bool = requires_grad) -> tuple[Any, ...]:
                    raw = self.raw(name)
                    places = range(3) if requires_grad else ()  # those with a derivative come first
                    return tuple(x.requires_grad_() if i in places else x for i, x in enumerate(raw))

                yield f"{name}{' with gradients' if requires_grad else ''}", name, arguments

    def raw(self, operator: str, seed: int = 0, tasks: int = 3, loss: int = 0, suffix: str = "") -> list[Any]:
        """Forward with given statistics, which has every argument; its derivatives with those of the batch."""
        generator = torch.Generator().manual_seed(seed)
        forward = operator == self.name
        example = self.make(F32, tasks=tasks, size=(5, 4), statistics="given", seed=seed)
        x, gamma, beta, mean, var = example.tensors.values()
        options = [int(forward), 1e-5, seed % 3, 0.2, True]
        if forward:
            return [x, gamma, beta, mean, var, *options]
        shape = (*x.shape[:3], *(output_size(size, True) for size in x.shape[3:]))
        grad_y = torch.randn(shape, generator=generator)
        index = torch.randint(8, shape, generator=generator, dtype=torch.uint8)
        saved = [grad_y, x, gamma, mean, var, index, *options]
        if operator == "task_norm_act_pool_backward":
            return saved
        return [torch.randn(x.shape, generator=generator), gamma.clone(), beta, *saved]
