"""Meta-train an optimizer on problems of your own, save it, and use it.

python examples/meta_train_optimizer.py --iterations 100
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from metakern.learners import RuleLearner
from metakern.optim import LearnedOptimizer
from metakern.rules import CoordinatewiseLSTM, load
from metakern.tasks import NetworkProblem
from metakern.training import Trainer, TrainerConfig


def make_network() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))


def data(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A curve for every split: meta-training never sees the one that tests."""
    x = torch.linspace(-3, 3, 50).unsqueeze(-1)
    return x, {"train": x.sin(), "valid": (1.5 * x).cos(), "test": (2 * x).sin()}[split]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=100)
    iterations = parser.parse_args().iterations

    problems = NetworkProblem(make_network, data, loss=F.mse_loss)
    learner = RuleLearner(CoordinatewiseLSTM(), steps=100, unroll=20)
    optimizer = torch.optim.Adam(learner.parameters(), 1e-2)
    config = TrainerConfig(iterations=iterations, num_tasks=8, eval_every=20, eval_tasks=8)
    trainer = Trainer(learner, problems, optimizer, config, folder="runs/my-optimizer")
    trainer.fit()
    trainer.load_best()
    print(f"loss of test problems after 100 steps: {trainer.evaluate('test')['loss']:.4f}")
    learner.rule.save_pretrained("my-optimizer")

    net, (x, y) = make_network(), data("test")
    trained = LearnedOptimizer(net.parameters(), load("my-optimizer"))
    for _ in range(100):
        loss = F.mse_loss(net(x), y)
        trained.zero_grad()
        loss.backward()
        trained.step()
    print(f"loss of one network by LearnedOptimizer: {loss.item():.4f}")


if __name__ == "__main__":
    main()
