"""inner_update in the suite.

Axis legend: T tasks, K inner steps, ``*shape`` the shape of one parameter tensor of the model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from metakern.ops import inner_update
from metakern.ops.inner_update import reference
from metakern.ops.inner_update.autograd import FUSED_ELEMENTS
from tests.conformance.ops.operators import CPP, Example, Operator, Spec, Tensors, gather, listed
from tests.cuda.device import Device
from tests.ops.inner_update.emulator import kernels
from tests.update_problems import LAYOUTS, RATES, make_update

F32, F64 = torch.float32, torch.float64
HALVES = (torch.bfloat16, torch.float16)
SMALL = ((3, 2), (), (5,))

#: Clipping and resting tasks, by test name.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip_norm": 2.0},
    "some rest": {"resting": (1,)},
    "clipped, some rest": {"clip_norm": 2.0, "resting": (1,)},
}


def specs() -> Iterable[Spec]:
    """Every layout of α with every option; remainders of vectors, blocks and tiles; lists longer than a launch."""
    for (name, options), rates in itertools.product(OPTIONS.items(), LAYOUTS):
        yield Spec(f"{name}, {rates}", {"rates": rates, **options})
    tails = {
        (0, 1, 33, 1025, 4097): CPP,
        (3, 31, 1023, 4096, 9001): CPP,
        (1, 2, 3, 31, 32, 33, 1023, 1024, 1025, 4099): ("interpreted",),
        (1, 2, 3, 4, 5, 31, 127, 128, 129, 511, 512, 513, 1023, 1024, 1025, 4099): ("emulated",),
        (1, 127, 511, 513, 1025, 1_000_003): ("cuda", "triton"),
    }
    for (sizes, on), tasks in itertools.product(tails.items(), (1, 4)):
        for n, clip_norm in itertools.product(sizes, (None, 0.5)):
            for rates, dtypes in (("per parameter", (F32,) if on != CPP else None), ("number", HALVES)):
                if on != CPP and rates == "number" and tasks == 1:
                    continue
                name = f"{tasks} of n={n}, {rates}" + (", clipped" if clip_norm else "")
                size = {"tasks": tasks, "rates": rates, "shapes": [(n,), (2,)], "clip_norm": clip_norm}
                sanitize = tasks == 4 and sizes[0] == 0
                yield Spec(name, size, dtypes, on, sanitize)
    for tasks, shapes in ((0, SMALL), (2, [(0,), (3, 0)])):
        yield Spec(f"nothing, {tasks} tasks", {"tasks": tasks, "shapes": shapes, "rates": "per parameter"})
    large = [(FUSED_ELEMENTS // 2,), (3,), ()]
    for rates in ("number", "shared", "per tensor and step", "per parameter"):
        yield Spec(f"large, {rates}", {"shapes": large, "rates": rates}, on=(*CPP, "cuda"))
        yield Spec(
            f"large, {rates}, clipped", {"shapes": large, "rates": rates, **OPTIONS["clipped, some rest"]}, on=CPP
        )
    for tensors, clip_norm in itertools.product((53, 54, 55, 108, 120, 121, 250), (None, 1.0)):
        # Empty tensors, also at the end and between two launches, need no slot.
        shapes = [(0,) if i in (7, 54, tensors - 1) else (1 + i % 5, 3) for i in range(tensors)]
        size = {"tasks": 2, "rates": "per tensor", "shapes": shapes, "clip_norm": clip_norm}
        name = f"{tensors} tensors" + (", clipped" if clip_norm else "")
        yield Spec(name, size, (F32,), ("emulated",) if tensors < 250 else ("cpp", "emulated", "cuda"))
    for tasks, by in ((None, "no task axis"), (4, "last axes"), (4, "task axis")):
        lr = {"no task axis": None, "last axes": (2,), "task axis": (4, 3, 2)}[by]
        for rest in (False, True) if tasks else (False,):
            size = {"tasks": tasks, "shapes": [(3, 2)], "rates": "per parameter", "lr": lr}
            yield Spec(f"{by}, {rest}", size | ({"resting": (2,)} if rest else {}))
    for lr_dtype in (F32, *HALVES, F64):
        for rates in ("shared", "per parameter", "per parameter and step"):
            yield Spec(
                f"{rates} of {lr_dtype}", {"tasks": 2, "rates": rates, "lr_dtype": lr_dtype}, on=("cpp", "reference")
            )
        yield Spec(
            f"per parameter of {lr_dtype}",
            {"tasks": 2, "rates": "per parameter", "lr_dtype": lr_dtype},
            on=("interpreted", "emulated", "cuda"),
        )


class InnerUpdate(Operator):
    """One gradient step of T tasks."""

    name = "inner_update"
    specs = tuple(specs())
    small = {"shapes": SMALL, "rates": "per parameter", "clip_norm": 2.5}
    tiny = small
    scheduled = {"shapes": [(5000,), (33, 16), (7,)], "rates": "per parameter", "clip_norm": 1.0, "resting": (1,)}
    viewed = {"rates": "per parameter", "clip_norm": 2.0}
    tolerates = (("type", "active"),)  # None: all step
    faulted = {"shapes": SMALL, "rates": "per parameter", "clip_norm": 2.5, "resting": (1,)}
    batched = {"shapes": SMALL, "rates": "per parameter", "clip_norm": 2.5, "resting": (1,)}
    batched_otherwise = (
        {"rates": "number"},
        {"rates": "shared"},
        {"rates": "per tensor and step"},
        {"clip_norm": None, "resting": None},
        {"shapes": [(3, 2)], "lr": (3, 3, 2)},  # α of every task
    )
    spread = {"shapes": [(40_000,), (3,), (257, 129)], "rates": "per parameter", "clip_norm": 3.0, "resting": (1,)}
    isolated = (({"clip_norm": 1.0}, (0, 2)), ({"rates": "per parameter"}, (1,)))
    varied = tuple(
        {"tasks": tasks, "rates": "per parameter", "shapes": SMALL, "clip_norm": 2.5} for tasks in (2, 3, 5, 8)
    )
    draws = st.fixed_dictionaries(
        {
            "tasks": st.integers(1, 9),
            "shapes": st.lists(st.integers(0, 70).map(lambda n: (n,)), min_size=1, max_size=5),
            "rates": st.sampled_from(RATES),
            "clip_norm": st.sampled_from((None, 0.5, 1e6)),
            "resting": st.sampled_from((None, (0,))),
            "seed": st.integers(0, 99),
        }
    )
    own_way_to_record = True
    inductor = True
    differentiable = ("params", "grads", "lr")
    twice = True
    batches = (("params", "grads"), ("params", "active"))
    operators = batched_operators = ("inner_update",)

    def make(
        self,
        dtype: torch.dtype,
        *,
        tasks: int | None = 3,
        lr: tuple[int, ...] | None = None,
        lr_dtype: torch.dtype | None = None,
        **sizes: Any,
    ) -> Example:
        """Without ``tasks`` tensors of one task; ``lr`` is the shape of each α, ``lr_dtype`` its dtype."""
        update = make_update(1 if tasks is None else tasks, dtype=dtype, **sizes)
        if tasks is None:
            update.params[:], update.grads[:] = ([x[0] for x in xs] for xs in (update.params, update.grads))
        if update.active is not None:  # a resting task's NaN gradient must not show
            assert all(g[~update.active].isnan().all() for g in update.grads)
        rates = update.lr
        if lr is not None:
            rates = [torch.linspace(0.1, 1, torch.Size(lr).numel(), dtype=F64).to(dtype).view(lr) for _ in rates]
        rates = [x.to(lr_dtype or x.dtype) for x in rates]
        tensors = listed("params", update.params) | listed("grads", update.grads) | listed("lr", rates)
        if update.active is not None:
            tensors["active"] = update.active
        shared = sizes.get("rates", "").startswith("shared")
        options = {"clip_norm": update.clip_norm, "step": None if update.step < 0 else update.step}
        return Example(tensors, options | {"shared": shared, "rate": update.rate})

    @staticmethod
    def _split(example: Example) -> tuple[list[Tensor], list[Tensor], Any, dict[str, Any]]:
        """params, grads, α and the other arguments of the public function."""
        tensors, options = example.tensors, dict(example.options)
        shared, rate = options.pop("shared"), options.pop("rate")
        rates = gather(tensors, "lr")
        lr: Any = rates[0] if shared else rates or rate
        options["active"] = tensors.get("active")
        return gather(tensors, "params"), gather(tensors, "grads"), lr, options

    def call(self, example: Example, backend: str) -> Tensors:
        params, grads, lr, options = self._split(example)
        return listed("updated", inner_update(params, grads, lr, backend=backend, **options))

    def reference(self, example: Example) -> Tensors:
        params, grads, lr, options = self._split(example)
        return listed("updated", reference.inner_update(params, grads, lr, **options))

    def emulate(self, example: Example, device: Device, seeds: Callable[[Tensors], Tensors]) -> tuple[Tensors, Tensors]:
        params, grads, lr, options = self._split(example)
        rates = lr if isinstance(lr, list) else [lr] if isinstance(lr, Tensor) else []
        step = -1 if options["step"] is None else options["step"]
        if isinstance(lr, Tensor) and step >= 0:
            rates, step = [lr[step]], -1  # as the public function does
        arguments = (params, grads, rates, example.options["rate"], step, options["clip_norm"], options["active"])
        return listed("updated", kernels()(*arguments, device=device)), {}

    def unit_axis(self, name: str, example: Example) -> int | None:
        return None if name.startswith("lr") else 0

    def differentiates_reference(self, dtype: torch.dtype) -> bool:
        """Not in 16 bits, where autograd sums the gradients of α in that precision."""
        return dtype not in HALVES

    def slack(self, name: str, dtype: torch.dtype, kind: str) -> float:
        """The reference rounds every 16-bit intermediate, the norm too; kernels round only the result.

        A gradient of α sums one product per element that shares the α, with different signs.
        """
        if kind == "reference" and dtype in HALVES:
            return 8
        return 30 if name == "gradient of lr" else 1

    def raw(self, operator: str, seed: int = 0, tasks: int = 3, loss: int = 0, suffix: str = "") -> list[Any]:
        update = make_update(tasks, "per parameter", shapes=[(3, 2), (5,)], clip_norm=1.0, resting=(1,), seed=seed)
        return list(update.arguments())

    def opchecks(self) -> Iterable[tuple[str, str, Callable[[], tuple[Any, ...]]]]:
        def arguments(rates: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, ...]:
            update = make_update(3, rates, dtype, shapes=SMALL, **options)
            lists: Sequence[list[Tensor]] = (update.params, update.grads, update.lr)
            leaves = [[x.clone().requires_grad_() for x in xs] for xs in lists]
            return (*leaves, *update.arguments()[3:])

        for (name, options), rates in itertools.product(OPTIONS.items(), RATES):
            if name != "some rest":
                for dtype in (F32, torch.bfloat16, F64):
                    kind = f"{rates}, {name}, {dtype}"
                    yield kind, "inner_update", functools.partial(arguments, rates, dtype, options)
