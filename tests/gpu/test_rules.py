"""What is built on lstm_step, on a GPU: the rule with its options, the optimizer, the outer loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metakern.ops import LSTMState
from metakern.optim import LearnedOptimizer
from metakern.rules import CoordinatewiseLSTM
from metakern.tasks import Quadratics
from metakern.trainer import MetaTrainer, MetaTrainingConfig
from tests.conftest import FORWARD_TOLERANCE, assert_close
from tests.gpu.common import BACKENDS, needs_cuda

pytestmark = needs_cuda


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


class OnCuda:
    """A distribution whose problems live on the GPU; the draws are those of the CPU."""

    def __init__(self, problems: Quadratics) -> None:
        self.problems = problems

    def split(self, name: str) -> OnCuda:
        return OnCuda(self.problems.split(name))

    def sample(self, num_tasks: int, generator: torch.Generator) -> Any:
        batch = self.problems.sample(num_tasks, generator)
        start = batch.init_params
        batch.weight, batch.target = batch.weight.cuda(), batch.target.cuda()
        batch.init_params = lambda: start().cuda()  # type: ignore[method-assign]
        return batch


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("second_order", [False, True], ids=["first order", "second order"])
def test_the_meta_gradient_is_that_of_the_cpu(second_order: bool, backend: str) -> None:
    config = MetaTrainingConfig(num_tasks=4, steps=5, unroll=5, second_order=second_order)
    problems = Quadratics(10)
    rule = make_rule(backend=backend).cuda()
    expected = MetaTrainer(make_rule(backend="reference"), problems, config).meta_gradient()
    trainer = MetaTrainer(rule, OnCuda(problems), config)
    for (name, _), a, b in zip(rule.named_parameters(), trainer.meta_gradient(), expected, strict=True):
        assert_close(f"meta-gradient of {name}", a.cpu(), b, 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_meta_training_runs_and_moves_the_weights(backend: str) -> None:
    config = MetaTrainingConfig(num_tasks=4, steps=10, unroll=5, eval_every=1, eval_tasks=4)
    rule = make_rule(backend=backend).cuda()
    before = [p.detach().clone() for p in rule.parameters()]
    episode = MetaTrainer(rule, OnCuda(Quadratics(10)), config).run_episode()
    assert episode.skipped == 0
    assert all(bool((p != old).any()) for p, old in zip(rule.parameters(), before, strict=True))
