"""Scalars from the host keep their full float64 value in Triton's kernels, whatever their size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")

from metakern.ops import mlp_inner_loop
from tests.conftest import FORWARD_TOLERANCE, assert_close
from tests.mlp_problems import Case
from tests.ops.lstm_step.triton_evaluation import forward
from tests.problems import evaluate_reference, make_problem

pytestmark = pytest.mark.usefixtures("interpreter_like_a_gpu")


@pytest.mark.parametrize("output_scale", [1e39, -1e-60])
def test_output_scale_of_lstm_step(output_scale: float, device: torch.device) -> None:
    problem = make_problem(33, 5, 1, torch.float64, device=device)
    problem = replace(problem, options=problem.options | {"output_scale": output_scale})
    problem.params.zero_()
    expected = evaluate_reference(problem)[0]["new params"]
    assert float(expected.abs().max()) > 0
    assert_close("new params", forward(problem)["new params"], expected, FORWARD_TOLERANCE[torch.float64])


@pytest.mark.parametrize("scale", [90.0, 300.0])
def test_preprocess_scale_of_lstm_step(scale: float, device: torch.device) -> None:
    # e^90 is beyond float32.
    problem = make_problem(33, 5, 1, torch.float64, device=device)
    options = problem.options | {"preprocess": "log_and_clip", "preprocess_scale": scale}
    problem = replace(problem, options=options)
    expected = evaluate_reference(problem)[0]["new params"]
    assert_close("new params", forward(problem)["new params"], expected, FORWARD_TOLERANCE[torch.float64])


@pytest.mark.parametrize("lr", [1e39, 1e-60])
def test_rate_of_mlp_inner_loop(lr: float, device: torch.device, quick_interpreter: None) -> None:
    case = Case([2, 1], 2, device=str(device))
    params = [torch.zeros_like(p) for p in case.params]
    results = [
        mlp_inner_loop(params, *case.support, lr=lr, steps=1, backend=backend) for backend in ("triton", "reference")
    ]
    for got, want in zip(*results, strict=True):
        assert float(want.abs().max()) > 0
        assert_close("adapted", got, want, FORWARD_TOLERANCE[torch.float64])
