"""The comparison of optimizers: baselines are torch's, tasks are told apart, figures follow from curves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from rich.console import Console

from bench.optimizers import evolve, summary
from bench.optimizers.baselines import WEIGHT_DECAY, Baseline
from bench.optimizers.curves import (
    GRID,
    HORIZONS,
    SEEDS,
    TUNING_SEEDS,
    all_of_rule,
    baseline_curves,
    chosen_curves,
    grid,
    problems,
)
from bench.optimizers.tasks import TEST, VALIDATION
from bench.runs import RESULTS
from metakern.evaluation.optimizers import LEARNING_RATES
from metakern.rules import GuidedAdam
from metakern.tasks import Quadratics

OF_TORCH = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr),
    "Momentum 0.9": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr),
    "AdamW, cosine": lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=WEIGHT_DECAY),
}


@pytest.mark.parametrize("name", OF_TORCH)
def test_baselines_are_those_of_torch(name):
    torch.manual_seed(0)
    rates, start = torch.tensor([0.1, 0.01]).double(), torch.randn(2, 3).double()
    baseline, params = Baseline(name, rates, 4), [start]
    ones = [torch.nn.Parameter(row.clone()) for row in start]
    optimizers = [OF_TORCH[name]([p], lr.item()) for p, lr in zip(ones, rates, strict=True)]
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    schedules = [cosine(optimizer, 4) for optimizer in optimizers] if "cosine" in name else []
    for _ in range(4):
        grads = torch.randn(2, 3).double()
        params = baseline.step(params, [grads])
        for p, grad, optimizer in zip(ones, grads, optimizers, strict=True):
            p.grad = grad
            optimizer.step()
        for schedule in schedules:
            schedule.step()
    torch.testing.assert_close(params[0], torch.stack([p.detach() for p in ones]))


def test_tasks():
    names = [task.name for task in (*TEST, *VALIDATION)]
    assert len(set(names)) == len(names)
    assert len(TEST) >= 16
    assert set(HORIZONS) <= set(GRID)
    batch = problems(TEST[0], 2)
    start = next(iter(batch.init_params().values()))
    assert torch.equal(start[:SEEDS], start[SEEDS:])
    assert not torch.equal(start[0], start[1])


def test_curves_of_a_rule(monkeypatch):
    monkeypatch.setattr("bench.optimizers.curves.HORIZONS", (10,))
    found = all_of_rule(TEST[1], GuidedAdam(4), {10: GuidedAdam(4, total_steps=10)})
    assert {name: np.array(curve).shape for name, curve in found.items()} == {
        "general/10": (len(grid(10)), SEEDS),
        "general, told/10": (len(grid(10)), SEEDS),
    }


def test_curves_of_baselines(monkeypatch):
    """At rates that were chosen, the other seeds go on as they would in one run with those that chose."""
    monkeypatch.setattr("bench.optimizers.curves.HORIZONS", (5, 10))
    found = chosen_curves(TEST[1], {f"{name}/{steps}": [8, 11, 8] for name in summary.BASELINES for steps in (5, 10)})
    for name in summary.BASELINES:
        for steps in (5, 10):
            whole = baseline_curves(TEST[1], name, steps, range(SEEDS), LEARNING_RATES[8:12])
            expected = whole[:, [0, 3, 0], TUNING_SEEDS:]
            torch.testing.assert_close(torch.tensor(found[f"{name}/{steps}"]), expected, rtol=1e-4, atol=1e-6)


def test_figures(tmp_path):
    """A rule that halves the loss, baselines that do so at one rate only and diverge at the largest."""

    def tuning(good: int) -> dict:
        curves = {}
        for horizon in HORIZONS:
            falling = np.linspace(1, 0.1, len(grid(horizon)))[:, None].repeat(TUNING_SEEDS, 1)
            of_rates = np.ones((len(falling), len(LEARNING_RATES), TUNING_SEEDS))
            of_rates[:, good] = falling**0.5
            of_rates[-1, -1] = np.inf
            lists = [[[None if x == np.inf else x for x in row] for row in rows] for rows in of_rates.tolist()]
            curves |= {f"{baseline}/{horizon}": lists for baseline in summary.BASELINES}
        return curves

    rates = summary.common_rates([tuning(3), tuning(3), tuning(5)])
    assert rates["Adam"]["500"] == LEARNING_RATES[3]

    def part(name: str, good: int) -> dict:
        chosen = summary.chosen_rates(tuning(good), rates)
        assert chosen["Adam/500"] == [3, good]
        learned, rest = {}, {}
        for horizon in HORIZONS:
            falling = np.linspace(1, 0.1, len(grid(horizon)))[:, None]
            learned |= {f"{rule}/{horizon}": falling.repeat(SEEDS, 1).tolist() for rule in summary.LEARNED}
            of_rates = [np.ones_like(falling) if rate != good else falling**0.5 for rate in (3, good)]
            curves = np.stack(of_rates, 1).repeat(SEEDS - TUNING_SEEDS, 2).tolist()
            rest |= {f"{baseline}/{horizon}": curves for baseline in summary.BASELINES}
        return {"task": name, "learned": learned, "tuning": tuning(good), "chosen": chosen, "rest": rest}

    results = summary.summarise([part("d", 3), part("e", 5)])
    found = results["500"]
    assert found["beats"]["general"]["every (ii)"] == 1
    rows = [row["contenders"] for row in found["tasks"]]
    assert rows[0]["Adam (i)"]["final_loss"] == pytest.approx(0.1**0.5)
    assert rows[0]["Adam (i)"]["normalised"] == pytest.approx(0.5)
    assert rows[1]["Adam (i)"]["final_loss"] == 1
    assert rows[1]["Adam (ii)"]["normalised"] == pytest.approx(0.5)
    assert rows[0]["general"]["steps_to_adam"] < 500
    assert found["worse_than_start"]["general"] == 0
    summary.plot(results, tmp_path / "profile.png")
    summary.show(Console(quiet=True), "test", results)
    assert (tmp_path / "profile.png").exists()


def test_evolution(monkeypatch):
    """The mean moves to members that score better; the rule that ships is the average that its metrics name."""
    monkeypatch.setattr(evolve, "scores", lambda numbers, *_: numbers[:, 0])
    start = torch.tensor([value for _, _, value, _ in evolve.NUMBERS.values()])
    mean, score = evolve.generation(start, 0, [None, None], [None, None])
    assert mean[0] < start[0]
    assert score == start[0]
    metrics = json.loads((RESULTS / "general" / "metrics.json").read_text())
    weights = evolve.weights_of(torch.tensor(metrics["average"])[None])
    for name, p in GuidedAdam.pretrained("general").named_parameters():
        torch.testing.assert_close(p.detach(), weights[name][0])


def test_scores_of_numbers(monkeypatch):
    """Every member by its own numbers: a rule without steps stays where it starts, and above any reference below."""
    monkeypatch.setattr(evolve, "STEPS", 100)
    monkeypatch.setattr(evolve, "POINTS", (20, 50, 80, 90, 100))
    start = torch.tensor([value for _, _, value, _ in evolve.NUMBERS.values()])
    still = start.clone()
    still[0] = -30
    kind = Quadratics(3)
    found = evolve.scores(torch.stack([start, still, start]), kind, 0, [3.0, 1.0, 0.0, 0.0])
    assert found[0] == found[2]
    assert found[0] < found[1]
