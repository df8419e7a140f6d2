"""Trains the optimizer that ships as "general": an evolution strategy on twenty numbers of Guided Adam.

python -m bench.optimizers.evolve    24 generations; goes on where it was stopped; writes runs/general

A generation draws 8 antithetic pairs around the mean and runs each for 400 steps on one problem of every second kind of
the training mixture, all of them on the same problems. The mean moves to the weighted mean of the better half, as in
the evolution strategies of Hansen 2016, arXiv 1604.00772, but with standard deviations that are given and shrink. The
rule gets the moving average of the means. All other weights of the rule stay zero.

A problem's score says how much lower the loss is than that of the better of Adam and AdamW with cosine decay, each at
the best of six rates for this kind, in units of 15 % of the way that this one came, squashed by a tanh: so no kind
dominates, and what counts is to be below. Losses after 100, 300 and about 400 steps count 0.2, 0.2 and 0.6.

Axis legend: N members of a generation, K numbers, T problems, E points in time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from torch.func import functional_call

from bench.optimizers.baselines import Baseline
from metakern.core.files import write_whole
from metakern.rules import GuidedAdam
from metakern.tasks import Optimizees, general_problems

#: A number by its weight and place: (weight, place, start, standard deviation in the first generation). Outputs 0 to 3
#: are the change of ℓ, the factor of the step, and the shares of the slow mean and of the gradient.
NUMBERS: dict[str, tuple[str, tuple[int, int], float, float]] = {
    "size": ("scalars", (0, 0), math.log(0.1), 0.3),
    "agreement": ("direct_weight", (1, 0), 0.9, 0.25),
    "agreement of all": ("direct_weight", (15, 0), 1.35, 0.35),
    "growth of l": ("output_bias", (0, 0), 0.0, 0.03),
    "decay": ("direct_weight", (12, 1), -0.2, 0.12),
    "tensor's share": ("scalars", (0, 1), 0.0, 0.6),
    "release": ("scalars", (0, 2), math.log(3.0), 0.4),
    "at once": ("scalars", (0, 3), 0.5, 0.12),
    "slow mean": ("output_bias", (0, 2), 0.0, 0.12),
    "gradient": ("output_bias", (0, 3), 0.0, 0.12),
    "growth by time": ("direct_weight", (12, 0), 0.0, 0.04),
    "growth by l": ("direct_weight", (7, 0), 0.0, 0.08),
    "matrices": ("direct_weight", (10, 1), 0.0, 0.12),
    "factor by agreement": ("direct_weight", (1, 1), 0.0, 0.2),
    "long agreement": ("direct_weight", (2, 0), 0.0, 0.3),
    "factor by a large gradient": ("direct_weight", (8, 1), 0.0, 0.2),
    "growth by growing gradients": ("direct_weight", (6, 0), 0.0, 0.2),
    "growth by a large gradient": ("direct_weight", (8, 0), 0.0, 0.2),
    "decay of g": ("scalars", (0, 4), math.log(9.0), 0.3),
    "decay of g^2": ("scalars", (0, 5), math.log(99.0), 0.4),
}

PAIRS, SHRINK, AVERAGE = 8, 0.97, 0.2
STEPS, POINTS = 400, (100, 300, 380, 390, 400)
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)

#: Logarithm of a loss that is not finite.
LOST = 30.0

Step = Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]]


def weights_of(numbers: Tensor) -> dict[str, Tensor]:
    """Weights of the rule, {name: [N, *shape]}, of numbers [N, K]."""
    rule = GuidedAdam(0)
    weights = {name: torch.zeros(len(numbers), *p.shape) for name, p in rule.named_parameters()}
    for column, (number, (weight, place, _, _)) in zip(numbers.unbind(1), NUMBERS.items(), strict=True):
        weights[weight][:, *place] = column.clamp(0.05, 0.999).logit() if number == "at once" else column
    return weights


def log_losses(
    kind: Optimizees, copies: int, seeds: int, seed: int, steps: int, points: Iterable[int], take: Step
) -> Tensor:
    """Logarithms of the losses [E, copies · seeds] on all samples after some numbers of steps; seeds go fastest."""
    chosen = torch.arange(seeds).repeat(copies)
    batch: Any = kind.sample(seeds, torch.Generator().manual_seed(seed))
    batch = batch.select(chosen)
    start = batch.init_params()
    plain = isinstance(start, dict)
    params: dict[str, Tensor] = start if plain else {"x": start}

    def inputs() -> Any:
        return params if plain else params["x"]

    found = []
    for step in range(steps + 1):
        if step in points:
            with torch.no_grad():
                found.append(batch.full_loss(inputs()))
        if step < steps:
            leaves = [p.requires_grad_() for p in params.values()]
            grads = torch.autograd.grad(batch.loss(inputs()).sum(), leaves)
            with torch.no_grad():
                detached = {name: p.detach() for name, p in params.items()}
                params = take(detached, dict(zip(params, grads, strict=True)))
    logs = torch.stack(found).clamp(min=1e-12).log()
    return torch.where(logs.isfinite(), logs, torch.tensor(LOST))


def references(kinds: Iterable[Optimizees]) -> list[list[float]]:
    """Of every kind the first log loss, and the lowest of tuned baselines after 100, 300 and 400 steps."""
    found = []
    for kind in kinds:
        best: dict[int, float] = {}
        for name, steps in (("Adam", STEPS), ("AdamW, cosine", STEPS), ("AdamW, cosine", 100)):
            points = (0, 100, 300, STEPS) if name == "Adam" else (0, steps)
            baseline = Baseline(name, torch.tensor(RATES).repeat_interleave(2), steps)

            def take(
                params: dict[str, Tensor], grads: dict[str, Tensor], baseline: Baseline = baseline
            ) -> dict[str, Tensor]:
                new = baseline.step(list(params.values()), list(grads.values()))
                return dict(zip(params, new, strict=True))

            losses = log_losses(kind, len(RATES), 2, 77, steps, points, take)
            lowest = losses.view(len(points), -1, 2).mean(2).min(1).values.tolist()
            best |= {point: min(best.get(point, LOST), loss) for point, loss in zip(points, lowest, strict=True)}
        found.append([best[point] for point in (0, 100, 300, STEPS)])
    return found


def scores(numbers: Tensor, kind: Optimizees, seed: int, reference: list[float]) -> Tensor:
    """Scores [N] in [-1, 1] of numbers [N, K] on one problem of a kind; lower is better."""
    rule, weights = GuidedAdam(0), weights_of(numbers)
    state: Any = None

    def take(params: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal state
        state = rule.init_state(params, tasks=True) if state is None else state
        new: dict[str, Tensor]
        new, state = functional_call(rule, weights, (params, grads, state))
        return new

    first, *bars = reference
    losses = log_losses(kind, len(numbers), 1, seed, STEPS, POINTS, take)
    end = losses[2:].clamp(max=first + 3)
    reached = (losses[0], losses[1], (end.amax(0) + end.mean(0)) / 2)
    below = [
        torch.tanh((loss - bar) / (0.15 * max(first - bars[-1], 0.3))) for loss, bar in zip(reached, bars, strict=True)
    ]
    return 0.2 * below[0] + 0.2 * below[1] + 0.6 * below[2]


def generation(mean: Tensor, number: int, kinds: list[Optimizees], bars: list[list[float]]) -> tuple[Tensor, float]:
    """The next mean [K], and the mean score of this one."""
    spread = SHRINK**number * torch.tensor([sigma for _, _, _, sigma in NUMBERS.values()])
    noise = torch.randn(PAIRS, len(mean), generator=torch.Generator().manual_seed(number))
    noise = torch.cat([noise, -noise])
    members = torch.cat([mean + spread * noise, mean[None]])
    chosen = range(number % 2, len(kinds), 2)
    found = torch.stack([scores(members, kinds[i], 7 * number + 5 + 1000 * i, bars[i]) for i in chosen]).mean(0)
    better = found[:-1].argsort()[:PAIRS]
    shares = math.log(PAIRS + 0.5) - torch.arange(1, PAIRS + 1).log()
    return mean + spread * ((shares / shares.sum()).unsqueeze(1) * noise[better]).sum(0), found[-1].item()


def main(
    generations: Annotated[int, typer.Option(min=1)] = 24,
    output: Annotated[Path, typer.Option(help="Folder of the rule.")] = Path("runs/general"),
) -> None:
    """Evolve, and write the rule after every generation."""
    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    kinds, saved = list(general_problems().distributions), output / "metrics.json"
    start = [value for _, _, value, _ in NUMBERS.values()]
    run: dict[str, Any] = {"mean": start, "average": start, "scores": []}
    run = json.loads(saved.read_text()) if saved.exists() else run | {"references": references(kinds)}
    for number in range(len(run["scores"]), generations):
        mean, score = generation(torch.tensor(run["mean"]), number, kinds, run["references"])
        average = torch.lerp(torch.tensor(run["average"]), mean, AVERAGE)
        run |= {"mean": mean.tolist(), "average": average.tolist(), "scores": [*run["scores"], score]}
        write_whole(saved, json.dumps(run, indent=1).encode())
        rule = GuidedAdam(0, trained_on=f"the training mixture of metakern.tasks.general_problems, {STEPS} steps")
        rule.load_state_dict({name: weight[0] for name, weight in weights_of(average[None]).items()})
        rule.save_pretrained(output)
        Console().print(f"generation {number}: score of the mean before it {score:.3f}")


if __name__ == "__main__":
    typer.run(main)
