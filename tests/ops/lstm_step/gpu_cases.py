"""Calls of lstm_step that together run each of its GPU kernels, for compute-sanitizer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

from metakern.ops import LSTMState, lstm_step_, lstm_step_staged, lstm_step_staged_
from tests.gpu.common import with_bfloat16_state
from tests.ops.lstm_step.test_stages import OWN_PAIRS, make_staged, raw_inputs
from tests.problems import evaluate, make_problem

PRECISIONS = ("highest", "high", "medium")


@dataclass(frozen=True)
class Case:
    """Sizes, dtypes and options of one call; N ends within a tile."""

    n: int = 70
    hidden: int = 20
    layers: int = 2
    dtype: torch.dtype = torch.float32
    bfloat16_state: bool = False
    precision: str = "highest"
    preprocess: str = "log_sign"

    def run(self, backend: str, device: str) -> None:
        """Raise if forward, backward or the step in place gives NaN."""
        problem = make_problem(self.n, self.hidden, self.layers, self.dtype, preprocess=self.preprocess)
        problem = with_bfloat16_state(problem) if self.bfloat16_state else problem
        p, h, c = problem.cotangents
        problem = replace(
            problem,
            params=problem.params.to(device),
            grads=problem.grads.to(device),
            h=problem.h.to(device),
            c=problem.c.to(device),
            weights=[w.to(device) for w in problem.weights],
            cotangents=(p.to(device), h.to(device), c.to(device)),
            options=problem.options | {"precision": self.precision},
        )
        results, gradients = evaluate(problem, backend)
        params, state = problem.params.clone(), LSTMState(problem.state.data.clone(), self.n)
        lstm_step_(params, problem.grads, state, problem.weights, backend=backend, **problem.options)
        for name, x in {**results, **gradients, "params in place": params, "state in place": state.data}.items():
            if bool(x.cpu().isnan().any()):  # an infinite slope in float16 is sound
                raise ArithmeticError(f"{name} holds NaN")


@dataclass(frozen=True)
class StageCase:
    """A pair of stages, hidden units and dtype of one call of lstm_step_staged; N ends within a tile."""

    pair: tuple[str, str]
    hidden: int
    dtype: torch.dtype

    def run(self, backend: str, device: str) -> None:
        """Raise if forward, backward or the step in place gives NaN."""
        staged = make_staged(70, *self.pair, self.dtype, hidden=self.hidden)
        params, grads, data, rows, inputs, weights = (
            [w.to(device) for w in x] if isinstance(x, list) else x.to(device) for x in raw_inputs(staged)
        )
        options = {**staged.keywords(), "coordinate_inputs": inputs, "backend": backend}
        leaves = [x.requires_grad_() for x in (params, grads, data, rows, inputs, *weights)]
        new, state, new_rows = lstm_step_staged(
            params, grads, LSTMState(data, 70), weights, stage_state=rows, **options
        )
        found = [new, state.data, new_rows]
        ones = [torch.ones_like(x) for x in found]
        found += torch.autograd.grad(found, leaves, ones, allow_unused=True)
        state, rows = LSTMState(data.detach().clone(), 70), rows.detach().clone()
        params = params.detach().clone()
        lstm_step_staged_(params, grads.detach(), state, weights, stage_state=rows, **options)
        for index, x in enumerate([*found, params, state.data, rows]):
            if x is not None and bool(x.detach().cpu().isnan().any()):
                raise ArithmeticError(f"result {index} holds NaN")


#: Sizes with specialised kernels in every precision and storage; sizes for the general kernel; every dtype; several
#: blocks and chunks.
CUDA_CASES = [
    *(
        Case(hidden=hidden, precision=precision, bfloat16_state=coarse)
        for hidden, precision, coarse in itertools.product((20, 32), PRECISIONS, (False, True))
    ),
    *(Case(hidden=hidden, layers=layers) for hidden, layers in ((1, 1), (7, 3), (64, 2), (64, 3), (20, 3), (32, 1))),
    *(Case(hidden=hidden, dtype=torch.float64, layers=layers) for hidden, layers in ((20, 2), (7, 3), (64, 3))),
    *(Case(dtype=dtype) for dtype in (torch.float16, torch.bfloat16)),
    *(Case(hidden=5, preprocess=name) for name in ("none", "log_and_clip")),
    Case(hidden=7, bfloat16_state=True),
    Case(n=1),
    Case(n=4500),
    Case(n=4500, hidden=3, layers=1),
]

#: Fewer cases, as each takes seconds to compile.
TRITON_CASES = [
    Case(),
    Case(n=1000, precision="medium", bfloat16_state=True),
    Case(hidden=5, dtype=torch.float64, preprocess="none"),
]

STAGE_CASES = [
    StageCase(pair, hidden, dtype)
    for pair in OWN_PAIRS
    for hidden, dtype in ((20, torch.float32), (7, torch.float32), (7, torch.float64), (20, torch.float16))
]

CASES: dict[str, list[Case | StageCase]] = {
    "cuda": [*CUDA_CASES, *STAGE_CASES],
    "triton": [*TRITON_CASES],
    "reference": [*CUDA_CASES[:3], *TRITON_CASES, STAGE_CASES[0]],
}
