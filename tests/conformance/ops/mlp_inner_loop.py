"""mlp_inner_loop and mlp_meta_loss in the suite.

Axis legend: T tasks, S support and Q query samples of a task, K inner steps, I inputs and O outputs of a layer.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from metakern.ops import mlp_inner_loop, mlp_meta_loss
from metakern.ops.mlp_inner_loop import ACTIVATIONS, make_problem, reference
from metakern.ops.mlp_inner_loop.reference import LOSSES
from tests.conformance.ops.operators import CPP, Example, Operator, Spec, Tensors, gather, listed
from tests.cuda.device import Device
from tests.mlp_problems import MIXED, Case
from tests.ops.mlp_inner_loop.emulator import Arguments, kernels

F32, F64 = torch.float32, torch.float64
HALVES = (torch.bfloat16, torch.float16)
ORDERS = {"second": False, "first": True, "mixed": (False, True)}

#: Layouts of α and their shapes: by step, by parameter tensor, or both.
RATES = ("number", "shared", "shared and step", "tensor", "parameter", "tensor and step", "parameter and step")

#: Clipping norms: below all gradients of these problems, between them, above them.
NORMS = (0.05, 2.0, 1e3)

LAST = (0.3, 0.0, 0.2, 0.5)


def named(values: dict[str, Any]) -> str:
    """An example's name, from the values that vary between examples."""
    return " ".join(f"{key}={value}" for key, value in values.items()).replace("'", "")


def specs() -> Iterable[Spec]:
    """Examples, small for interpreted and emulated kernels."""
    wide = {"widths": [3, 40, 17, 5], "tasks": 17, "samples": 10, "queries": 10, "steps": 5, "rate": 0.05}
    small = {"widths": [3, 7, 3], "tasks": 2, "samples": 4, "queries": 3, "steps": 2}
    middle = {"widths": [3, 9, 4, 5], "tasks": 3, "samples": 5, "queries": 7, "steps": 2}
    for activation, loss in itertools.product(ACTIVATIONS, LOSSES):
        kind = {"activation": activation, "loss": loss}
        yield Spec(f"{activation} {loss}", {**wide, **kind}, on=(*CPP, "cuda"), sanitize=True)
        yield Spec(
            f"{activation} {loss} mixed", {**small, **kind, "first_order": ORDERS["mixed"]}, (F64,), ("interpreted",)
        )
        for order, first in ORDERS.items():
            yield Spec(
                f"{activation} {loss} {order}",
                {**middle, **kind, "first_order": first},
                (F32, F64),
                ("emulated", "reference"),
            )
        if loss == "mse" or activation == "relu":
            yield Spec(f"{activation} {loss} second", {**small, **kind}, (F32,), ("interpreted",))
    for names in MIXED:
        size = {"widths": [3, 7, 9, 5], "tasks": 17, "samples": 10, "queries": 11, "loss": "cross_entropy"}
        yield Spec(named({"": names}), size | {"steps": 3, "activation": names, "rate": 0.05}, on=CPP, sanitize=True)
        yield Spec(named({"": names}), {**middle, "activation": names}, (F32, F64), ("emulated",))
    for names in (["leaky_relu:0.2"] * 3, ["relu", "tanh", "sigmoid"], ["gelu", "leaky_relu:0.7", "identity"]):
        yield Spec(
            named({"": names}),
            {**small, "widths": [3, 5, 4, 6, 2], "steps": 1, "activation": names},
            (F64,),
            ("interpreted",),
        )
    yield from sized()
    yield from rated()
    yield from clipped()
    yield from halves()


def sized() -> Iterable[Spec]:
    """Partial groups of tasks, remainders of blocks, models too large for lanes, many layers."""
    for tasks, own in itertools.product((1, 15, 16, 17, 33), (False, True)):
        size = {"widths": [3, 7, 5, 1], "tasks": tasks, "samples": 17, "queries": 3, "steps": 5, "own": own}
        size |= {
            "rates": "parameter and step",
            "masked": True,
            "checkpoint_every": 2,
            "step_weights": (0.2, 0.0, 0.1, 0.0, 0.7),
        }
        yield Spec(f"T={tasks} own={own}", size, on=(*CPP, "cuda") if tasks == 33 else CPP, sanitize=True)
    for loss in LOSSES:
        size = {"widths": [90, 100, 3], "tasks": 3, "samples": 9, "queries": 11, "loss": loss, "steps": 2}
        yield Spec(f"no lanes {loss}", size | {"activation": "tanh", "rate": 0.05}, (F64,), CPP, sanitize=True)
    for widths, samples in (([1, 1], 1), ([35, 33, 34, 17], 33), ([3, 17, 16, 1], 17), ([2, 3, 4, 3, 2, 1], 2)):
        size = {
            "widths": widths,
            "tasks": 1,
            "samples": samples,
            "queries": samples + 1,
            "steps": 1,
            "activation": "tanh",
        }
        yield Spec(named({"widths": widths}), size, (F64,), ("interpreted", "cpp", "reference"))
    shapes = (
        ([1, 1], 1, 1),
        ([2, 3], 2, 9),
        ([1, 40, 40, 1], 5, 10),
        ([7, 33, 2], 33, 1),
        ([2, 3, 4, 3, 2, 3, 4, 3, 2], 3, 4),
    )
    for (widths, samples, queries), own in itertools.product(shapes, (False, True)):
        size = {"widths": widths, "tasks": 2, "samples": samples, "queries": queries, "steps": 2, "own": own}
        yield Spec(
            named({"widths": widths, "own": own}),
            size | {"activation": "tanh"},
            (F64,),
            ("emulated", "cuda", "reference"),
        )
    for own in ((0, 1, 2, 3), (1, 2)):
        size = {"widths": [2, 5, 3], "tasks": 3, "samples": 4, "queries": 3, "steps": 1, "own": own}
        yield Spec(named({"own": own}), size, (F64,), ("interpreted", "cpp", "reference"))
    for loss in ("cross_entropy", "binary_cross_entropy_with_logits"):
        size = {"widths": [2, 3, 3], "tasks": 5, "samples": 5, "queries": 4, "loss": loss, "steps": 1, "rate": 1e-4}
        yield Spec(f"large arguments of {loss}", size | {"activation": "tanh", "gain": 300.0}, (F64,))


def rated() -> Iterable[Spec]:
    """Layouts of α, first and second order, frozen parameters, masks, step weights and checkpoints."""
    for rates, first in itertools.product(RATES[1:], (False, True, (False, True, False))):
        size = {"widths": [2, 9, 3], "tasks": 11, "samples": 5, "queries": 4, "steps": 3, "activation": "tanh"}
        yield Spec(
            f"{rates} {first}", size | {"rates": rates, "first_order": first}, (F64,), (*CPP, "cuda", "reference")
        )
        if first is not True:
            yield Spec(
                f"{rates} {first}", size | {"tasks": 3, "rates": rates, "first_order": first}, (F64,), ("emulated",)
            )
    for rates in RATES[1:]:
        size = {"widths": [2, 5, 3], "tasks": 2, "samples": 4, "queries": 3, "steps": 2, "activation": "tanh"}
        yield Spec(rates, size | {"rates": rates, "first_order": (False, True)}, (F64,), ("interpreted",))
    for adapted, clip_norm in itertools.product(([False, False, True, True], [True, False, False, True]), (None, 0.3)):
        size = {"widths": [2, 9, 3], "tasks": 3, "samples": 5, "queries": 4, "steps": 3, "adapted": adapted}
        size |= {"activation": "sigmoid", "clip_norm": clip_norm, "loss": "cross_entropy" if clip_norm else "mse"}
        on = (
            ("emulated", *CPP, "cuda", "reference")
            if adapted[1] or clip_norm
            else ("emulated", *CPP, "cuda", "interpreted", "reference")
        )
        yield Spec(named({"adapted": adapted, "clip": clip_norm}), size, (F64,), on, sanitize=True)
    for loss, every in itertools.product(LOSSES, (None, 1, 2, 4)):
        size = {"widths": [2, 9, 3], "samples": 6, "queries": 5, "loss": loss, "steps": 4, "masked": True}
        size |= {"checkpoint_every": every, "step_weights": LAST}
        yield Spec(f"masks {loss} every={every}", size | {"tasks": 18}, (F64,), (*CPP, "cuda"))
        yield Spec(f"masks {loss} every={every}", size | {"tasks": 4}, (F64,), ("emulated",))
    for loss, every in zip(LOSSES, (None, 2, 1), strict=True):
        size = {"widths": [2, 5, 3], "tasks": 2, "samples": 4, "queries": 3, "loss": loss, "steps": 3, "masked": True}
        yield Spec(
            f"masks {loss} every={every}",
            size | {"checkpoint_every": every, "step_weights": (0.3, 0.0, 0.7)},
            (F64,),
            ("interpreted",),
        )


def clipped() -> Iterable[Spec]:
    """Norms below, between and above the gradients, with every layout of α and masks."""
    for tasks, norm in itertools.product((1, 15, 17), (0.05, 2.7, 1e3)):
        size = {"widths": [3, 7, 5, 1], "tasks": tasks, "samples": 17, "queries": 3, "steps": 5, "masked": True}
        size |= {"rates": "parameter and step", "checkpoint_every": 2, "clip_norm": norm, "activation": "tanh"}
        yield Spec(f"T={tasks} clip={norm}", size, on=CPP, sanitize=True)
    for rates, first in itertools.product(("shared", "tensor", "parameter"), (False, True, (False, True, False))):
        size = {"widths": [2, 9, 3], "tasks": 11, "samples": 5, "queries": 4, "steps": 3, "activation": "gelu"}
        yield Spec(
            f"{rates} {first} clipped", size | {"rates": rates, "first_order": first, "clip_norm": 0.5}, (F64,), CPP
        )
    for norm, (order, first) in itertools.product(NORMS, ORDERS.items()):
        size = {"widths": [3, 9, 4, 5], "tasks": 3, "samples": 5, "queries": 7, "steps": 2, "activation": "tanh"}
        yield Spec(f"clip={norm} {order}", size | {"first_order": first, "clip_norm": norm}, (F32, F64), ("emulated",))
        if order == "mixed":
            less = {"widths": [3, 7, 3], "tasks": 2, "samples": 4, "queries": 3}
            yield Spec(
                f"clip={norm}", size | less | {"first_order": first, "clip_norm": norm}, (F64,), ("interpreted",)
            )
    for rates in ("shared", "tensor", "parameter and step"):
        size = {
            "widths": [2, 9, 1],
            "tasks": 3,
            "samples": 5,
            "queries": 4,
            "steps": 3,
            "first_order": (False, True, False),
        }
        on = ("emulated", "interpreted") if rates != "tensor" else ("emulated",)
        yield Spec(f"{rates} clipped", size | {"rates": rates, "clip_norm": 0.5}, (F64,), on)


def halves() -> Iterable[Spec]:
    """16-bit storage with float32 arithmetic."""
    size = {"tasks": 3, "samples": 5, "queries": 4, "steps": 2, "activation": "tanh", "own": True}
    for rates in ("number", "parameter"):
        yield Spec(
            f"halves {rates}", size | {"widths": [2, 9, 3], "rates": rates, "steps": 3}, HALVES, ("emulated", "cuda")
        )
    yield Spec(
        "halves", size | {"widths": [3, 7, 2], "rates": "tensor", "checkpoint_every": 1}, HALVES, ("interpreted",)
    )


class MlpOperator(Operator):
    """Shared by both operators."""

    dtypes = (F32, F64, *HALVES)
    small = {"widths": [2, 4, 1], "tasks": 3, "rates": "tensor and step", "masked": True, "activation": "gelu"}
    tiny = {"widths": [1, 2, 1], "tasks": 2, "samples": 2, "queries": 2, "steps": 1, "activation": "tanh"}
    scheduled = {"widths": [17, 20, 4], "tasks": 2, "samples": 6, "steps": 3, "rates": "tensor", "masked": True}
    viewed = {"widths": [3, 9, 4], "tasks": 3, "rates": "parameter", "own": True, "masked": True}
    faulted = {"widths": [2, 4, 3], "tasks": 3, "rates": "tensor and step", "own": True, "masked": True}
    tolerates = (("type", "support_mask"), ("type", "query_mask"))  # None: all count
    spoken = {f"support_{part}": rf"support_{part}|\b{part}\b" for part in ("x", "y", "mask")}
    batched = {"widths": [2, 4, 1], "tasks": 3, "rates": "tensor and step", "masked": True, "activation": "tanh"}
    batched_otherwise = ({"own": True}, {"rates": "number"}, {"clip_norm": 0.4})
    spread = {"widths": [3, 20, 4], "tasks": 67, "steps": 3, "clip_norm": 2.7, "activation": "tanh"}
    isolated = (
        ({"widths": [2, 9, 3], "tasks": 18, "own": True}, (5, 17)),  # one in a group of lanes, one by itself
        ({"widths": [2, 9, 3], "tasks": 18, "own": True, "clip_norm": 0.3}, (5,)),
    )
    varied = ()
    draws = st.fixed_dictionaries(
        {
            "tasks": st.sampled_from((1, 2, 7, 16, 33)),
            "samples": st.integers(1, 20),
            "steps": st.integers(1, 4),
            "widths": st.lists(st.integers(1, 14), min_size=2, max_size=5),
            "activation": st.sampled_from(ACTIVATIONS)
            | st.lists(st.sampled_from((*ACTIVATIONS, "leaky_relu:0.5", "identity")), min_size=3, max_size=3),
            "clip_norm": st.sampled_from((None, None, 0.1, 2.0)),
            "loss": st.sampled_from(LOSSES),
            "first_order": st.booleans(),
            "checkpoint_every": st.sampled_from((None, 1, 2, 3)),
            "own": st.booleans(),
            "seed": st.integers(0, 99),
        }
    ).filter(lambda sizes: sizes["loss"] != "cross_entropy" or sizes["widths"][-1] > 1)  # of one class it is zero
    differentiable = ("params", "lr")
    batches = (
        ("params[0]", "params[3]"),
        ("support_x", "support_y"),
        ("support_mask", "query_mask"),
        ("query_x", "query_y"),
    )
    one_scale = True
    hides_infinity = ("params[1]",)  # a unit whose bias is -inf is dead
    query = False

    def fewer(self, sizes: Mapping[str, Any], units: tuple[int, ...]) -> tuple[Mapping[str, Any], tuple[int, ...]]:
        # A program reuses the first task's scratch memory for the next.
        return {**sizes, "tasks": 3, "steps": 1}, (0,)

    def serves(self, kind: str, dtype: torch.dtype) -> bool:
        """CPU kernels do not support 16-bit storage, and the reference would compute in 16 bits."""
        if kind == "triton":  # GPUs use the faster CUDA kernels; these take minutes to compile
            return False
        return dtype in (F32, F64) or kind not in ("cpp", "reference")

    def make(
        self,
        dtype: torch.dtype,
        *,
        widths: list[int],
        tasks: int,
        samples: int = 5,
        queries: int = 4,
        loss: str = "mse",
        own: bool | tuple[int, ...] = False,
        seed: int = 0,
        steps: int = 2,
        rates: str = "number",
        rate: float = 0.1,
        masked: bool = False,
        gain: float = 1.0,
        activation: str | list[str] = "relu",
        **options: Any,
    ) -> Example:
        """``own``: parameters that differ by task; ``gain``: a factor of the second layer."""
        case = Case(list(widths), tasks, samples, queries, loss, bool(own), seed)
        params = [p if own is True or not own or i in own else p[0] for i, p in enumerate(case.params)]
        if gain != 1:
            params[2] = params[2] * gain
        tensors = listed("params", params)
        lead = (steps,) if rates.endswith("step") else ()
        if rates.startswith("shared"):
            tensors["lr[0]"] = rate + 0.05 * case.draw(*lead)
        elif rates != "number":
            shapes = [p.shape[-2 + i % 2 :] if "parameter" in rates else () for i, p in enumerate(params)]
            tensors |= listed("lr", (rate + 0.05 * case.draw(*lead, *shape) for shape in shapes))
        sets = {"support": case.support} | ({"query": case.query} if self.query else {})
        for name, (x, y) in sets.items():
            tensors |= {f"{name}_x": x, f"{name}_y": y}
            if masked:
                mask = torch.rand(x.shape[:2], generator=case.generator) < 0.6
                mask[:, -1] = True
                tensors[f"{name}_mask"] = mask
        tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
        if not isinstance(activation, str):
            activation = list(activation)[: len(widths) - 2]
        options = {"steps": steps, "activation": activation, "loss": loss, "per_step": bool(lead)} | options
        if not self.query:
            options.pop("step_weights", None)
        return Example(tensors, options | {"rate": rate, "shared": rates.startswith("shared")})

    def _split(self, example: Example) -> tuple[list[Tensor], Any, dict[str, Any]]:
        """params, α and the options of the public function."""
        tensors, options = example.tensors, dict(example.options)
        rates, rate, shared = gather(tensors, "lr"), options.pop("rate"), options.pop("shared")
        for name in ("support_mask", "query_mask"):
            if name in tensors:
                options[name] = tensors[name]
        return gather(tensors, "params"), rates[0] if shared else rates or rate, options

    def _trajectory(self, example: Example) -> tuple[list[list[Tensor]], dict[str, Any]]:
        params, lr, options = self._split(example)
        orders = options.get("first_order", False)
        trajectory = reference.mlp_inner_loop(
            params,
            example.tensors["support_x"],
            example.tensors["support_y"],
            options.get("support_mask"),
            lr,
            steps=options["steps"],
            per_step=options["per_step"],
            adapted=options.get("adapted") or [True] * len(params),
            first_order=[orders] * options["steps"] if isinstance(orders, bool) else orders,
            activation=options["activation"],
            loss=options["loss"],
            clip_norm=options.get("clip_norm"),
        )
        return trajectory, options

    def _arguments(self, example: Example) -> Arguments:
        """Arguments of the emulated device."""
        tensors, (params, _, options) = example.tensors, self._split(example)
        rates = gather(tensors, "lr")
        sets = []
        for name in ("support", "query"):
            mask = options.pop(f"{name}_mask", None)
            sets.append((tensors[f"{name}_x"], tensors[f"{name}_y"], mask) if f"{name}_x" in tensors else None)
        steps, _ = options.pop("steps"), options.pop("step_weights", None)
        every = options.pop("checkpoint_every", None) or (steps if self.query else 1)
        values = {"adapted": None, "first_order": False} | options
        problem = make_problem(params, rates or example.options["rate"], steps, checkpoint_every=every, **values)
        return Arguments(problem, params, rates, *sets)

    def unit_axis(self, name: str, example: Example) -> int | None:
        if name.startswith("params["):
            index = int(name[7:-1])
            return 0 if example.tensors[name].dim() == 3 - index % 2 else None
        return None if name.startswith("lr") else 0

    def slack(self, name: str, dtype: torch.dtype, kind: str) -> float:
        """With 16 bits, a rate's gradient is a sum over tasks of rounded numbers."""
        return 4 if dtype in HALVES and name.startswith("gradient") else 1

    def raw(self, operator: str, seed: int = 0, tasks: int = 3, loss: int = 0, suffix: str = "") -> list[Any]:
        case, steps = Case([2, 4, 3], tasks, 5, 4, LOSSES[loss], own=seed % 2 == 1, seed=seed), 2
        params = [p.float() for p in case.params]
        sets = zip(case.data(F32), (5, 4), strict=True)
        support, query = ((*data, torch.ones(tasks, n, dtype=torch.bool)) for data, n in sets)
        lr = [torch.full(p.shape[-2 + i % 2 :], 0.1) for i, p in enumerate(params)]
        options = [lr, 0.0, steps, False, -1, 1, loss, 1]
        second_order, weights = torch.tensor([True, False]), torch.tensor([0.5, 1.0])
        # Options of activations and of clipping; every third case has none.
        last: list[Any] = [[], None] if seed % 3 == 0 else [[0.1], 0.5]
        options[5] = 1 if seed % 3 == 0 else [4]  # a leaky ReLU has the slope
        forward = getattr(torch.ops.metakern, f"{self.name}{suffix}")
        if not self.query:
            arguments = [params, *support, *options, True, second_order, *last]
            if operator == self.name:
                return arguments
            results, trajectory = forward(*arguments)
            return [[torch.ones_like(x) for x in results], trajectory, params, *support, *options, second_order, *last]
        arguments = [params, *support, *query, *options, second_order, weights, True, *last]
        if operator == self.name:
            return arguments
        losses, task_grads = forward(*arguments)
        return [torch.ones_like(losses), task_grads, params, *support[:2], lr, steps, False, loss]

    def opchecks(self) -> Iterable[tuple[str, str, Callable[[], tuple[Any, ...]]]]:
        def arguments(own: bool, rates: str, masked: bool, slopes: list[float], clip_norm: float | None) -> Any:
            size = {"widths": [2, 4, 3, 1], "own": own, "rates": rates, "masked": masked}
            example = self.make(F64, tasks=3, **size)
            tensors, steps = example.tensors, 2
            leaves = [[x.clone().requires_grad_() for x in gather(tensors, name)] for name in ("params", "lr")]
            sets = [tensors.get(f"support_{part}") for part in ("x", "y", "mask")]
            per_step = rates.endswith("step")
            scalars = (0.1, steps, per_step, -1, [4, 1] if slopes else [1], 0, 1)
            flags, weights = torch.ones(steps, dtype=torch.bool), torch.tensor([0.25, 0.75], dtype=F64)
            if not self.query:
                return (leaves[0], *sets, leaves[1], *scalars, True, flags, slopes, clip_norm)
            sets += [tensors.get(f"query_{part}") for part in ("x", "y", "mask")]
            return (leaves[0], *sets, leaves[1], *scalars, flags, weights, True, slopes, clip_norm)

        for own, rates, masked, slopes, clip_norm in (
            (False, "number", False, [], None),
            (False, "tensor and step", True, [], None),
            (True, "tensor and step", True, [], None),
            (False, "shared", False, [], 0.5),
            (False, "shared", False, [0.2, 0.0], 0.5),
        ):
            kind = f"{self.name} own={own} {rates} slopes={slopes} clip={clip_norm}"
            yield kind, self.name, functools.partial(arguments, own, rates, masked, slopes, clip_norm)


class MlpInnerLoop(MlpOperator):
    """Parameters of T MLPs after K steps."""

    name = "mlp_inner_loop"
    operators = batched_operators = ("mlp_inner_loop", "mlp_inner_loop_backward")
    specs = tuple(spec for spec in specs() if not ("interpreted" in spec.on and spec.name.count("cross")))

    def call(self, example: Example, backend: str) -> Tensors:
        params, lr, options = self._split(example)
        sets = example.tensors["support_x"], example.tensors["support_y"]
        return listed("adapted", mlp_inner_loop(params, *sets, lr=lr, backend=backend, **options))

    def reference(self, example: Example) -> Tensors:
        return listed("adapted", self._trajectory(example)[0][-1])

    def emulate(self, example: Example, device: Device, seeds: Callable[[Tensors], Tensors]) -> tuple[Tensors, Tensors]:
        a = self._arguments(example)
        results, trajectory = kernels().mlp_inner_loop(a, device=device)
        start = list(seeds(listed("adapted", results)).values())
        grads, rates = kernels().mlp_inner_loop_backward(start, trajectory, a, device)
        return listed("adapted", results), listed("params", grads) | listed("lr", rates)


class MlpMetaLoss(MlpOperator):
    """Query losses of T MLPs after K steps."""

    name, folder = "mlp_meta_loss", "mlp_inner_loop"
    operators = batched_operators = ("mlp_meta_loss", "mlp_meta_loss_backward")
    query = True
    specs = tuple(specs())

    def call(self, example: Example, backend: str) -> Tensors:
        params, lr, options = self._split(example)
        support, query = ((example.tensors[f"{name}_x"], example.tensors[f"{name}_y"]) for name in ("support", "query"))
        return {"losses": mlp_meta_loss(params, support, query, lr=lr, backend=backend, **options)}

    def reference(self, example: Example) -> Tensors:
        (_, *trajectory), options = self._trajectory(example)
        weights = options.get("step_weights") or [*[0.0] * (options["steps"] - 1), 1.0]
        query, mask = (example.tensors["query_x"], example.tensors["query_y"]), options.get("query_mask")
        total: Any = 0.0
        for weight, now in zip(weights, trajectory, strict=True):
            prediction = reference.predict(now, query[0], options["activation"])
            total = total + weight * reference.task_losses(prediction, query[1], options["loss"], mask)
        return {"losses": total}

    def emulate(self, example: Example, device: Device, seeds: Callable[[Tensors], Tensors]) -> tuple[Tensors, Tensors]:
        a = self._arguments(example)
        steps = a.problem.steps
        weights = example.options.get("step_weights") or [0.0] * (steps - 1) + [1.0]
        losses, task_grads = kernels().mlp_meta_loss(a, weights, device=device)
        start = seeds({"losses": losses})["losses"]
        grads, rates = kernels().mlp_meta_loss_backward(start, task_grads, a, device)
        return {"losses": losses}, listed("params", grads) | listed("lr", rates)
