"""Rules on a GPU: all of them; those around lstm_step with their options, in the optimizer and the outer loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metakern.learners import RuleLearner
from metakern.ops import LSTMState
from metakern.optim import LearnedOptimizer
from metakern.rules import CoordinatewiseLSTM
from metakern.tasks import DigitsMLP, MixedOptimizees, Quadratics
from tests.conformance.rules.rows import ROWS, Row, make_params, run
from tests.conformance.rules.rows import make_rule as make_row_rule
from tests.conftest import FORWARD_TOLERANCE, assert_close
from tests.gpu.common import BACKENDS, needs_cuda

pytestmark = needs_cuda


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("num_tasks", [None, 3], ids=["alone", "tasks"])
def test_every_rule_steps_as_on_the_cpu(row: Row, num_tasks: int | None) -> None:
    rule, params = make_row_rule(row), make_params(row, num_tasks)
    moved = {name: p.cuda() for name, p in params.items()}
    expected, state = run(rule, params, 3, tasks=num_tasks is not None)
    got, moved_state = run(copy.deepcopy(rule).cuda(), moved, 3, tasks=num_tasks is not None)
    for name, want in expected.items():
        assert_close(name, got[name].detach().cpu(), want.detach(), 1e-3)
    for want, x in zip(pytree.tree_leaves(state), pytree.tree_leaves(moved_state), strict=True):
        assert x.is_cuda
        assert x.shape == want.shape


def make_rule(**options: Any) -> CoordinatewiseLSTM:
    torch.manual_seed(0)
    return CoordinatewiseLSTM(hidden_size=20, preprocess="none", output_scale=1.0, **options)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("bfloat16_state", [False, True], ids=["float32 state", "bfloat16 state"])
def test_the_rule_on_a_dict_of_params(bfloat16_state: bool, backend: str) -> None:
    params = {"weight": torch.randn(10, 3), "bias": torch.randn(10)}
    grads = {name: p.sin() for name, p in params.items()}
    on_cpu = make_rule(backend="reference", bfloat16_state=bfloat16_state)
    expected, expected_state = on_cpu(params, grads, on_cpu.init_state(params))
    rule = make_rule(backend=backend, bfloat16_state=bfloat16_state).cuda()
    moved, moved_grads = ({name: x.cuda() for name, x in tree.items()} for tree in (params, grads))
    state = rule.init_state(moved)
    assert state.data.is_cuda
    assert state.data.dtype == (torch.bfloat16 if bfloat16_state else torch.float32)
    got, new_state = rule(moved, moved_grads, state)
    assert isinstance(new_state, LSTMState)
    for name, want in expected.items():
        assert_close(name, got[name].cpu(), want, FORWARD_TOLERANCE[torch.float32] * 2)
    assert_close("state", new_state.data.cpu(), expected_state.data, FORWARD_TOLERANCE[state.data.dtype] * 2)


def train(model: nn.Module, rule: CoordinatewiseLSTM, steps: int) -> list[Tensor]:
    """Parameters after some steps on random data."""
    optimizer = LearnedOptimizer(model.parameters(), rule, lr=0.1)
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(32, 64, generator=generator).to(device)).square().mean().backward()
        optimizer.step()
    return [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"bfloat16_state": True}, {"precision": "high"}], ids=str)
def test_learned_optimizer_as_on_the_cpu(options: dict[str, Any], backend: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 20), nn.Sigmoid(), nn.Linear(20, 10))
    moved = copy.deepcopy(model).cuda()
    expected = train(model, make_rule(backend="reference", **options), 3)
    got = train(moved, make_rule(backend=backend, **options).cuda(), 3)
    tolerance = 1e-5 if not options else 5e-3
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_close(f"parameter {index}", a, b, tolerance)


def meta_gradient(learner: RuleLearner, device: str) -> list[Tensor]:
    """Meta-gradients of one unroll on four quadratics, by weight; random numbers are drawn on the CPU."""
    batch = Quadratics(10).sample(4, torch.Generator().manual_seed(0)).to(device)
    losses = next(learner.meta_losses(batch))
    return list(torch.autograd.grad(losses.mean(), list(learner.parameters())))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("second_order", [False, True], ids=["first order", "second order"])
def test_the_meta_gradient_is_that_of_the_cpu(second_order: bool, backend: str) -> None:
    options: dict[str, Any] = {"steps": 5, "unroll": 5, "second_order": second_order}
    rule = make_rule(backend=backend).cuda()
    expected = meta_gradient(RuleLearner(make_rule(backend="reference"), **options), "cpu")
    actual = meta_gradient(RuleLearner(rule, **options), "cuda")
    for (name, _), a, b in zip(rule.named_parameters(), actual, expected, strict=True):
        assert_close(f"meta-gradient of {name}", a.cpu(), b, 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_meta_training_runs_and_moves_the_weights(backend: str) -> None:
    learner = RuleLearner(make_rule(backend=backend).cuda(), steps=10, unroll=5)
    optimizer = torch.optim.Adam(learner.parameters(), 1e-2)
    before = [p.detach().clone() for p in learner.parameters()]
    problems = MixedOptimizees([Quadratics(10), DigitsMLP(5)])
    for losses in learner.meta_losses(problems.sample(4, torch.Generator().manual_seed(0)).to("cuda")):
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        assert losses.isfinite().all()
    assert all(bool((p != old).any()) for p, old in zip(learner.parameters(), before, strict=True))
