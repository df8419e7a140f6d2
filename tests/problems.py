"""Inputs of lstm_step for the tests, and its results and gradients by any backend and by the float64 reference.

Axis legend: N coordinates, F features (1 or 2), H hidden units, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from metakern.ops import LSTMState, lstm_step, pack_state, unpack_state
from metakern.ops.lstm_step import reference
from tests.conftest import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, assert_close


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state and weights for params of this one."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weight_names(layers: int) -> list[str]:
    """Names of the weights in the operator's order."""
    parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [f"{part}_l{layer}" for layer in range(layers) for part in parts] + ["head.weight", "head.bias"]


@dataclass
class Problem:
    """Arguments of one call, and the gradients of its results that backward starts from."""

    params: Tensor
    grads: Tensor
    h: Tensor
    c: Tensor
    weights: list[Tensor]
    cotangents: tuple[Tensor, Tensor, Tensor]  # of new params [N], new h and new c [L, N, H]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> LSTMState:
        return pack_state(self.h, self.c)

    def double(self) -> Problem:
        """The same numbers in float64."""
        h, c, *rest = (x.detach().double() for x in (self.h, self.c, self.params, self.grads, *self.weights))
        params, grads, *weights = rest
        cotangents = tuple(x.double() for x in self.cotangents)
        return replace(self, params=params, grads=grads, h=h, c=c, weights=weights, cotangents=cotangents)

    def coordinates(self, keep: slice | Tensor) -> Problem:
        """The same problem for some of the coordinates only."""
        p, h, c = self.cotangents
        return replace(
            self,
            params=self.params[keep],
            grads=self.grads[keep],
            h=self.h[:, keep],
            c=self.c[:, keep],
            cotangents=(p[keep], h[:, keep], c[:, keep]),
        )

    def run(self, **options: Any) -> tuple[Tensor, LSTMState]:
        """Forward."""
        return lstm_step(self.params, self.grads, self.state, self.weights, **(self.options | options))


def make_problem(
    n: int,
    hidden: int = 20,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    gain: float = 1.5,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Problem:
    """Random inputs: gradients of both signs over ten decades, weights ``gain`` times those of a fresh ``nn.LSTM``."""
    generator = torch.Generator().manual_seed(seed)
    options = {"preprocess": "log_sign", "preprocess_scale": 10.0, "output_scale": 0.1} | options
    work = state_dtype(dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1

    grads = normal(n).sign() * 10 ** (uniform(n) * 5 - 3)
    if options["preprocess"] == "none":
        grads = normal(n)
    bound = gain / math.sqrt(hidden)
    weights = []
    for layer in range(layers):
        inputs = reference.num_features(options["preprocess"]) if layer == 0 else hidden
        shapes = ((4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,))
        weights += [uniform(*shape) * bound for shape in shapes]
    weights += [uniform(1, hidden) * bound, uniform(1) * bound]
    params = normal(n)
    positive = normal(n).abs() + 0.1  # the gradient of the head's bias is their sum: it must not cancel
    problem = Problem(
        params=params + params.sign() / 2,  # larger than an update, which must not cancel them
        grads=grads,
        h=normal(layers, n, hidden).tanh(),
        c=normal(layers, n, hidden),
        weights=[w.to(device, work) for w in weights],
        cotangents=(positive.to(device, dtype), *(normal(layers, n, hidden).to(device, work) for _ in range(2))),
        options=options,
    )
    problem.params, problem.grads = problem.params.to(device, dtype), problem.grads.to(device, dtype)
    problem.h, problem.c = problem.h.to(device, work), problem.c.to(device, work)
    return problem


def _outputs_and_gradients(problem: Problem, call: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    leaves = [problem.params, problem.grads, problem.h, problem.c, *problem.weights]
    leaves = [x.detach().requires_grad_() for x in leaves]  # views of the caller's memory, so strides are kept
    outputs = call(*leaves[:4], leaves[4:])
    gradients = torch.autograd.grad(outputs, leaves, problem.cotangents)
    names = ["params", "grads", "h", "c", *weight_names(problem.h.shape[0])]
    return (
        {name: x.detach() for name, x in zip(("new params", "new h", "new c"), outputs, strict=True)},
        {f"gradient of {name}": x for name, x in zip(names, gradients, strict=True)},
    )


def evaluate(problem: Problem, backend: str = "cpp") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Named results and named gradients of all inputs, by the public function."""

    def call(params: Tensor, grads: Tensor, h: Tensor, c: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
        state = pack_state(h, c)
        new_params, new_state = lstm_step(params, grads, state, weights, backend=backend, **problem.options)
        return new_params, *unpack_state(new_state)

    return _outputs_and_gradients(problem, call)


def evaluate_reference(problem: Problem) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same by the reference in float64."""

    def call(params: Tensor, grads: Tensor, h: Tensor, c: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
        return reference.lstm_step(params, grads, h, c, weights, **problem.options)

    return _outputs_and_gradients(problem.double(), call)


def assert_matches_reference(problem: Problem, backend: str = "cpp") -> None:
    """Hold results and every gradient to the float64 reference, by the table in conftest."""
    results, gradients = evaluate(problem, backend)
    expected_results, expected_gradients = evaluate_reference(problem)
    for name, expected in expected_results.items():
        assert_close(name, results[name], expected, FORWARD_TOLERANCE[results[name].dtype])
    for name, expected in expected_gradients.items():
        assert_close(name, gradients[name], expected, GRADIENT_TOLERANCE[gradients[name].dtype])
