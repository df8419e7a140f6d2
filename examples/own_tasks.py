"""A distribution of tasks of your own under `Trainer`: decay curves, whose rate differs from task to task.

python examples/own_tasks.py --iterations 500
"""

import argparse

import torch

from metakern.learners import MAMLLearner
from metakern.models import mlp
from metakern.tasks import Episodes
from metakern.training import Trainer, TrainerConfig


class Decays:
    """y = exp(-r·x) from 10 points; every split has rates r of its own."""

    def __init__(self, low: float = 0.5, high: float = 2.0) -> None:
        self.low, self.high = low, high

    def split(self, name: str) -> "Decays":
        return Decays(*{"train": (0.5, 2.0), "valid": (2.0, 2.25), "test": (2.25, 2.5)}[name])

    def sample(self, num_tasks: int, generator: torch.Generator) -> Episodes:
        rates = torch.empty(num_tasks, 1, 1).uniform_(self.low, self.high, generator=generator)
        x = torch.rand(num_tasks, 20, 1, generator=generator)
        y = torch.exp(-rates * x)
        return Episodes(x[:, :10], y[:, :10], x[:, 10:], y[:, 10:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=500)
    iterations = parser.parse_args().iterations

    torch.manual_seed(0)
    learner = MAMLLearner(mlp(1, 40, 1), steps=5, inner_lr=0.1)
    optimizer = torch.optim.Adam(learner.parameters(), 1e-3)
    config = TrainerConfig(iterations=iterations, num_tasks=32, eval_every=100)
    trainer = Trainer(learner, Decays(), optimizer, config, folder="runs/decays")
    trainer.fit()
    trainer.load_best()
    print(f"mean squared error on test tasks: {trainer.evaluate('test')['loss']:.2e}")


if __name__ == "__main__":
    main()
