"""Guided Adam: scales, schedule, weights of every task's own, and the rule that ships."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

import metakern
from metakern.optim import LearnedOptimizer
from metakern.rules import GuidedAdam


def _params(tasks: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.randn(tasks, 4, 3).double(), "bias": torch.randn(tasks, 4).double()}


def test_each_task_by_weights_of_its_own():
    rules = [GuidedAdam(4).double() for _ in range(3)]
    for rule in rules:
        nn.init.normal_(rule.output_weight)
    params, grads = _params(3), _params(3)
    rows = {
        n: torch.stack([dict(rule.named_parameters())[n] for rule in rules]) for n, _ in rules[0].named_parameters()
    }
    state = rules[0].init_state(params, tasks=True)
    new, state = functional_call(rules[0], rows, (params, grads, state))
    new, _ = functional_call(rules[0], rows, (new, grads, state))
    for task, rule in enumerate(rules):
        own, its = ({n: x[task] for n, x in xs.items()} for xs in (params, grads))
        state = rule.init_state(own)
        own, state = rule(own, its, state)
        own, _ = rule(own, its, state)
        for name in own:
            torch.testing.assert_close(new[name][task], own[name])


@pytest.mark.parametrize("which", ["loss", "params"])
def test_scales_do_not_matter(which):
    """Losses times 100 give the same steps; parameters times 100 give steps times 100."""
    rule, factor = GuidedAdam().double(), 100.0
    outcomes = []
    for scale in (1.0, factor):
        torch.manual_seed(0)
        params = {n: x * (scale if which == "params" else 1) for n, x in _params(1).items()}
        state = rule.init_state(params, tasks=True)
        for _ in range(5):
            grads = {n: torch.randn_like(x) * (scale if which == "loss" else 1) for n, x in params.items()}
            params, state = rule(params, grads, state)
        outcomes.append(params["weight"] / (scale if which == "params" else 1))
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=0)


def test_steps_shrink_towards_total_steps():
    """Taken at once, the last step is 1 % of that without a schedule, give or take the rounding of the cosine."""
    moved = []
    for total in (None, 20):
        rule = GuidedAdam(total_steps=total).double()
        nn.init.constant_(rule.scalars[:, 3], 50.0)
        params = {"x": torch.ones(6).double()}
        state = rule.init_state(params)
        for _ in range(21):
            new, state = rule(params, {"x": torch.ones(6).double()}, state)
        moved.append((new["x"] - params["x"]).abs().mean().item())
    assert moved[1] / moved[0] == pytest.approx(0.01)


def test_the_shipped_rule_trains_an_unseen_network():
    """Another data set, another architecture, one line: as good as Adam at its usual rate, and far below the start."""
    torch.manual_seed(0)
    inputs = torch.randn(200, 5)
    targets = torch.sin(inputs.sum(1, keepdim=True))

    def final(make) -> tuple[float, float]:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(5, 24), nn.Softplus(), nn.Linear(24, 1))
        optimizer = make(net.parameters())
        losses = []
        for _ in range(200):
            loss = (net(inputs) - targets).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[0], losses[-1]

    start, learned = final(lambda params: LearnedOptimizer(params, "general"))
    _, adam = final(lambda params: torch.optim.Adam(params, 1e-3))
    assert learned < 0.5 * start
    assert learned < adam


def test_names_of_shipped_rules():
    rule = metakern.rules.pretrained("general", total_steps=50)
    assert isinstance(rule, GuidedAdam)
    assert rule.total_steps == 50
    with pytest.raises(ValueError, match=r"pretrained rule must be one of digits_.*general.*, got 'generall'"):
        metakern.rules.pretrained("generall")
    with pytest.raises(ValueError, match=r"rule must be one of .*adam.*ship with their weights are .*general"):
        LearnedOptimizer(nn.Linear(2, 1).parameters(), "generall")


@pytest.mark.parametrize("options", [{"hidden_size": -1}, {"total_steps": 0}, {"total_steps": 1.5}, {"horizon": 0}])
def test_options_out_of_range(options):
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        GuidedAdam(**options)


def test_a_state_of_other_params():
    rule = GuidedAdam()
    state = rule.init_state({"x": torch.ones(3)})
    with pytest.raises(ValueError, match="state of tensor 0"):
        rule({"x": torch.ones(4)}, {"x": torch.ones(4)}, state)
