"""An update rule of your own: a learned mixture of the gradient and its sign, meta-trained and used as an optimizer.

python examples/own_rule.py --iterations 100
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from metakern.learners import RuleLearner
from metakern.optim import LearnedOptimizer
from metakern.rules import Rule, register
from metakern.tasks import DigitsMLP
from metakern.training import Trainer, TrainerConfig


@register
class SignMixture(Rule):
    """θ' = θ − exp(a)·g − exp(b)·sign(g); a and b are meta-learned."""

    title = "Sign mixture"

    def __init__(self) -> None:
        super().__init__()
        self.log_rates = nn.Parameter(torch.tensor([-2.0, -5.0]))

    def init_state(self, params, *, tasks=False):
        return {}

    def forward(self, params, grads, state, *, loss=None):
        rate, sign_rate = self.log_rates.exp()
        return {name: p - rate * grads[name] - sign_rate * grads[name].sign() for name, p in params.items()}, state


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=100)
    iterations = parser.parse_args().iterations

    learner = RuleLearner(SignMixture(), steps=60, unroll=20)
    config = TrainerConfig(iterations=iterations, num_tasks=8, eval_every=20, eval_tasks=8)
    trainer = Trainer(learner, DigitsMLP(), torch.optim.Adam(learner.parameters(), 5e-2), config)
    trainer.fit()
    print("learned rates:", learner.rule.log_rates.exp().tolist())

    net, x, y = nn.Linear(64, 10), torch.rand(128, 64), torch.randint(10, (128,))
    optimizer = LearnedOptimizer(net.parameters(), learner.rule)
    for _ in range(50):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


if __name__ == "__main__":
    main()
