"""Shared by the GPU tests: backends, problems with a bfloat16 state, named results, unusual layouts, graphs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from metakern.ops import LSTMState, lstm_step, lstm_step_, pack_state, unpack_state
from tests.conftest import assert_same_bits
from tests.problems import Problem

#: The `pytestmark` of every module in this folder.
needs_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

#: Backends that serve CUDA tensors, in auto's order.
BACKENDS = ("cuda", "triton")


def with_bfloat16_state(problem: Problem) -> Problem:
    """The problem with h, c and the cotangents of their successors stored in bfloat16."""
    p, h, c = problem.cotangents
    half = torch.bfloat16
    return replace(problem, h=problem.h.to(half), c=problem.c.to(half), cotangents=(p, h.to(half), c.to(half)))


def forward(problem: Problem, backend: str, **options: Any) -> dict[str, Tensor]:
    """Named results, without a graph."""
    with torch.no_grad():
        new_params, state = problem.run(backend=backend, **options)
    h, c = unpack_state(state)
    return {"new params": new_params, "new h": h, "new c": c}


class Arguments:
    """One problem's tensors, kept in place: what a CUDA graph reads and writes again and again."""

    def __init__(self, problem: Problem, backend: str, *, requires_grad: bool = False) -> None:
        self.n, self.backend, self.options = problem.params.numel(), backend, problem.options
        p, h, c = problem.cotangents
        self.cotangents = [p, pack_state(h, c).data]
        tensors = [problem.params, problem.grads, problem.state.data, *problem.weights]
        self.tensors = [x.detach().clone().requires_grad_(requires_grad) for x in tensors]

    def copy_(self, other: Arguments) -> None:
        """Copy the values of another problem of the same sizes."""
        with torch.no_grad():
            for x, y in zip([*self.tensors, *self.cotangents], [*other.tensors, *other.cotangents], strict=True):
                x.copy_(y)

    def forward(self) -> list[Tensor]:
        """New params and the data of the new state."""
        params, grads, data, *weights = self.tensors
        new, state = lstm_step(params, grads, LSTMState(data, self.n), weights, backend=self.backend, **self.options)
        return [new, state.data]

    def in_place(self) -> list[Tensor]:
        """Params and data of the state, which it overwrites."""
        params, grads, data, *weights = self.tensors
        lstm_step_(params, grads, LSTMState(data, self.n), weights, backend=self.backend, **self.options)
        return [params, data]

    def backward(self) -> list[Tensor]:
        """Gradients of all tensors; they must require them."""
        return list(torch.autograd.grad(self.forward(), self.tensors, self.cotangents))


def assert_all_same_bits(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    """Fail unless every tensor has the same bits."""
    for index, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(f"tensor {index} of {what}", got, want)


def shifted(x: Tensor) -> Tensor:
    """The same numbers one element behind the start of an allocation: contiguous, not aligned to 16 bytes."""
    memory = torch.full((x.numel() + 1,), math.nan, dtype=x.dtype, device=x.device)
    memory[1:] = x.reshape(-1)
    return memory[1:].view(x.shape)


def captured(call: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """The call captured as a graph, and its result tensors."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results
