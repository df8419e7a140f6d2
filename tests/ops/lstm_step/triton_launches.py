"""Calls of lstm_step whose Triton kernels are launched without a GPU; compile_ahead.py compiles more of them."""

from __future__ import annotations

from tests.ops.lstm_step.triton_evaluation import backward, forward
from tests.problems import make_problem


def lstm_step() -> None:
    problem = make_problem(40, 20, 2)
    forward(problem)
    backward(problem)


LAUNCHES = {90: (lstm_step,)}
