"""lstm_step in the suite.

Axis legend: N coordinates, F features (1 or 2), H hidden units, L layers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from metakern.ops import LSTMState, lstm_step, pack_state, unpack_state
from metakern.ops.lstm_step import reference
from tests.conformance.ops.operators import CPP, Example, Operator, Spec, Tensors, gather, listed
from tests.cuda.device import Device
from tests.ops.lstm_step.emulator import kernels
from tests.problems import make_problem

F32, F64 = torch.float32, torch.float64
HALVES = (torch.bfloat16, torch.float16)
SLOW = ("interpreted", "emulated", "cuda", "triton")


def tails() -> list[Spec]:
    """Numbers of coordinates that leave remainders in tiles and in every instruction set's vectors."""
    common = [Spec(f"N={n}", {"n": n}, sanitize=True) for n in (0, 1, 31, 33)]
    few = [Spec(f"N={n}", {"n": n}, on=("cpp", "reference"), sanitize=True) for n in (15, 16, 17, 1025)]
    long = [
        Spec("N=1023", {"n": 1023}, on=CPP),
        Spec("N=32", {"n": 32}, on=("interpreted", "emulated")),
        Spec("N=100", {"n": 100}, on=("interpreted",)),
    ]
    gpu = [Spec(f"N={n}, F32", {"n": n}, (F32,), ("emulated", "cuda", "triton")) for n in (127, 1025, 4097)]
    # More tiles than one partial sum holds, and than there are groups of them.
    many = [
        Spec("many", {"n": 140_001, "hidden": 3, "preprocess_scale": 5.0}, on=CPP),
        Spec("many, H=20", {"n": 35_000}, (F32,), CPP),
        Spec("many, on a GPU", {"n": 400_003}, (F32,), ("cuda", "triton")),
    ]
    return [*common, *few, *long, *gpu, *many]


def sizes() -> list[Spec]:
    """Hidden units and layers; sizes with specialised kernels, and remainders."""
    found = []
    for hidden, layers in itertools.product((1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 20, 31, 32, 33, 63, 64), (1, 2, 3)):
        on = ["cpp", "cuda"]
        if hidden in (1, 7, 20, 32, 64):
            on.append("interpreted")
        if layers == 1 + hidden % 3 or hidden in (7, 20, 32):
            on += ["emulated", "reference"]
        if (hidden, layers) in ((20, 1), (32, 2), (7, 3)):
            on.append("triton")
        name, size = f"H={hidden} L={layers}", {"n": 33, "hidden": hidden, "layers": layers}
        sanitize = hidden in (1, 7, 17, 64)
        found.append(Spec(name, size, (F32,), tuple(on), sanitize))
        if hidden == 64 and layers > 1:
            on.remove("interpreted")  # it is slow
        found.append(Spec(f"{name} none", size | {"preprocess": "none"}, (F64,), tuple(on), sanitize))
    for hidden in (20, 32, 7):
        size = {"n": 45, "hidden": hidden, "layers": 3}
        found.append(Spec(f"H={hidden} L=3, halves", size, HALVES, ("emulated",)))
    return found


def preprocessings() -> list[Spec]:
    """Preprocessings, their scale, and the output scale."""
    found = []
    for name, scale, output in itertools.product(reference.PREPROCESS, (0.5, 5.0, 10.0, 30.0), (0.1, 1.0, -3.0, 0.0)):
        size = {"n": 70, "preprocess": name, "preprocess_scale": scale, "output_scale": output}
        on = ("cpp", "cuda", "emulated") if output == -3.0 and scale != 5.0 else CPP
        if (scale, output) == (5.0, -3.0):
            on = ("cpp", "reference", "triton")
        found.append(Spec(f"{name} p={scale} s={output}", size, (F32, F64), on))
    for name, scale in itertools.product(reference.PREPROCESS, (0.5, 80.0)):
        size = {"n": 30, "hidden": 7, "preprocess": name, "preprocess_scale": scale, "output_scale": -3.0}
        rest = (F32, torch.bfloat16, F64)
        found.append(Spec(f"{name} p={scale}", size, rest, ("interpreted",)))
        # Gradients above 65,504 are infinite in float16.
        found.append(Spec(f"{name} p={scale}", size, (torch.float16,), ("interpreted",), gradients=scale < 80))
    return found


def _kept(operator: str, problem: Any) -> list[Tensor]:
    """The gates that a backward takes, as forward keeps them."""
    if operator != "lstm_step_with_gates_backward":
        return []
    tensors = problem.params, problem.grads, problem.state.data, problem.weights
    return [torch.ops.metakern.lstm_step_with_gates(*tensors, 1, 10.0, 0.1, 0)[2]]


class LstmStep(Operator):
    """One step of the coordinatewise LSTM with packed state."""

    name = "lstm_step"
    specs = (*tails(), *sizes(), *preprocessings())
    small = {"n": 4, "hidden": 3, "preprocess_scale": 2.0, "grads": (0.5, -0.02, 0.05, -1.5)}  # the kink is at 0.135
    tiny = {"n": 2, "hidden": 2, "layers": 1, "preprocess_scale": 2.0, "grads": (0.5, -0.05)}
    spread = {"n": 20_001, "hidden": 7}
    scheduled = {"n": 417, "hidden": 20}
    viewed = {"n": 77, "hidden": 7}
    faulted = {"n": 37, "hidden": 5}
    batched = {"n": 45, "hidden": 5}
    batched_otherwise = ({"n": 1}, {"n": 32})
    isolated = tuple(
        ({"n": 67, "hidden": 5, "layers": 3, "preprocess": name}, (0, 40, 66))
        for name in reversed(reference.PREPROCESS)
    )
    varied = tuple({"n": n, "hidden": 5} for n in (33, 70, 129, 300))
    draws = st.fixed_dictionaries(
        {
            "n": st.just(0) | st.integers(9, 300),  # errors are relative to the largest of several numbers
            "hidden": st.integers(1, 64),
            "layers": st.integers(1, 3),
            "preprocess": st.sampled_from(reference.PREPROCESS),
        }
    )
    inductor = True
    differentiable = ("params", "grads", "state", "weights")
    batches = (("params", "grads", "state"), ("grads", "weights"))
    exact_batches = True
    operators = ("lstm_step", "lstm_step_", "lstm_step_backward")
    cpu_operators = ("lstm_step_with_gates", "lstm_step_with_gates_backward")
    batched_operators = ("lstm_step_backward", "lstm_step_with_gates_backward")  # forward's unused lanes differ

    def make(
        self,
        dtype: torch.dtype,
        *,
        n: int = 33,
        hidden: int = 20,
        layers: int = 2,
        seed: int = 0,
        grads: tuple[float, ...] | None = None,
        **options: Any,
    ) -> Example:
        """``grads`` are given if the preprocessing's kinks matter."""
        problem = make_problem(n, hidden, layers, dtype, seed=seed, **options)
        if grads is not None:
            problem.grads = torch.tensor(grads, dtype=dtype)
        tensors = {"params": problem.params, "grads": problem.grads, "state": problem.state.data}
        return Example(tensors | listed("weights", problem.weights), problem.options)

    @staticmethod
    def _state(example: Example) -> LSTMState:
        params = example.tensors["params" if isinstance(example.tensors["params"], Tensor) else "grads"]
        return LSTMState(example.tensors["state"], params.numel())

    def call(self, example: Example, backend: str) -> Tensors:
        tensors, state = example.tensors, self._state(example)
        weights = gather(tensors, "weights")
        new, new_state = lstm_step(
            tensors["params"], tensors["grads"], state, weights, backend=backend, **example.options
        )
        h, c = unpack_state(new_state)
        return {"new params": new, "new h": h, "new c": c}

    def reference(self, example: Example) -> Tensors:
        tensors, state = example.tensors, unpack_state(self._state(example))
        weights = gather(tensors, "weights")
        new, h, c = reference.lstm_step(tensors["params"], tensors["grads"], *state, weights, **example.options)
        return {"new params": new, "new h": h, "new c": c}

    def emulate(self, example: Example, device: Device, seeds: Callable[[Tensors], Tensors]) -> tuple[Tensors, Tensors]:
        tensors, weights = example.tensors, gather(example.tensors, "weights")
        arguments = (tensors["grads"], self._state(example), weights, example.options)
        new, new_state = kernels().forward(tensors["params"], *arguments, device=device)
        h, c = unpack_state(new_state)
        results = {"new params": new, "new h": h, "new c": c}
        start = seeds(results)
        grad_state = pack_state(start["new h"], start["new c"]).data
        of_grads, of_state, of_weights = kernels().backward(
            *(start["new params"], grad_state, tensors["grads"], tensors["state"], weights, example.options),
            device=device,
        )
        for x in (new_state.data, of_state):
            lanes = x.movedim(-1, 1).flatten(0, 1)[new.numel() :]
            assert not lanes.any(), "what lies behind the last coordinate is not zero"
        return results, {"grads": of_grads, "state": of_state} | listed("weights", of_weights)

    def dtype_of(self, result: str, example: Example) -> torch.dtype:
        return example.tensors["params" if result == "new params" else "state"].dtype

    def visible(self, name: str, x: Tensor, example: Example) -> Tensor:
        """h and c of a packed state, [2, L, N, H]."""
        if name != "state":
            return x
        return torch.stack(unpack_state(LSTMState(x, example.tensors["params"].numel())))

    def unit_axis(self, name: str, example: Example) -> int | None:
        return {"params": 0, "grads": 0, "new params": 0, "new h": 1, "new c": 1, "state": 2}.get(name)

    def spoil(self, name: str, x: Tensor, unit: int, value: float, example: Example) -> Tensor:
        if name != "state":
            return super().spoil(name, x, unit, value, example)
        spoiled = x.clone()
        spoiled[unit // 32, 0, 1, 0, unit % 32] = value
        return spoiled

    def raw(self, operator: str, seed: int = 0, tasks: int = 3, loss: int = 0, suffix: str = "") -> list[Any]:
        problem = make_problem(37, 5, 2, seed=seed)
        options = [problem.weights, 1, 10.0, 0.1, 0]
        if not operator.endswith("backward"):
            return [problem.params, problem.grads, problem.state.data, *options]
        grads = problem.cotangents[0], pack_state(*problem.cotangents[1:]).data
        return [*grads, problem.grads, problem.state.data, *_kept(operator, problem), *options]

    def opchecks(self) -> Iterable[tuple[str, str, Callable[[], tuple[Any, ...]]]]:
        def arguments(name: str, n: int, dtype: torch.dtype) -> tuple[Any, ...]:
            problem = make_problem(n, 3, 2, dtype)
            data = problem.state.data
            tensors = [problem.params, problem.grads, data]
            if name.endswith("backward"):
                tensors = [torch.randn(n).to(dtype), torch.randn(data.shape).to(data.dtype), problem.grads, data]
                tensors += _kept(name, problem)
            needs = name in ("lstm_step", "lstm_step_with_gates")
            leaves = [x.clone().requires_grad_(needs) for x in tensors]
            return (*leaves, [w.clone().requires_grad_(needs) for w in problem.weights], 1, 10.0, 0.1, 0)

        for name in (*self.operators, *self.cpu_operators):
            for n in (0, 33):
                for dtype in (F32, torch.bfloat16, F64) if name == "lstm_step" else (F32,):
                    yield f"{name} N={n} {dtype}", name, functools.partial(arguments, name, n, dtype)
