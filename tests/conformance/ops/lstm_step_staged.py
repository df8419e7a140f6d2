"""lstm_step_staged in the suite.

Axis legend: N coordinates, T tasks, H hidden units, L layers, E rows of the stages' own state, K task inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from metakern.ops import LSTMState, lstm_step_staged, pack_state, unpack_state
from metakern.ops.lstm_step import reference
from tests.conformance.ops.operators import Example, Operator, Spec, Tensors, gather, listed
from tests.ops.lstm_step.test_stages import PAIRS, make_staged

F32, F64 = torch.float32, torch.float64
CPU = ("cpp", "reference")


class LstmStepStaged(Operator):
    """One step with features and a head of any kind; results by the C++ kernels and the reference alone."""

    name = "lstm_step_staged"
    specs = (
        *(
            Spec(f"{features} {head}", {"n": 3 * 37, "features": features, "head": head, "tasks": 3}, on=CPU)
            for features, head in PAIRS
        ),
        *(
            Spec(f"{features} {head} N={n} H={hidden} L={layers}", {"n": n, "features": features, "head": head, **size})
            for (features, head), (n, hidden, layers) in itertools.product(
                (("moments", "add"), ("log_sign", "gates")), ((1, 1, 1), (31, 1, 3), (33, 7, 3), (64, 64, 1))
            )
            for size in ({"hidden": hidden, "layers": layers},)
        ),
    )
    small = tiny = {"n": 6, "hidden": 3, "layers": 1, "features": "moments", "head": "add", "tasks": 2}
    spread = {"n": 20_001, "hidden": 7, "features": "moments", "head": "add", "tasks": 3}
    scheduled = small
    viewed = {"n": 78, "hidden": 7, "features": "moments", "head": "add", "tasks": 2}
    batched = {"n": 46, "hidden": 5, "features": "moments", "head": "add", "tasks": 2}
    batched_otherwise = ({"features": "log_sign", "head": "gates"},)
    faulted = {"n": 38, "hidden": 5, "features": "moments", "head": "add", "tasks": 2}
    isolated = (({"n": 66, "hidden": 5, "features": "log_sign", "head": "gates"}, (0, 40, 65)),)
    draws = st.fixed_dictionaries(
        {
            "n": st.integers(9, 200),
            "hidden": st.integers(1, 64),
            "layers": st.integers(1, 3),
            "pair": st.sampled_from(PAIRS),
        }
    )
    differentiable = ("params", "grads", "state", "stage_state", "task_inputs", "weights")
    tolerates = (("type", "stage_state"), ("type", "task_inputs"))  # None: the stages keep and read nothing
    operators = ("lstm_step_staged", "lstm_step_staged_backward")

    def serves(self, kind: str, dtype: torch.dtype) -> bool:
        return kind in CPU

    def make(
        self, dtype: torch.dtype, *, n: int, features: str = "none", head: str = "add", pair: Any = None, **sizes: Any
    ) -> Example:
        """``pair`` is that of features and head."""
        features, head = pair or (features, head)
        staged = make_staged(n, features, head, dtype, **sizes)
        tensors = {"params": staged.params, "grads": staged.grads, "state": pack_state(staged.h, staged.c).data}
        if staged.stage_state.numel():
            tensors["stage_state"] = staged.stage_state
        if staged.task_inputs.numel():
            tensors["task_inputs"] = staged.task_inputs
        return Example(tensors | listed("weights", staged.weights), {"features": features, "head": head})

    @staticmethod
    def _named(new: Tensor, h: Tensor, c: Tensor, stage_state: Tensor) -> Tensors:
        named = {"new params": new, "new h": h, "new c": c}
        return named | ({"new stage state": stage_state} if stage_state.shape[0] else {})

    @staticmethod
    def _state(example: Example) -> LSTMState:
        params = example.tensors["params" if isinstance(example.tensors["params"], Tensor) else "grads"]
        return LSTMState(example.tensors["state"], params.numel())

    def call(self, example: Example, backend: str) -> Tensors:
        tensors = example.tensors
        given = {name: tensors[name] for name in ("stage_state", "task_inputs") if name in tensors}
        arguments = (tensors["params"], tensors["grads"], self._state(example), gather(tensors, "weights"))
        new, state, stage_state = lstm_step_staged(*arguments, backend=backend, **given, **example.options)
        return self._named(new, *unpack_state(state), stage_state)

    def reference(self, example: Example) -> Tensors:
        tensors, weights = example.tensors, gather(example.tensors, "weights")
        params, dtype = tensors["params"], weights[0].dtype
        states = tensors.get("stage_state", params.new_zeros(0, params.numel(), dtype=dtype))
        tasks = tensors.get("task_inputs", params.new_zeros(1, 0, dtype=dtype))
        stages = reference.FEATURES[example.options["features"]], reference.HEADS[example.options["head"]]
        repeated = tasks.repeat_interleave(params.numel() // len(tasks), 0).T
        state = unpack_state(self._state(example))
        found = reference.staged_step(params, tensors["grads"], *state, states, repeated, weights, *stages, 10.0, 0.1)
        return self._named(*found)

    def dtype_of(self, result: str, example: Example) -> torch.dtype:
        return example.tensors["params" if result == "new params" else "state"].dtype

    def visible(self, name: str, x: Tensor, example: Example) -> Tensor:
        """h and c of a packed state, [2, L, N, H]."""
        if name != "state":
            return x
        return torch.stack(unpack_state(LSTMState(x, example.tensors["params"].numel())))

    def unit_axis(self, name: str, example: Example) -> int | None:
        axes = {"params": 0, "grads": 0, "new params": 0, "new h": 1, "new c": 1, "state": 2}
        return (axes | {"stage_state": 1, "new stage state": 1}).get(name)

    def spoil(self, name: str, x: Tensor, unit: int, value: float, example: Example) -> Tensor:
        if name != "state":
            return super().spoil(name, x, unit, value, example)
        spoiled = x.clone()
        spoiled[unit // 32, 0, 1, 0, unit % 32] = value
        return spoiled

    def raw(self, operator: str, seed: int = 0, tasks: int = 3, loss: int = 0, suffix: str = "") -> list[Any]:
        staged = make_staged(36, "moments", "add", tasks=2, hidden=5)
        inputs = [staged.params, staged.grads, pack_state(staged.h, staged.c).data, staged.stage_state]
        rest = [staged.task_inputs, staged.weights, *staged.options()]
        if not operator.endswith("backward"):
            return [*inputs, *rest]
        grads = [staged.cotangents[0], pack_state(*staged.cotangents[1:3]).data, staged.cotangents[3]]
        return [*grads, *inputs, *rest]

    def opchecks(self) -> Iterable[tuple[str, str, Callable[[], tuple[Any, ...]]]]:
        for name in self.operators:
            yield name, name, lambda name=name: tuple(self.raw(name))
