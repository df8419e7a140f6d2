"""lstm_step_staged in the suite.

Axis legend: N coordinates, H hidden units, L layers, E rows of the stages' own state, K coordinate inputs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from metakern.ops import LSTMState, lstm_step_staged, pack_state, unpack_state
from metakern.ops.lstm_step import reference
from metakern.ops.lstm_step.state import pack_rows, tiles, unpack_rows
from tests.conformance.ops.operators import Example, Operator, Spec, Tensors, gather, listed
from tests.cuda.device import Device
from tests.ops.lstm_step.emulator import kernels
from tests.ops.lstm_step.test_stages import OWN_PAIRS, PAIRS, SCALARS, make_staged, raw_inputs

F32, F64 = torch.float32, torch.float64
KINDS = ("cpp", "reference", "emulated", "cuda")


class LstmStepStaged(Operator):
    """One step with features and a head of any kind; Triton has no kernels for it."""

    name, folder = "lstm_step_staged", "lstm_step"
    specs = (
        *(Spec(f"{features} {head}", {"n": 111, "features": features, "head": head}) for features, head in PAIRS),
        *(
            Spec(f"{features} {head} N={n} H={hidden} L={layers}", {"n": n, "features": features, "head": head, **size})
            for (features, head), (n, hidden, layers) in itertools.product(
                OWN_PAIRS, ((1, 1, 1), (31, 1, 3), (33, 7, 3), (64, 64, 1))
            )
            for size in ({"hidden": hidden, "layers": layers},)
        ),
    )
    small = tiny = {"n": 6, "hidden": 3, "layers": 1, "features": "moments", "head": "tanh"}
    spread = {"n": 20_001, "hidden": 7, "features": "moments", "head": "tanh"}
    scheduled = small
    viewed = {"n": 78, "hidden": 7, "features": "log_sign_with_loss", "head": "gates"}
    batched = {"n": 46, "hidden": 5, "features": "log_sign_with_loss", "head": "gates"}
    batched_otherwise = ({"features": "moments", "head": "tanh"},)
    faulted = {"n": 38, "hidden": 5, "features": "log_sign_with_loss", "head": "gates"}
    isolated = tuple(
        ({"n": 66, "hidden": 5, "features": features, "head": head}, (0, 40, 65)) for features, head in OWN_PAIRS
    )
    draws = st.fixed_dictionaries(
        {
            "n": st.integers(9, 200),
            "hidden": st.integers(1, 64),
            "layers": st.integers(1, 3),
            "pair": st.sampled_from(PAIRS),
        }
    )
    differentiable = ("params", "grads", "state", "stage_state", "coordinate_inputs", "weights")
    tolerates = (("type", "stage_state"), ("type", "coordinate_inputs"))  # None: the stages keep and read nothing
    operators = ("lstm_step_staged", "lstm_step_staged_", "lstm_step_staged_backward")
    cpu_operators = ("lstm_step_stacked", "lstm_step_staged_with_gates", "lstm_step_staged_with_gates_backward")

    def serves(self, kind: str, dtype: torch.dtype) -> bool:
        return kind in KINDS

    def make(
        self, dtype: torch.dtype, *, n: int, features: str = "none", head: str = "add", pair: Any = None, **sizes: Any
    ) -> Example:
        """``pair`` is that of features and head."""
        features, head = pair or (features, head)
        staged = make_staged(n, features, head, dtype, **sizes)
        tensors = {"params": staged.params, "grads": staged.grads, "state": pack_state(staged.h, staged.c).data}
        if staged.stage_state.numel():
            tensors["stage_state"] = pack_rows(staged.stage_state)
        if staged.coordinate_inputs.numel():
            tensors["coordinate_inputs"] = staged.coordinate_inputs
        return Example(tensors | listed("weights", staged.weights), staged.keywords())

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
        given = {name: tensors[name] for name in ("stage_state", "coordinate_inputs") if name in tensors}
        arguments = (tensors["params"], tensors["grads"], self._state(example), gather(tensors, "weights"))
        new, state, stage_state = lstm_step_staged(*arguments, backend=backend, **given, **example.options)
        return self._named(new, *unpack_state(state), unpack_rows(stage_state, state.num_coordinates))

    def reference(self, example: Example) -> Tensors:
        tensors, weights = example.tensors, gather(example.tensors, "weights")
        params, dtype = tensors["params"], weights[0].dtype
        n = params.numel()
        none = params.new_zeros(0, n, dtype=dtype)
        states = unpack_rows(tensors["stage_state"], n) if "stage_state" in tensors else none
        stages = reference.FEATURES[example.options["features"]], reference.HEADS[example.options["head"]]
        inputs = (states, tensors.get("coordinate_inputs", none), weights)
        found = reference.staged_step(
            params, tensors["grads"], *unpack_state(self._state(example)), *inputs, *stages, SCALARS
        )
        return self._named(*found)

    def emulate(self, example: Example, device: Device, seeds: Callable[[Tensors], Tensors]) -> tuple[Tensors, Tensors]:
        tensors, weights = example.tensors, gather(example.tensors, "weights")
        n, dtype = tensors["params"].numel(), tensors["state"].dtype
        features, head = example.options["features"], example.options["head"]
        rows = tensors.get("stage_state", torch.zeros(tiles(n), 0, 32, dtype=dtype))
        inputs = tensors.get("coordinate_inputs", torch.zeros(0, n, dtype=dtype))
        arguments = [tensors["params"], tensors["grads"], tensors["state"], rows, inputs, weights]
        arguments += [list(reference.FEATURES).index(features), list(reference.HEADS).index(head), *SCALARS, 0]
        new, state, new_rows = kernels().lstm_step_staged(*arguments, device=device)
        results = self._named(new, *unpack_state(LSTMState(state, n)), unpack_rows(new_rows, n))
        start = seeds(results)
        grad_rows = pack_rows(start["new stage state"]) if "new stage state" in start else new_rows
        grad_state = pack_state(start["new h"], start["new c"]).data
        *found, of_weights = kernels().lstm_step_staged_backward(
            start["new params"], grad_state, grad_rows, *arguments, device=device
        )
        for x in (state, found[2], new_rows, found[3]):
            assert not x.movedim(-1, 1).flatten(0, 1)[n:].any(), "what lies behind the last coordinate is not zero"
        names = ("params", "grads", "state", "stage_state", "coordinate_inputs")
        named = {name: x for name, x in zip(names, found, strict=True) if name in tensors}
        return results, named | listed("weights", of_weights)

    def dtype_of(self, result: str, example: Example) -> torch.dtype:
        return example.tensors["params" if result == "new params" else "state"].dtype

    def visible(self, name: str, x: Tensor, example: Example) -> Tensor:
        """h and c of a packed state, [2, L, N, H]; rows of the stages' state, [E, N]."""
        n = example.tensors["params"].numel()
        if name == "state":
            return torch.stack(unpack_state(LSTMState(x, n)))
        return unpack_rows(x, n) if name == "stage_state" else x

    def unit_axis(self, name: str, example: Example) -> int | None:
        axes = {"params": 0, "grads": 0, "new params": 0, "new h": 1, "new c": 1, "state": 2}
        return (axes | {"stage_state": 1, "new stage state": 1, "coordinate_inputs": 1}).get(name)

    def spoil(self, name: str, x: Tensor, unit: int, value: float, example: Example) -> Tensor:
        if name not in ("state", "stage_state"):
            return super().spoil(name, x, unit, value, example)
        spoiled = x.clone()
        spoiled[(unit // 32, *([0, 1, 0] if name == "state" else [0]), unit % 32)] = value
        return spoiled

    def raw(self, operator: str, seed: int = 0, tasks: int = 3, loss: int = 0, suffix: str = "") -> list[Any]:
        if operator.endswith("stacked"):
            staged = make_staged(128, "log_sign_with_loss", "gates", hidden=5)
            *tensors, weights = raw_inputs(staged)
            return [*tensors, self.copied(weights, 2), *staged.options()]
        staged = make_staged(36, "log_sign_with_loss", "gates", hidden=5)
        *tensors, weights = raw_inputs(staged)
        options = [weights, *staged.options()]
        if not operator.endswith("backward"):
            return [*tensors, *options]
        grads = [staged.cotangents[0], pack_state(*staged.cotangents[1:3]).data, pack_rows(staged.cotangents[3])]
        kept = []
        if operator == "lstm_step_staged_with_gates_backward":
            kept = [torch.ops.metakern.lstm_step_staged_with_gates(*tensors, *options)[-1]]
        return [*grads, *tensors, *kept, *options]

    def opchecks(self) -> Iterable[tuple[str, str, Callable[[], tuple[Any, ...]]]]:
        def arguments(name: str) -> tuple[Any, ...]:
            *tensors, weights = (x for x in self.raw(name) if isinstance(x, (Tensor, list)))
            if name == "lstm_step_staged_with_gates":
                leaves = [x.clone().requires_grad_() for x in (*tensors, *weights)]
                tensors, weights = leaves[: len(tensors)], leaves[len(tensors) :]
            return (*tensors, weights, *(x for x in self.raw(name) if not isinstance(x, (Tensor, list))))

        for name in (*self.operators, *self.cpu_operators):
            yield name, name, functools.partial(arguments, name)
